"""H3's shift state space: a state that remembers the last inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_inference.filters.filter import wide


class ShiftFilter(nn.Module):
    """rho[c, k] = sum over m of B[c, m] C[c, m + k] for k < order, then zeros: the state moves on by one a position.

    s[t] = (0, s[t-1][0], .., s[t-1][order - 2]) + B u[t], z[t] = C . s[t]. `B` and `C` are [channels, order].
    Source: Fu et al., Hungry Hungry Hippos (2022), arXiv 2212.14052, section 3.1.
    """

    def __init__(self, channels: int, length: int, *, order: int = 64) -> None:
        super().__init__()
        self.channels, self.length, self.order = channels, length, order
        bound = order**-0.5
        self.B = nn.Parameter(torch.zeros(channels, order).index_fill_(1, torch.tensor([0]), 1.0))
        self.C = nn.Parameter(torch.empty(channels, order).uniform_(-bound, bound))

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n]. O(n order) per channel."""
        B, C = wide(self.B[channels]), wide(self.C[channels])
        known = max(self.order - start, 0)
        later = nn.functional.pad(C[:, start:], (0, max(n, 1) + self.order - 1 - known))
        return (later.unfold(1, self.order, 1)[:, :n] * B[:, None]).sum(-1)
