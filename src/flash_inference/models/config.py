"""What every model's configuration is: a frozen value that can be written, read and compared, and that builds parts."""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_origin, get_type_hints

from torch import nn

from flash_inference.errors import ModelError

if TYPE_CHECKING:
    from flash_inference.models.block import Block


@dataclass(frozen=True, slots=True)
class ModelConfig(ABC):
    """The settings that all families share. A family's config adds its own, and builds the family's parts.

    `length` is the longest sequence that the model can run: the filters' length. `tokens` names the table between text
    and ids. With `tied` the head's weights are the embedding's. `family` is the name under which folders store it.
    `length_key` is a published config's key for a length that no weight depends on, empty where filters end there.
    Raises ModelError for a value out of its range.
    """

    family: ClassVar[str]
    length_key: ClassVar[str] = ""

    vocab_size: int
    width: int
    layers: int
    length: int
    _: KW_ONLY
    tied: bool = True
    dropout: float = 0.0
    tokens: str = "bytes"
    start_token: int = 0
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0

    def __post_init__(self) -> None:
        for name, good in self.ranges().items():
            if not good:
                raise ModelError(
                    f"{type(self).__name__}.{name} = {getattr(self, name)!r} is out of range. "
                    "Sizes are at least 1 (order at least 2), token ids lie inside the vocabulary."
                )

    def ranges(self) -> dict[str, bool]:
        """Whether each field that has a range lies in it. A family adds its own fields to these."""
        return {
            "vocab_size": self.vocab_size >= 1,
            "width": self.width >= 1,
            "layers": self.layers >= 1,
            "length": self.length >= 1,
            "dropout": 0 <= self.dropout < 1,
            "start_token": 0 <= self.start_token < self.vocab_size,
            "pad_token": 0 <= self.pad_token < self.vocab_size,
        }

    def embedding(self) -> nn.Embedding:
        """What stands before the first block: token ids to hidden states."""
        return nn.Embedding(self.vocab_size, self.width)

    @abstractmethod
    def blocks(self) -> list[Block]:
        """The blocks in order, with fresh weights."""

    @abstractmethod
    def final_norm(self) -> nn.Module:
        """What stands between the last block and the head."""

    @property
    def limit(self) -> str:
        """What bounds the length, and the remedy, for messages."""
        if self.length_key:
            return (
                f"the config sets {self.length} as the longest sequence. Shorten the input, or raise `length` there "
                f"(`{self.length_key}` in a published one): no weight depends on it."
            )
        return (
            f"the filter has {self.length} taps, the longest sequence this model can run. Shorten the input, or train "
            "with a longer filter."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Reads what `to_dict` wrote; unknown or missing keys raise and name the nearest field."""
        _check_keys(cls, values)
        hints = get_type_hints(cls)
        try:
            return cls(**{key: _parsed(key, hints[key], value) for key, value in values.items()})
        except TypeError as error:
            raise ModelError(
                f"config does not make a {cls.__name__}: {error}. Compare with {cls.__name__}'s fields."
            ) from None


def _parsed(key: str, kind: Any, value: Any) -> Any:
    """A field's value from JSON: lists are tuples, objects are settings of a dataclass."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ModelError(f"config key {key!r} is {type(value).__name__}; expected an object of settings.")
        _check_keys(kind, value)
        return kind(**value)
    return tuple(value) if get_origin(kind) is tuple else value


def _check_keys(kind: type, values: dict[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(names)}."
            raise ModelError(f"config has unknown key {key!r} for {kind.__name__}. {hint}")
