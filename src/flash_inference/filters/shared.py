"""One filter for several channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flash_inference.filters.filter import Filter


@dataclass(frozen=True, slots=True)
class SharedFilter:
    """Another filter's channels, each `times` times in a row. Holds no taps of its own; `taps` repeats them."""

    filter: Filter
    times: int

    @property
    def channels(self) -> int:
        """Channels, repeated ones counted."""
        return self.filter.channels * self.times

    @property
    def length(self) -> int:
        """The filter's."""
        return self.filter.length

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n]."""
        return self.filter.taps(n, start).repeat_interleave(self.times, dim=0)[channels]
