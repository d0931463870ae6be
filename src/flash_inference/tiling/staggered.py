"""Staggered: Relaxed's large squares a near-block late, on a clock that groups of channels shift against each other."""

from __future__ import annotations

from dataclasses import dataclass

from .blocked import cut, inside
from .relaxed import square_levels, squares
from .tile import Pair, Rectangle, Span
from .triangle import Level, Triangle, low_bit, next_power, require


@dataclass(frozen=True, repr=False)
class Staggered(Triangle):
    """Relaxed up to side `near`; above it, squares whose targets wait one near-block more: a slack of `near` each.

    When n positions are known, n a multiple of near: sources [n - V, n) to targets [n + near, n + near + V), with
    V = near times the largest power of two that divides n / near + shift. With `block`, pairs inside an aligned block
    of positions are inline, as in Blocked.

    Why it covers: squares up to near pay near-blocks at distance 1. Call target block j + 1 j: then Relaxed's squares
    over near-blocks, begun at block -shift, pay every source block i < j once, which is every distance >= 2.
    Cost: Relaxed's, and one more square as large as the length if shift > 0, yet no step must pay a tile of more than
    `near` targets. Where channels are split in 2^q groups with shifts 0 .. 2^q - 1, one group in two pays V = near at
    each block, one in four 2 near, and so on: the work of every block is the same, up to the largest sides.
    Source: the shifted squares are those of Oncescu et al., arXiv 2410.12982; the slack, as in Gardner (1995).
    """

    near: int = 256
    block: int = 1
    shift: int = 0

    def __post_init__(self) -> None:
        Triangle.__post_init__(self)
        require("Staggered", "block", self.block, minimum=1, power=True)
        require("Staggered", "near", self.near, minimum=self.block, power=True)
        require("Staggered", "shift", self.shift, minimum=0)

    @property
    def top(self) -> int:
        """The largest side of the late squares; 0 if there are none."""
        few = self.length is not None and self.length <= 2 * self.near
        return 0 if few or self.limit <= self.near + 1 else max(next_power(self.limit), self.near)

    @property
    def slacks(self) -> tuple[int, ...]:
        """near, if there are late squares."""
        return (self.near,) if self.top else ()

    @property
    def cap(self) -> int:
        """The largest side of the squares that are not late; 0 if one block holds the length."""
        if self.length is not None and self.length <= self.block:
            return 0
        return self.near if self.taps is None else min(self.near, max(next_power(self.taps), self.block))

    @property
    def reach(self) -> tuple[int, int]:
        """Back by the largest side, ahead by that and near."""
        return max(self.top, self.cap), self.top + self.near if self.top else self.cap

    def side(self, n: int) -> int:
        """V of the late square that is paid when n positions are known; 0 for none."""
        return 0 if n % self.near else min(self.near * low_bit(n // self.near + self.shift), self.top)

    def after(self, position: int) -> tuple[Rectangle, ...]:
        """The square that ends at `position`, then the late one."""
        n = self.check(position) + 1
        return (() if n % self.block else squares(self, n, self.cap)) + self._late(n)

    def _late(self, n: int) -> tuple[Rectangle, ...]:
        side = self.side(n)
        return self.rectangle((n - side, n), (n + self.near, n + self.near + side)) if side else ()

    def inline(self, position: int) -> tuple[Pair, ...]:
        """(i, position) for every i of the block so far."""
        return inside(self.check(position), self.block)

    def span(self, start: int, n: int) -> Span:
        """A few rectangles a level on either side; a tile wholly beyond the chunk stays as it is."""
        stop = self.check_span(start, n)
        levels = square_levels(self, self.block, self.cap)
        levels += [self._level(self.near << q) for q in range((self.top // self.near).bit_length())]
        across = tuple(tile for level in levels for tile in level.before(start, stop))
        return Span(
            start,
            stop,
            before=cut(self, start, stop, self.block) + across,
            after=tuple(tile for level in levels for tile in level.after(start, stop)),
        )

    def _level(self, size: int) -> Level:
        every = size if size == self.top else 2 * size
        phase = ((size // self.near - self.shift) * self.near) % every
        return Level(every, size, size + self.near, self._late, phase)
