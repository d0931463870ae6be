"""Tiles clipped to the rows that live: what each row of a batch needs of a tile that all rows share."""

from __future__ import annotations

from collections.abc import Sequence

from .tile import Rectangle
from .triangle import next_power

WHOLE = 64
"""Sides up to which a tile is not clipped: it costs less than another call."""


def clip_to_lives(tile: Rectangle, lives: Sequence[range]) -> list[tuple[slice, Rectangle]]:
    """The parts of a tile that rows need, as (rows, part): row b has inputs at the clocks lives[b], zeros before.

    A row needs the sources since it began and the targets until it ends, each rounded up to a power of two so that few
    shapes occur. What a row gets depends on its own life alone, never on its neighbours. Neighbours that need the same
    are paid together, with the empty rows between them; rows without a source or a target in the tile not at all.
    """
    parts: list[tuple[slice, Rectangle]] = []
    (first, newest), (oldest, last) = _ends(tile.sources), _ends(tile.targets)
    for row, life in enumerate(lives):
        if not life or life.start >= newest or life.stop <= oldest:
            continue
        sources = min(_rounded(newest - max(life.start, first)), newest - first)
        targets = min(_rounded(min(life.stop, last) - oldest), last - oldest)
        part = Rectangle(range(newest - sources, newest), range(oldest, oldest + targets))
        if parts and parts[-1][1] == part and not any(lives[parts[-1][0].stop : row]):
            parts[-1] = (slice(parts[-1][0].start, row + 1), part)
        else:
            parts.append((slice(row, row + 1), part))
    return parts


def _ends(interval: range) -> tuple[int, int]:
    return interval.start, interval.stop


def _rounded(n: int) -> int:
    return max(next_power(n), WHOLE)
