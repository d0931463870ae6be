"""The configuration of a model: a frozen value that can be written, read and compared."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from flash_inference.errors import ModelError


@dataclass(frozen=True, slots=True)
class FilterConfig:
    """How a layer's filter is given: `kind` "implicit" (sine MLP and window) or "explicit" (one number per tap)."""

    kind: str = "implicit"
    width: int = 64
    features: int = 5
    inner: int = 2
    frequency: float = 10.0
    modulate: bool = True
    shift: float = 0.0
    fast_decay: float = 0.3
    slow_decay: float = 1.5

    def settings(self) -> dict[str, Any]:
        """The arguments that the filter class of this kind takes."""
        values = dataclasses.asdict(self)
        kind = values.pop("kind")
        return values if kind == "implicit" else {}


@dataclass(frozen=True, slots=True)
class HyenaConfig:
    """A Hyena language model. `length` is the filter length, hence the longest sequence the model can run."""

    vocab_size: int
    width: int
    layers: int
    length: int
    order: int = 2
    inner: int = 0
    short_taps: int = 3
    filter: FilterConfig = field(default_factory=FilterConfig)
    norm_eps: float = 1e-5
    tied: bool = True
    dropout: float = 0.0
    tokens: str = "bytes"
    start_token: int = 0
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0

    def __post_init__(self) -> None:
        checks = {
            "vocab_size": self.vocab_size >= 1,
            "width": self.width >= 1,
            "layers": self.layers >= 1,
            "length": self.length >= 1,
            "order": self.order >= 2,
            "inner": self.inner >= 0,
            "short_taps": self.short_taps >= 1,
            "dropout": 0 <= self.dropout < 1,
            "start_token": 0 <= self.start_token < self.vocab_size,
            "pad_token": 0 <= self.pad_token < self.vocab_size,
        }
        for name, good in checks.items():
            if not good:
                raise ModelError(
                    f"HyenaConfig.{name} = {getattr(self, name)!r} is out of range. "
                    "Sizes are at least 1 (order at least 2), token ids lie inside the vocabulary."
                )

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's hidden layer: `inner`, or 4 x width where inner is 0."""
        return self.inner or 4 * self.width

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HyenaConfig:
        """Reads what `to_dict` wrote; unknown or missing keys raise and name the nearest field."""
        values = dict(values)
        _check_keys(cls, values)
        filter_values = values.pop("filter", {})
        if not isinstance(filter_values, dict):
            raise ModelError(f"config key 'filter' is {type(filter_values).__name__}; expected an object of settings.")
        _check_keys(FilterConfig, filter_values)
        try:
            if "stop_tokens" in values:
                values["stop_tokens"] = tuple(values["stop_tokens"])
            return cls(filter=FilterConfig(**filter_values), **values)
        except TypeError as error:
            raise ModelError(
                f"config does not make a HyenaConfig: {error}. Compare with HyenaConfig's fields."
            ) from None


def _check_keys(kind: type, values: dict[str, Any]) -> None:
    names = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(names)}."
            raise ModelError(f"config has unknown key {key!r} for {kind.__name__}. {hint}")
