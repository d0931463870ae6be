"""What a filter is: taps on demand."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Filter(Protocol):
    """rho [channels, length]. Tap k does not depend on how many taps are asked for, so that prefixes agree."""

    channels: int
    length: int

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n]; start + n is at most the length."""
        ...
