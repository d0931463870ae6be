"""Separated: large tiles stand one side away from the diagonal, so that none is urgent."""

from __future__ import annotations

from dataclasses import dataclass, field

from .blocked import cut, inside
from .relaxed import square_levels, squares
from .tile import Pair, Rectangle, Span
from .triangle import Level, Triangle, next_power, require


@dataclass(frozen=True, repr=False)
class Separated(Triangle):
    """Relaxed up to side `near`; above it, tiles of targets V with slack exactly V, for V = near, 2 near, .., N/4.

    Write V-block s for positions [s V, (s + 1) V). When V-block s is complete, after position (s + 1) V - 1:
    V-block s + 2 is paid from V-block s, and from V-block s - 1 too if s is odd. At the largest V, it is paid from
    every V-block <= s that has a lag below taps in it. N is the smaller of the powers of two >= length and >= taps.
    Inside an aligned `block` of positions, pairs are inline, as in Blocked.

    Why it covers: squares pay near-blocks at distance 1; level V pays V-blocks at distance 2, and 3 from even to odd.
    What is left lies at a distance >= 2 in blocks of 2 V, and the next level starts from there.
    Cost: about twice Relaxed's FFT work for the large sides; no step must pay a tile of more than `near` targets.
    Source: Gardner (1995), whose tiles stand off the diagonal for the same reason.
    """

    near: int = 256
    block: int = 1
    levels: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        Triangle.__post_init__(self)
        require("Separated", "near", self.near, minimum=1, power=True)
        require("Separated", "block", self.block, minimum=1, power=True)
        require("Separated", "near", self.near, minimum=self.block, power=True)
        top = max(next_power(self.limit) // 4, self.near)
        sizes = [1 << q for q in range(self.near.bit_length() - 1, top.bit_length())]
        if (self.length is not None and self.length <= 2 * self.near) or (self.taps or self.limit) <= self.near + 1:
            sizes = []
        object.__setattr__(self, "levels", tuple(sizes))

    @property
    def slacks(self) -> tuple[int, ...]:
        """One slack a level: V itself."""
        return self.levels

    @property
    def cap(self) -> int:
        """The largest side of the squares: near, or less where the taps need less; 0 if one block holds the length."""
        if self.length is not None and self.length <= self.block:
            return 0
        return self.near if self.taps is None else min(self.near, max(next_power(self.taps), self.block))

    @property
    def reach(self) -> tuple[int, int]:
        """Back to the first source of a top tile; ahead 2 V of the largest V."""
        if not self.levels:
            return self.cap, self.cap
        top = self.levels[-1]
        return max(self._back(top), 2 * top), 2 * top

    def _back(self, size: int) -> int:
        """Sources of a tile of `size` start at n - back or later."""
        if size != self.levels[-1]:
            return 2 * size
        return -(-(self.limit - 1) // size) * size - size

    def after(self, position: int) -> tuple[Rectangle, ...]:
        """The square that ends at `position`, then one tile for every level that has a block that ends there."""
        n = self.check(position) + 1
        tiles = () if n % self.block else squares(self, n, self.cap)
        for size in self.levels:
            if n % size:
                break
            tiles += self._apart(size, n)
        return tiles

    def _apart(self, size: int, n: int) -> tuple[Rectangle, ...]:
        """The tile of level `size` when n positions, a multiple of size, are known."""
        if size == self.levels[-1]:
            first = 0 if self.taps is None else (n + size - self.taps + 1) // size * size
        else:
            first = n - size if (n // size) % 2 else n - 2 * size
        return self.rectangle((first, n), (n + size, n + 2 * size))

    def inline(self, position: int) -> tuple[Pair, ...]:
        """(i, position) for every i of the block so far."""
        return inside(self.check(position), self.block)

    def span(self, start: int, n: int) -> Span:
        """A few rectangles a level on either side; a tile wholly beyond the chunk stays as it is."""
        stop = self.check_span(start, n)
        levels = square_levels(self, self.block, self.cap)
        levels += [self._level(size) for size in self.levels]
        across = tuple(tile for level in levels for tile in level.before(start, stop))
        return Span(
            start,
            stop,
            before=cut(self, start, stop, self.block) + across,
            after=tuple(tile for level in levels for tile in level.after(start, stop)),
        )

    def _level(self, size: int) -> Level:
        return Level(size, self._back(size), 2 * size, lambda n: self._apart(size, n))
