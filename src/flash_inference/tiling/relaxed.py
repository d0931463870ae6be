"""Relaxed: the paper's tiling."""

from __future__ import annotations

from dataclasses import dataclass

from .tile import Rectangle, Span
from .triangle import Level, Triangle, low_bit, next_power


@dataclass(frozen=True, repr=False)
class Relaxed(Triangle):
    """Squares of side U, the largest power of two that divides the number n of known positions.

    After position t, n = t + 1: sources [n - U, n) to targets [n, n + U), U = min(n & -n, C), with C the smallest
    power of two >= taps (no cap without taps). L = 2^P positions use L / (2 U) tiles of each side U < L, P shapes.
    Cost: O(L log^2 L) by FFT, O(L log^2 taps) with taps.
    Source: Oncescu et al., arXiv 2410.12982, after Fischer and Stockmeyer (1974) and van der Hoeven (2002).
    """

    @property
    def block(self) -> int:
        """1: only (t, t) is inline."""
        return 1

    @property
    def cap(self) -> int:
        """The largest side in use; 0 if the length is 1."""
        return min(next_power(x) // y for x, y in ((self.length, 2), (self.taps, 1)) if x is not None)

    @property
    def reach(self) -> tuple[int, int]:
        """(cap, cap)."""
        return self.cap, self.cap

    def after(self, position: int) -> tuple[Rectangle, ...]:
        """The square that ends at `position`."""
        return squares(self, self.check(position) + 1, self.cap)

    def span(self, start: int, n: int) -> Span:
        """One rectangle a side, at most, on either side of the chunk."""
        stop = self.check_span(start, n)
        levels = square_levels(self, 1, self.cap)
        return Span(
            start,
            stop,
            before=tuple(tile for level in levels for tile in level.before(start, stop)),
            after=tuple(tile for level in levels for tile in level.after(start, stop)),
        )


def squares(triangle: Triangle, n: int, cap: int) -> tuple[Rectangle, ...]:
    """The Relaxed tile of n known positions, its side at most `cap`."""
    side = min(low_bit(n), cap)
    return triangle.rectangle((n - side, n), (n, n + side))


def square_levels(triangle: Triangle, first: int, cap: int) -> list[Level]:
    """The Relaxed tiles by side, from `first` to `cap`."""
    return [_square_level(triangle, 1 << q, cap) for q in range(first.bit_length() - 1, cap.bit_length())]


def _square_level(triangle: Triangle, side: int, cap: int) -> Level:
    def tile(n: int) -> tuple[Rectangle, ...]:
        return squares(triangle, n, cap) if min(low_bit(n), cap) == side else ()

    return Level(side, side, side, tile)
