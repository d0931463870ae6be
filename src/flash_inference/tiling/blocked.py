"""Blocked: lazy inside base blocks, Relaxed across them."""

from __future__ import annotations

from dataclasses import dataclass

from .relaxed import square_levels, squares
from .tile import Pair, Rectangle, Span
from .triangle import Level, Triangle, next_power, require


@dataclass(frozen=True, repr=False)
class Blocked(Triangle):
    """Relaxed without the sides below `block`: pairs inside an aligned block of positions are inline.

    After position t, if `block` divides n = t + 1: the Relaxed square of side >= block, capped at the larger of block
    and the power of two >= taps. The other steps have no tile.
    Cost: Relaxed's, less the launches of its small sides, plus at most block - 1 inline pairs a step.
    Source: base case of the recursion in van der Hoeven (2002); Gardner (1995) for the direct-form first block.
    """

    block: int = 32

    def __post_init__(self) -> None:
        Triangle.__post_init__(self)
        require("Blocked", "block", self.block, minimum=1, power=True)

    @property
    def cap(self) -> int:
        """The largest side in use; 0 if one block holds the length."""
        cap = min(next_power(x) // y for x, y in ((self.length, 2), (self.taps, 1)) if x is not None)
        return 0 if self.length is not None and self.length <= self.block else max(cap, self.block)

    @property
    def reach(self) -> tuple[int, int]:
        """(cap, cap)."""
        return self.cap, self.cap

    def after(self, position: int) -> tuple[Rectangle, ...]:
        """The square that ends at `position`, if a block ends there."""
        n = self.check(position) + 1
        return () if n % self.block else squares(self, n, self.cap)

    def inline(self, position: int) -> tuple[Pair, ...]:
        """(i, position) for every i of the block so far."""
        return inside(self.check(position), self.block)

    def span(self, start: int, n: int) -> Span:
        """One rectangle a side, at most, on either side of the chunk, and the rest of the block that `start` cuts."""
        return spanned(self, start, n, self.block, square_levels(self, self.block, self.cap))


def inside(position: int, block: int) -> tuple[Pair, ...]:
    """(i, position) for every i from the start of the aligned block to `position`."""
    return tuple((i, position) for i in range(position - position % block, position + 1))


def spanned(triangle: Triangle, start: int, n: int, block: int, levels: list[Level]) -> Span:
    """The tiles of all levels on either side of a chunk, and the rest of the block that `start` cuts."""
    stop = triangle.check_span(start, n)
    across = tuple(tile for level in levels for tile in level.before(start, stop))
    after = tuple(tile for level in levels for tile in level.after(start, stop))
    return Span(start, stop, before=cut(triangle, start, stop, block) + across, after=after)


def cut(triangle: Triangle, start: int, stop: int, block: int) -> tuple[Rectangle, ...]:
    """What would have been inline from the part of a block before `start` to its part in [start, stop)."""
    first = start - start % block
    return triangle.needed((first, start), (start, min(stop, first + block)))
