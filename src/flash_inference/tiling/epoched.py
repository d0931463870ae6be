"""Epoched: one tall tile per epoch, lazy inside."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .tile import Rectangle, Span
from .triangle import Triangle, require


@dataclass(frozen=True, repr=False)
class Epoched(Triangle):
    """After every `epoch` positions the whole past is paid to the next epoch; inside an epoch, rows.

    After position t, n = t + 1: if epoch divides n, sources [max(0, n - taps + 1), n) to targets [n, n + epoch);
    otherwise sources [start of the epoch, n) to target n. epoch: None for sqrt(N log2 N), N the smaller of length and
    taps, to the nearest multiple of 8. Cost: O(L^1.5 sqrt(log L)) by FFT. Source: Agarwal et al., "FutureFill",
    arXiv 2410.03766.
    """

    epoch: int | None = None

    def __post_init__(self) -> None:
        Triangle.__post_init__(self)
        if self.epoch is None:
            ideal = math.sqrt(self.limit * math.log2(max(2, self.limit)))
            object.__setattr__(self, "epoch", max(1, round(ideal / 8) * 8 if ideal >= 8 else round(ideal)))
        require("Epoched", "epoch", self._epoch, minimum=1)

    @property
    def _epoch(self) -> int:
        assert self.epoch is not None
        return self.epoch

    @property
    def block(self) -> int:
        """1: only (t, t) is inline."""
        return 1

    @property
    def reach(self) -> tuple[int, int]:
        """The longest lag back, one epoch ahead."""
        return self.limit - 1, min(self._epoch, self.limit - 1)

    def after(self, position: int) -> tuple[Rectangle, ...]:
        """The tall tile at the end of an epoch, a row inside one."""
        n = self.check(position) + 1
        passed = n % self._epoch
        return self.needed((n - passed, n), (n, n + 1)) if passed else self.needed((0, n), (n, n + self._epoch))

    def span(self, start: int, n: int) -> Span:
        """Two rectangles before: the rest of the epoch, and what lies beyond it; one after: of the last epoch's end."""
        stop = self.check_span(start, n)
        first = start - start % self._epoch
        end = first + self._epoch
        inside = self.needed((first, start), (start + 1, min(stop, end)))
        beyond = self.needed((0, start), (end, stop))
        last = (stop - 1) - (stop - 1) % self._epoch
        after = self.needed((0, last), (stop, last + self._epoch)) if last > start else ()
        return Span(start, stop, inside + beyond, after)
