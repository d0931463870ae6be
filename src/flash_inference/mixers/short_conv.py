"""The short convolution: a few taps per channel, with bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from flash_inference.mixers.mixer import Moment


@dataclass(slots=True)
class ShortPast:
    """`pending` [B, taps - 1, C]: what the inputs so far owe the next positions, bias included."""

    pending: Tensor


class ShortConv(nn.Module):
    """s[t] = bias + sum over k < taps of weight[:, taps - 1 - k] u[t - k]: the last weight multiplies the newest input.

    Depthwise and causal; positions before a row's first count as zero inputs.
    """

    decodes: ClassVar[str] = "FIR ring"
    replays: ClassVar[bool] = True

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

    def past_bytes(self, length: int) -> int:
        """Bytes of one row's past, whatever the length."""
        return (self.taps - 1) * self.channels * self.bias.itemsize

    def init(self, batch: int, length: int = 0) -> ShortPast:
        """An empty past: the bias alone, for any number of positions."""
        return ShortPast(self.bias.detach().expand(batch, self.taps - 1, -1).clone())

    def extend(self, past: ShortPast, u: Tensor, moment: Moment) -> Tensor:
        """The next N positions u [B, N, C] -> [B, N, C], exact anywhere; `past` is advanced in place.

        What enters before a row's start is zeroed here, since the biases of earlier layers refill padded inputs.
        """
        (batch, N, _), edge = u.shape, self.taps - 1
        u = moment.enter(past, u)
        if N == 1:
            owed = torch.cat([past.pending, self.bias.expand(batch, 1, -1)], dim=1)
            owed = torch.addcmul(owed, u, self.weight[:, 0].T.flip(0))
            past.pending.copy_(owed[:, 1:])
            return owed[:, :1]
        padded = nn.functional.pad(u.transpose(1, 2), (edge, edge))
        sums = nn.functional.conv1d(padded, self.weight, self.bias, groups=self.channels).transpose(1, 2)
        if edge:
            sums = torch.cat([sums[:, :edge] + (past.pending - self.bias), sums[:, edge:]], dim=1)
            past.pending.copy_(sums[:, N:])
        return sums[:, :N]
