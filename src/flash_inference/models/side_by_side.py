"""The long convolutions of all blocks side by side, as channels of one filter whose taps are evaluated when needed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from flash_inference.filters import ImplicitFilter
from flash_inference.models.block import Convolutions


class SideBySide:
    """Filters under one another: `channels` in all, those of block i's convolution o being `lanes[i][o]`.

    `skip` [channels] are the skip terms in float32. Sequences have at most `length` positions: later taps are zero.
    """

    def __init__(self, blocks: Sequence[Sequence[Convolutions]], length: int, device: torch.device) -> None:
        groups = [group for of_block in blocks for group in of_block]
        self.length, self.filters = length, [group.filter for group in groups]
        self._firsts = [0, *accumulate(filter.channels for filter in self.filters)]
        self.channels: int = self._firsts[-1]
        self.lanes: list[list[range]] = []
        first = 0
        for of_block in blocks:
            widths = [group.width for group in of_block for _ in range(group.count)]
            ends = list(accumulate(widths, initial=first))
            self.lanes.append([range(begin, end) for begin, end in pairwise(ends)])
            first = ends[-1]
        with torch.inference_mode(False), torch.no_grad():
            self.skip = torch.zeros(self.channels, device=device)
            for group, begin in zip(groups, self._firsts, strict=False):
                if group.skip is not None:
                    self.skip[begin : begin + group.filter.channels] = group.skip
        self._hidden: dict[tuple[int, int, int], Tensor] = {}

    @torch.no_grad()
    def padded(self, first: int, stop: int, channels: range) -> Tensor:
        """Taps first .. stop - 1 of some channels as float32 [c, stop - first]: evaluated now, never kept.

        Zeros behind the end of a filter, and from `length` on.
        """
        parts = [self.skip.new_empty(0, stop - first)]
        for number, (begin, end) in enumerate(pairwise(self._firsts)):
            low, high = max(channels.start, begin), min(channels.stop, end)
            last = min(stop, self.length, self.filters[number].length)
            if low < high and first < last:
                rho = self._taps(number, first, last, slice(low - begin, high - begin)).float()
                parts.append(torch.nn.functional.pad(rho, (0, stop - last)) if last < stop else rho)
            elif low < high:
                parts.append(self.skip.new_zeros(high - low, stop - first))
        return torch.cat(parts)

    def _taps(self, number: int, first: int, stop: int, channels: slice) -> Tensor:
        """Chunks of a large tile ask for a few channels of one filter after the other: the hidden layer is kept."""
        filter = self.filters[number]
        if not isinstance(filter, ImplicitFilter):
            return filter.taps(stop - first, first, channels)
        key = (number, first, stop)
        if key not in self._hidden:
            while len(self._hidden) > 1:
                del self._hidden[next(iter(self._hidden))]
            self._hidden[key] = filter.hidden(stop - first, first)
        return filter.mixed(self._hidden[key], stop - first, first, channels)
