"""A tiling as plain values, so that a saved state can say which tiling it runs on."""

from __future__ import annotations

import dataclasses
from typing import Any

from flash_inference.errors import TilingError

from .blocked import Blocked
from .eager import Eager
from .epoched import Epoched
from .laws import Tiling
from .lazy import Lazy
from .prompted import Prompted
from .relaxed import Relaxed
from .separated import Separated
from .spread import Spread
from .staggered import Staggered
from .twice_relaxed import TwiceRelaxed

KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Blocked,
        Eager,
        Epoched,
        Lazy,
        Prompted,
        Relaxed,
        Separated,
        Spread,
        Staggered,
        TwiceRelaxed,
    )
}


def describe(tiling: Tiling) -> dict[str, Any]:
    """The kind and the settings of a tiling of this package, nested for combinators. Raises TilingError for others."""
    name = type(tiling).__name__
    if KINDS.get(name) is not type(tiling):
        raise TilingError(
            f"{tiling!r} is a {name}, which cannot be written down; expected one of {', '.join(KINDS)}. "
            "Rebuild the tiling yourself where the state is loaded."
        )
    values: dict[str, Any] = {"kind": name}
    for field in dataclasses.fields(tiling):  # type: ignore[arg-type]
        if field.init:
            value = getattr(tiling, field.name)
            values[field.name] = describe(value) if field.name == "tiling" else value
    return values


def rebuild(values: dict[str, Any]) -> Tiling:
    """The tiling that `describe` wrote."""
    settings = dict(values)
    kind = KINDS.get(settings.pop("kind", ""))
    if kind is None:
        raise TilingError(f"{values!r} names no tiling; expected a kind among {', '.join(KINDS)}.")
    if "tiling" in settings:
        settings["tiling"] = rebuild(settings["tiling"])
    return kind(**settings)
