"""H3's shift state space as a mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_inference.filters.shift import ShiftFilter
from flash_inference.mixers.fir import FiniteResponse


class ShiftSSM(FiniteResponse):
    """s[t] = (0, s[t-1][0], .., s[t-1][N - 2]) + B u[t]; z[t] = C . s[t] + skip u[t]: a state of the last N inputs.

    That is a finite response of N taps, the filter's, which is how it decodes: inputs are kept, rather than states.
    """

    def __init__(self, channels: int, order: int) -> None:
        super().__init__(channels, order)
        self.filter = ShiftFilter(channels, order, order=order)
        self.skip = nn.Parameter(torch.randn(channels))
        self.bias = None
        self._kernel: tuple[object, Tensor] | None = None

    def kernel(self) -> Tensor:
        """The filter's taps, backwards; formed anew when a parameter changes."""
        if torch.is_grad_enabled():
            return self.filter.taps(self.taps).flip(-1)[:, None]
        version = tuple((p.data_ptr(), p._version) for p in self.filter.parameters())
        if self._kernel is None or self._kernel[0] != version:
            self._kernel = (version, self.filter.taps(self.taps).flip(-1)[:, None])
        return self._kernel[1]

    @property
    def like(self) -> Tensor:
        """The skip term, which has the model's dtype: the filter's may be wider."""
        assert self.skip is not None
        return self.skip
