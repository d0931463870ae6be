"""WHEN: which tiles of the triangle of (source, target) pairs may be paid after which position. Integers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from .blocked import Blocked
from .cost import Cost, cost, fft_price
from .draw import draw
from .eager import Eager
from .epoched import Epoched
from .laws import Tiling, verify, verify_span
from .lazy import Lazy
from .lives import clip_to_lives
from .prompted import Prompted
from .relaxed import Relaxed
from .separated import Separated
from .spec import describe, rebuild
from .spread import Spread
from .staggered import Staggered
from .tile import Clipped, Pair, Parallelogram, Rectangle, Share, Span, Tile
from .triangle import Triangle
from .twice_relaxed import TwiceRelaxed

TILINGS: Mapping[str, Callable[..., Tiling]] = MappingProxyType(
    {
        "lazy": Lazy,
        "eager": Eager,
        "relaxed": Relaxed,
        "blocked": Blocked,
        "epoched": Epoched,
        "separated": Separated,
        "staggered": Staggered,
        "twice_relaxed": TwiceRelaxed,
    }
)
"""Every tiling by name: a constructor whose first argument is the length."""

__all__ = [
    "TILINGS",
    "Blocked",
    "Clipped",
    "Cost",
    "Eager",
    "Epoched",
    "Lazy",
    "Pair",
    "Parallelogram",
    "Prompted",
    "Rectangle",
    "Relaxed",
    "Separated",
    "Share",
    "Span",
    "Spread",
    "Staggered",
    "Tile",
    "Tiling",
    "Triangle",
    "TwiceRelaxed",
    "clip_to_lives",
    "cost",
    "describe",
    "draw",
    "fft_price",
    "rebuild",
    "verify",
    "verify_span",
]
