"""What a tiling costs under a price per tile."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from flash_inference.errors import TilingError

from .laws import Tiling
from .tile import Parallelogram, Share, Tile

Price = Callable[[Tile], float]


@dataclass(frozen=True)
class Cost:
    """What the steps of a tiling pay, in the unit of the price; inline pairs are not in it.

    total: over all steps; worst: of the dearest step; worst_at: the first position after which it is paid (-1: nothing
    is ever paid); shapes: (sources, targets or lags) -> how many payments, a share of a tile counted as one.
    """

    total: float
    worst: float
    worst_at: int
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter[tuple[int, int]])


def area(tile: Tile) -> float:
    """Source-target pairs, which is multiply-adds per channel of a direct sum."""
    return tile.area


def fft_price(tile: Tile) -> float:
    """n log2 n with n the power of two >= sources + targets (or lags): one FFT of a tile, up to a constant factor."""
    sources, others = shape(tile)
    n = 1 << (sources + others - 1).bit_length()
    return n * math.log2(n)


def shape(tile: Tile) -> tuple[int, int]:
    """(S, T): the number of sources, and of targets or lags."""
    return len(tile.sources), len(tile.lags if isinstance(tile, Parallelogram) else tile.targets)


def priced(item: Tile | Share, price: Price) -> float:
    """What an item costs: a share, its part of its tile's price."""
    return price(item.tile) * len(item.part) / item.parts if isinstance(item, Share) else price(item)


def cost(tiling: Tiling, price: Price = area, length: int | None = None) -> Cost:
    """What the steps after positions 0 .. length - 1 pay under `price`. Cost: O(length) calls of `after`.

    length: by default the tiling's own; an endless one needs it.
    """
    stop = tiling.length if length is None else length
    if stop is None:
        raise TilingError(f"{tiling!r} is endless; cost got no length. Pass length=, a number of positions.")
    total, worst, worst_at, shapes = 0.0, 0.0, -1, Counter[tuple[int, int]]()
    for step in range(stop):
        paid = 0.0
        for item in tiling.after(step):
            paid += priced(item, price)
            shapes[shape(item.tile if isinstance(item, Share) else item)] += 1
        total += paid
        if paid > worst:
            worst, worst_at = paid, step
    return Cost(total, worst, worst_at, shapes)
