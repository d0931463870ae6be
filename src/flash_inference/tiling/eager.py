"""Eager: each position pays all later ones at once."""

from __future__ import annotations

from dataclasses import dataclass

from .tile import Rectangle, Span
from .triangle import Triangle


@dataclass(frozen=True, repr=False)
class Eager(Triangle):
    """Columns: after position t, the one source t to every target whose lag counts.

    Source t to targets [t + 1, min(length, t + taps)). Cost: O(L^2), or O(L taps). Keeps no inputs, only partial sums.
    """

    @property
    def block(self) -> int:
        """1: only (t, t) is inline."""
        return 1

    @property
    def reach(self) -> tuple[int, int]:
        """One position back, the longest lag ahead."""
        return 1, self.limit - 1

    def after(self, position: int) -> tuple[Rectangle, ...]:
        """The column of `position`."""
        n = self.check(position) + 1
        return self.needed((position, n), (n, position + self.limit))

    def span(self, start: int, n: int) -> Span:
        """One rectangle: the columns of the chunk but the last, beyond the chunk."""
        stop = self.check_span(start, n)
        return Span(start, stop, before=(), after=self.needed((start, stop - 1), (stop, stop - 1 + self.limit)))
