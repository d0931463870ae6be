"""One filter for several channels."""

from __future__ import annotations

from torch import Tensor

from flash_inference.filters.filter import Filter


class SharedFilter:
    """Another filter's channels, each `times` times in a row. Holds no taps of its own: `taps` repeats them."""

    def __init__(self, filter: Filter, times: int) -> None:
        self.filter, self.times = filter, times
        self.channels, self.length = filter.channels * times, filter.length

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n]."""
        return self.filter.taps(n, start).repeat_interleave(self.times, dim=0)[channels]
