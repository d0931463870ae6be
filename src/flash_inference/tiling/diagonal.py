"""What tilings of bounded latency share: squares at the diagonal up to a side `near`, and other tiles further off."""

from __future__ import annotations

from dataclasses import dataclass

from .blocked import inside, spanned
from .relaxed import square_levels, squares
from .tile import Pair, Rectangle, Span
from .triangle import Level, Triangle, next_power, require


@dataclass(frozen=True, repr=False)
class Diagonal(Triangle):
    """Relaxed up to side `near`; inside an aligned `block` of positions, pairs are inline, as in Blocked.

    Near-blocks at distance 1 are paid by these squares. `off(n)` are the tiles that pay the others, as soon as n
    positions are known, and `off_levels` the same by size.
    """

    near: int = 256
    block: int = 1

    def __post_init__(self) -> None:
        Triangle.__post_init__(self)
        name = type(self).__name__
        require(name, "near", self.near, minimum=1, power=True)
        require(name, "block", self.block, minimum=1, power=True)
        require(name, "near", self.near, minimum=self.block, power=True)

    @property
    def suffices(self) -> bool:
        """Whether squares at the diagonal pay all: no pair is further apart."""
        return (self.length is not None and self.length <= 2 * self.near) or (self.taps or self.limit) <= self.near + 1

    @property
    def cap(self) -> int:
        """The largest side of the squares: near, or less where the taps need less; 0 if one block holds the length."""
        if self.length is not None and self.length <= self.block:
            return 0
        return self.near if self.taps is None else min(self.near, max(next_power(self.taps), self.block))

    def off(self, n: int) -> tuple[Rectangle, ...]:
        """The tiles off the diagonal that are paid when n positions are known."""
        raise NotImplementedError

    def off_levels(self) -> list[Level]:
        """These tiles by size."""
        raise NotImplementedError

    def after(self, position: int) -> tuple[Rectangle, ...]:
        """The square that ends at `position`, then the tiles off the diagonal."""
        n = self.check(position) + 1
        return (() if n % self.block else squares(self, n, self.cap)) + self.off(n)

    def inline(self, position: int) -> tuple[Pair, ...]:
        """(i, position) for every i of the block so far."""
        return inside(self.check(position), self.block)

    def span(self, start: int, n: int) -> Span:
        """A few rectangles a level on either side; a tile wholly beyond the chunk stays as it is."""
        levels = square_levels(self, self.block, self.cap) + self.off_levels()
        return spanned(self, start, n, self.block, levels)
