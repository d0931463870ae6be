"""The ground that every tiling covers: the strict triangle of pairs, its length and its lags."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING

from flash_inference.errors import TilingError

from .tile import Pair, Rectangle

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, repr=False)
class Triangle:
    """Pairs (source, target) with 0 <= source <= target < length; lags >= taps pay nothing.

    length: the number of positions; None for an endless stream, which needs `taps`.
    taps: the filter length; None if every lag of the length counts.
    """

    length: int | None
    taps: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.length is None and self.taps is None:
            raise TilingError(
                f"{type(self).__name__} got length=None and taps=None; an endless tiling needs the filter length. "
                "Pass taps=, or a length."
            )
        for name, value in (("length", self.length), ("taps", self.taps)):
            if value is not None:
                require(type(self).__name__, name, value, minimum=1)

    @property
    def origin(self) -> int:
        """Where aligned blocks start."""
        return 0

    @property
    def slacks(self) -> tuple[int, ...]:
        """The distinct slacks > 0 of the tiles, ascending."""
        return ()

    @property
    def limit(self) -> int:
        """One more than the longest lag that pays anything: the smaller of length and taps."""
        return min(x for x in (self.length, self.taps) if x is not None)

    def inline(self, position: int) -> tuple[Pair, ...]:
        """The pairs that the step at `position` pays itself: (position, position)."""
        self.check(position)
        return ((position, position),)

    def check(self, position: int) -> int:
        """`position`, if the tiling has it."""
        return check_position(self, self.length, position)

    def check_span(self, start: int, n: int) -> int:
        """The stop of the span of `n` positions at `start`, if the tiling has them."""
        return check_span(self, self.length, start, n)

    def rectangle(self, sources: tuple[int, int], targets: tuple[int, int]) -> tuple[Rectangle, ...]:
        """The rectangle, clipped to the length; () if nothing is left or no lag of it is below taps."""
        stop = targets[1] if self.length is None else min(targets[1], self.length)
        start = max(0, sources[0])
        if start >= sources[1] or targets[0] >= stop:
            return ()
        if self.taps is not None and targets[0] - sources[1] + 1 >= self.taps:
            return ()
        return (Rectangle(range(start, sources[1]), range(targets[0], stop)),)

    def needed(self, sources: tuple[int, int], targets: tuple[int, int]) -> tuple[Rectangle, ...]:
        """As `rectangle`, without the sources and the targets that have no lag below taps in it."""
        if self.taps is not None:
            sources = max(sources[0], targets[0] - self.taps + 1), sources[1]
            targets = targets[0], min(targets[1], sources[1] + self.taps - 1)
        return self.rectangle(sources, targets)

    def __repr__(self) -> str:
        return call(self)


@dataclass(frozen=True, slots=True)
class Level:
    """The tiles of one size: paid after position n - 1 for n of the form `phase` plus a multiple of `period`.

    tile: n -> the tiles of that step (() where it has none); each has sources in [n - back, n) and targets in
    [n, n + ahead).
    """

    period: int
    back: int
    ahead: int
    tile: Callable[[int], tuple[Rectangle, ...]]
    phase: int = 0

    def before(self, start: int, stop: int) -> Iterable[Rectangle]:
        """What tiles paid at n > start owe from sources < start to targets in [start, stop)."""
        first = self._next(start)
        return self._clip(range(first, min(start + self.back, stop), self.period), range(start), range(start, stop))

    def after(self, start: int, stop: int) -> Iterable[Rectangle]:
        """What tiles paid at start < n < stop owe to targets >= stop."""
        first = self._next(max(start, stop - self.ahead))
        return self._clip(range(first, stop, self.period), range(stop), range(stop, stop + self.ahead))

    def _next(self, n: int) -> int:
        """The first step after n."""
        return ((n - self.phase) // self.period + 1) * self.period + self.phase

    def _clip(self, steps: range, sources: range, targets: range) -> Iterable[Rectangle]:
        for n in steps:
            for tile in self.tile(n):
                part = tile.clip(sources, targets)
                if part is not None:
                    yield part


def require(owner: str, name: str, value: int, minimum: int, power: bool = False) -> None:
    """Raises TilingError unless `value` is an int >= minimum and, if asked, a power of two."""
    if not isinstance(value, int) or value < minimum:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TilingError(
            f"{owner} got {name}={value!r}; it must be an integer >= {minimum}. Pass {name}={minimum} or more."
        )
    if power and value & (value - 1):
        raise TilingError(
            f"{owner} got {name}={value}, which is no power of two. "
            f"Pass {name}={next_power(value) // 2} or {name}={next_power(value)}."
        )


def check_position(tiling: object, length: int | None, position: int) -> int:
    """`position`, if it lies in 0 .. length - 1; TilingError otherwise."""
    if position < 0 or (length is not None and position >= length):
        have = "positions from 0 on" if length is None else f"positions 0..{length - 1}"
        raise TilingError(f"{tiling!r} got position {position}; it has {have}. Stay inside, or build a longer tiling.")
    return position


def check_span(tiling: object, length: int | None, start: int, n: int) -> int:
    """start + n, if the chunk is not empty and fits; TilingError otherwise."""
    if n < 1:
        raise TilingError(f"{tiling!r} got a span of n={n} positions; it needs at least 1. Skip empty chunks.")
    check_position(tiling, length, start)
    check_position(tiling, length, start + n - 1)
    return start + n


def next_power(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def low_bit(n: int) -> int:
    """The largest power of two that divides n, for n >= 1."""
    return n & -n


def call(value: DataclassInstance) -> str:
    """The constructor call that makes a dataclass, without the arguments that equal their defaults."""
    arguments, keywords = list[str](), list[str]()
    for f in fields(value):
        got = getattr(value, f.name)
        if f.default is MISSING and f.repr:
            arguments.append(repr(got))
        elif f.repr and got != f.default:
            (keywords if f.kw_only else arguments).append(f"{f.name}={got!r}")
    return f"{type(value).__name__}({', '.join(arguments + keywords)})"
