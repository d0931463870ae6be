"""A filter stored tap by tap."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExplicitFilter(nn.Module):
    """rho[c, k] is a parameter: `channels * length` numbers, scaled so that random taps keep unit variance."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.channels, self.length = channels, length
        self.rho = nn.Parameter(torch.randn(channels, length) / length**0.5)

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n]."""
        return self.rho[channels, start : start + n]
