"""A published config being read: every key is taken once, defaults are told, and what is left over is an error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from flash_inference.errors import CheckpointError

T = TypeVar("T")

# Keys that transformers writes beside a model's own, none of which changes what the model computes.
TRANSFORMERS = (
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "finetuning_task",
    "head", "id2label", "initializer_range", "is_decoder", "label2id", "mask_token_id", "model_type",
    "null_token_id", "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
    "return_dict", "torch_dtype", "torchscript", "transformers_version", "unk_token_id", "use_cache",
    "use_return_dict", "attn_implementation",
)  # fmt: skip


class Settings:
    """The keys of a config, or of an object inside it. `notes` collects what a reader should be told."""

    def __init__(self, values: dict[str, Any], where: str, inside: str = "", notes: list[str] | None = None) -> None:
        self.where, self.notes = where, [] if notes is None else notes
        self._left, self._inside, self._known = dict(values), inside, set[str]()

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; a missing one is `default`, and told, or an error."""
        value = self._take(name, default)
        if type(value) is not int or value < least:
            raise self.error(name, value, f"an integer of at least {least}")
        return value

    def within(self, name: str, allowed: range, default: int, why: str) -> int:
        """A whole number of a range."""
        value = self.integer(name, default)
        if value not in allowed:
            span = str(allowed.start) if len(allowed) == 1 else f"{allowed.start} to {allowed.stop - 1}"
            raise self.error(name, value, f"{span}, the choice {why}")
        return value

    def divisor(self, name: str, of: int, default: int | None = None) -> int:
        """A whole number that divides another."""
        value = self.integer(name, default)
        if of % value:
            raise self.error(name, value, f"a divisor of {of}")
        return value

    def odd(self, name: str, default: int) -> int:
        """An odd number of at least 3: a time, and pairs of cosine and sine."""
        value = self.integer(name, default, least=3)
        if value % 2 == 0:
            raise self.error(name, value, "an odd integer: a time, and pairs of cosine and sine")
        return value

    def number(self, name: str, default: float, told: str) -> float:
        """A finite number of at least 0; `told` is the note on the default, empty for none."""
        if name not in self._left:
            self._known.add(name)
            self.notes += [told] if told else []
            return default
        value = self._take(name, None)
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise self.error(name, value, "a finite number of at least 0")
        return float(value)

    def __contains__(self, name: str) -> bool:
        """Whether a key is given, other than as null, and has not been taken."""
        return self._left.get(name) is not None

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false; a missing one is `default`, and told, or an error."""
        value = self._take(name, default)
        if type(value) is not bool:
            raise self.error(name, value, "true or false")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        """One of a few words."""
        value = self._take(name, default)
        if value not in allowed:
            raise self.error(name, value, f"one of {', '.join(map(repr, allowed))}")
        return value

    def indices(self, name: str, below: int | None = None) -> list[int]:
        """A list of different whole numbers of at least 0, and less than `below` if that is given."""
        value = self._take(name, None)
        good = isinstance(value, list) and all(
            type(i) is int and i >= 0 and (below is None or i < below) for i in value
        )
        if not good or len(set(value)) != len(value):
            span = "of at least 0" if below is None else f"from 0 to {below - 1}"
            raise self.error(name, value, f"a list of different integers {span}")
        return value

    def word(self, name: str, ours: Mapping[Any, T], default: str | None) -> T:
        """What we have for one of several published words; a missing key means `default`."""
        self._known.add(name)
        value = self._left.pop(name, default)
        if not isinstance(value, str | None) or value not in ours:
            raise self.error(name, value, f"one of {', '.join(map(repr, ours))}")
        return ours[value]

    def only(self, why: str, **values: Any) -> None:
        """Keys that may be missing, or have the one value that this library computes."""
        for name, value in values.items():
            self._known.add(name)
            got = self._left.pop(name, value)
            if got != value or (type(got) is bool) != (type(value) is bool):
                raise self.error(name, got, f"{value!r}, since {why}")

    def ignore(self, *names: str) -> None:
        """Keys that change nothing about what the model computes."""
        for name in names:
            self._known.add(name)
            self._left.pop(name, None)

    def section(self, name: str) -> Settings:
        """The object under a key."""
        value = self._take(name, None)
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return Settings(value, self.where, f"{self._inside}{name}.", self.notes)

    def finish(self) -> None:
        """Raises if a key is left that nobody has asked for."""
        for name in self._left:
            near = difflib.get_close_matches(name, self._known, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(self._known))}."
            raise CheckpointError(f"{self.where} has unknown key {self._inside + name!r}. {hint}")

    def error(self, name: str, value: Any, expected: str) -> CheckpointError:
        """What to raise for a value that cannot be used."""
        return CheckpointError(f"{self.where} has {self._inside + name} = {value!r}; expected {expected}.")

    def _take(self, name: str, default: Any) -> Any:
        self._known.add(name)
        value = self._left.pop(name, None)
        if value is not None:
            return value
        if default is None:
            near = difflib.get_close_matches(name, self._left, 1)
            hint = f" Is {self._inside + near[0]!r} meant for it?" if near else ""
            raise CheckpointError(f"{self.where} lacks {self._inside + name!r}, which has no default.{hint}")
        self.notes.append(f"{self._inside}{name} is not given; the published default {default!r} was used")
        return default
