"""The short convolution: a few taps per channel, with bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShortConv(nn.Module):
    """s[t] = bias + sum over k < taps of weight[:, taps - 1 - k] u[t - k]: the last weight multiplies the newest input.

    Depthwise and causal; positions before the first count as zero inputs. Its state `pending` [taps - 1, B, C] is what
    the past owes the next positions, bias included.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.channels, self.taps = channels, taps
        bound = taps**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, u: Tensor) -> Tensor:
        """The whole sequence: u [B, L, C] -> [B, L, C]."""
        padded = nn.functional.pad(u.transpose(1, 2), (self.taps - 1, 0))
        return nn.functional.conv1d(padded, self.weight, self.bias, groups=self.channels).transpose(1, 2)

    def init(self, batch: int) -> Tensor:
        """The state of an empty past: the bias alone."""
        return self.bias.detach().expand(self.taps - 1, batch, -1).clone()

    def extend(self, pending: Tensor, u: Tensor) -> Tensor:
        """The next N positions u [B, N, C] -> [B, N, C], exact anywhere; `pending` is advanced in place."""
        N, edge = u.shape[1], self.taps - 1
        padded = nn.functional.pad(u.transpose(1, 2), (edge, edge))
        sums = nn.functional.conv1d(padded, self.weight, self.bias, groups=self.channels).transpose(1, 2)
        if edge:
            sums = torch.cat([sums[:, :edge] + (pending - self.bias).transpose(0, 1), sums[:, edge:]], dim=1)
            pending.copy_(sums[:, N:].transpose(0, 1))
        return sums[:, :N]
