"""Tiles: sets of (source, target) pairs that are paid in one go, made of `range`s of step 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Pair = tuple[int, int]
"""(source, target), source <= target."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Every source paired with every target."""

    sources: range
    targets: range

    @property
    def ready(self) -> int:
        """The newest position that the tile reads."""
        return self.sources.stop - 1

    @property
    def due(self) -> int:
        """The first position that reads what the tile pays."""
        return self.targets.start

    @property
    def slack(self) -> int:
        """How many steps the payment may wait: due - ready - 1."""
        return self.targets.start - self.sources.stop

    @property
    def area(self) -> int:
        """The number of pairs."""
        return len(self.sources) * len(self.targets)

    def pairs(self) -> Iterator[Pair]:
        """The pairs, target by target."""
        return ((source, target) for target in self.targets for source in self.sources)

    def shift(self, offset: int) -> Rectangle:
        """The same tile, `offset` positions later."""
        return Rectangle(_shift(self.sources, offset), _shift(self.targets, offset))

    def clip(self, sources: range, targets: range) -> Rectangle | None:
        """The pairs that lie in `sources` x `targets` too; None if there are none."""
        s, t = intersect(self.sources, sources), intersect(self.targets, targets)
        return Rectangle(s, t) if s and t else None


@dataclass(frozen=True, slots=True)
class Parallelogram:
    """Every source paired with every lag, for filters whose tap k becomes known at position k.

    Its targets are source + lag; pairs whose target lies beyond the tiling's length pay nothing.
    """

    sources: range
    lags: range

    @property
    def ready(self) -> int:
        """The newest position that the tile reads: its newest source or its newest tap."""
        return max(self.sources.stop, self.lags.stop) - 1

    @property
    def due(self) -> int:
        """The first position that reads what the tile pays."""
        return self.sources.start + self.lags.start

    @property
    def slack(self) -> int:
        """How many steps the payment may wait: due - ready - 1."""
        return self.due - self.ready - 1

    @property
    def area(self) -> int:
        """The number of pairs."""
        return len(self.sources) * len(self.lags)

    def pairs(self) -> Iterator[Pair]:
        """The pairs, source by source."""
        return ((source, source + lag) for source in self.sources for lag in self.lags)


Tile = Rectangle | Parallelogram


@dataclass(frozen=True, slots=True)
class Clipped:
    """The pairs of a parallelogram whose target lies in `targets`."""

    tile: Parallelogram
    targets: range

    def pairs(self) -> Iterator[Pair]:
        """The pairs, source by source."""
        return (pair for pair in self.tile.pairs() if pair[1] in self.targets)


@dataclass(frozen=True, slots=True)
class Share:
    """Some channels of a tile: parts part.start .. part.stop - 1 out of `parts`."""

    tile: Rectangle
    part: range
    parts: int

    def channels(self, count: int) -> range:
        """Which of `count` channels: [count * part.start // parts, count * part.stop // parts)."""
        return range(count * self.part.start // self.parts, count * self.part.stop // self.parts)


Item = Rectangle | Parallelogram | Clipped | Share


@dataclass(frozen=True, slots=True)
class Span:
    """What a chunk of positions [start, stop) owes when it arrives at once.

    `before` is paid before the chunk is read (sources < start, targets in the chunk), the chunk's own forward pays the
    pairs inside it, `after` is paid once it is known (targets >= stop). The step after position stop - 1 is the loop's.
    """

    start: int
    stop: int
    before: tuple[Item, ...]
    after: tuple[Item, ...]


def intersect(a: range, b: range) -> range:
    """The common part of two ranges of step 1; empty if they miss each other."""
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


def targets_of(item: Item) -> range:
    """The targets that an item pays, whatever its kind."""
    match item:
        case Rectangle():
            return item.targets
        case Parallelogram():
            start = item.sources.start + item.lags.start
            return range(start, max(start, item.sources.stop + item.lags.stop - 1))
        case Clipped():
            return intersect(targets_of(item.tile), item.targets)
        case Share():
            return item.tile.targets


def sources_at(item: Item, target: int) -> range:
    """The sources that an item pays to one of its targets: always one run, whatever the kind."""
    match item:
        case Rectangle():
            return item.sources
        case Parallelogram():
            return intersect(item.sources, range(target - item.lags.stop + 1, target - item.lags.start + 1))
        case Clipped():
            return sources_at(item.tile, target)
        case Share():
            return item.tile.sources


def _shift(interval: range, offset: int) -> range:
    return range(interval.start + offset, interval.stop + offset)
