"""Lazy: each position sums over its whole past."""

from __future__ import annotations

from dataclasses import dataclass

from .tile import Rectangle, Span
from .triangle import Triangle


@dataclass(frozen=True, repr=False)
class Lazy(Triangle):
    """Rows: after position t, every source whose lag counts to the one target t + 1.

    Sources [max(0, t + 2 - taps), t + 1) to target t + 1. Cost: O(L^2), or O(L taps). No work ahead of need: the
    baseline of most decoders.
    """

    @property
    def block(self) -> int:
        """1: only (t, t) is inline."""
        return 1

    @property
    def reach(self) -> tuple[int, int]:
        """The longest lag back, one position ahead."""
        return self.limit - 1, 1

    def after(self, position: int) -> tuple[Rectangle, ...]:
        """The row of position + 1."""
        n = self.check(position) + 1
        return self.needed((0, n), (n, n + 1))

    def span(self, start: int, n: int) -> Span:
        """One rectangle: the rows of the chunk but the first, which is paid."""
        stop = self.check_span(start, n)
        return Span(start, stop, before=self.needed((0, start), (start + 1, stop)), after=())
