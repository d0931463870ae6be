"""What a user says about the parts of a module that mix along time, and where those parts are found."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn

from flash_inference.errors import ModelError

LAYOUTS = ("BLD", "BDL")
Source = str | int | Callable[..., Tensor]
Key = str | tuple[ModuleType, str]


@dataclass(frozen=True, slots=True)
class LongPart:
    """A causal depthwise convolution with a fixed filter: z = taps * y + skip y.

    `taps` and `skip` say where its filter [D, taps], lag 0 first, and its skip terms [D] are. For a submodule: the
    path of an attribute ("filter.weight"), or a function of the submodule. For a function fftconv(u, k, D): the
    position or the name of an argument, or a function of all its arguments; the first axes of size 1 are dropped.
    `layout` is that of its input and output: "BLD" or "BDL".
    """

    taps: Source
    skip: Source | None = None
    layout: str = "BLD"

    def __post_init__(self) -> None:
        _check_layout(self)


@dataclass(frozen=True, slots=True)
class ShortPart:
    """An operation that reads its input at a position and at the `reach` positions before it, and nothing else.

    It is run as it is, on the new positions behind the last `reach` inputs. An nn.Conv1d needs no `reach` and has
    layout "BDL"; its zeros on the left may be its own padding, cut off afterwards, or the caller's.
    """

    reach: int | None = None
    layout: str = "BDL"

    def __post_init__(self) -> None:
        _check_layout(self)
        if self.reach is not None and self.reach < 0:
            raise ModelError(
                f"ShortPart got reach={self.reach}; expected how many earlier positions are read, 0 or more."
            )


Part = LongPart | ShortPart


@dataclass(frozen=True, slots=True)
class Place:
    """A part where it stands: `owner.attribute` is what is called. `own` is the original."""

    name: str
    owner: nn.Module | ModuleType
    attribute: str
    part: Part
    own: Callable[..., Any]


def find_places(model: nn.Module, parts: Mapping[Key, Part]) -> list[Place]:
    """The places that the keys name, in the order of the model's submodules, then functions. Raises ModelError.

    A key is the name of a submodule, perhaps with * ("layers.*.conv"), or (module object, "function name").
    """
    places: list[Place] = []
    names: dict[str, nn.Module] = submodules(model)
    for key, part in parts.items():
        if not isinstance(part, LongPart | ShortPart):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ModelError(
                f"part {key!r} is a {type(part).__name__}; expected LongPart or ShortPart. What mixes along time in "
                "another way, such as attention, cannot be adapted."
            )
        if isinstance(key, tuple):
            places.append(_function(key, part))
            continue
        matching = [name for name in names if fnmatchcase(name, key)]
        if not matching:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ModelError(f"no submodule of {type(model).__name__} is named {key!r}.{hint}")
        for name in matching:
            if any(place.name == name for place in places):
                raise ModelError(f"submodule {name!r} is named twice; let one key match it.")
            places.append(Place(name, names[name], "forward", part, names[name].forward))
    if not any(isinstance(place.part, LongPart) for place in places):
        raise ModelError("no part is a LongPart: there is no long convolution to tile. Name at least one.")
    return places


def submodules(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules by name, without the model itself."""
    named = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    return {name: module for name, module in named if name}


def _function(key: tuple[ModuleType, str], part: Part) -> Place:
    owner, attribute = key
    if not isinstance(owner, ModuleType):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelError(
            f"part ({owner!r}, {attribute!r}): expected a Python module that holds the function, e.g. "
            "sys.modules[type(model).__module__]. Name methods by their submodule."
        )
    own = getattr(owner, attribute, None)
    if not callable(own):
        raise ModelError(f"module {owner.__name__} has no function {attribute!r}. Name it where it is looked up.")
    return Place(f"{owner.__name__}.{attribute}()", owner, attribute, part, own)


def _check_layout(part: Part) -> None:
    if part.layout not in LAYOUTS:
        raise ModelError(f"{type(part).__name__} got layout={part.layout!r}; expected one of {', '.join(LAYOUTS)}.")
