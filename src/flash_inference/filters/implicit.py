"""A filter given by a small network of the position: Hyena's sine MLP under an exponential window."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn


class ImplicitFilter(nn.Module):
    """rho[:, k] = (W_f sin(f * (W_2 sin(f * (W_1 sin(f * (W_0 z_k + b_0)) + b_1)) + b_2))) * window_k

    z_k = [s, cos(f_b w_k), -sin(f_b w_k)] with s = k / (length - 1), w_k = 2 pi k / length and bands f_b from 1e-4
    to bands - 1; the positional features depend on `length` alone and are rebuilt, not stored. One frequency vector
    f is shared by all sines. window = exp(-s |delta_c|) + shift, with decay rates delta_c spread over the channels.
    Source: Poli et al., Hyena Hierarchy (2023), arXiv 2302.10866, section 3.3 and appendix D.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        width: int = 64,
        features: int = 5,
        inner: int = 2,
        frequency: float = 10.0,
        modulate: bool = True,
        shift: float = 0.0,
        fast_decay: float = 0.3,
        slow_decay: float = 1.5,
        target: float = 1e-2,
    ) -> None:
        super().__init__()
        self.channels, self.length, self.modulate, self.shift = channels, length, modulate, shift
        self.bands = (features - 1) // 2
        sizes = [features] + [width] * (inner + 1)
        self.linears = cast("list[nn.Linear]", nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes)))
        self.freq = nn.Parameter(torch.full((width,), float(frequency)))
        self.out = nn.Linear(width, channels, bias=False)
        slow, fast = math.log(target) / slow_decay, math.log(target) / fast_decay
        self.deltas = nn.Parameter(torch.linspace(slow, fast, channels), requires_grad=False)

    def features(self, n: int, start: int = 0) -> Tensor:
        """Positional features z of positions start .. start + n - 1, as [n, 1 + 2 bands], built in float64."""
        k = torch.arange(start, start + n, device=self.freq.device, dtype=torch.float64)[:, None]
        s = k / max(self.length - 1, 1)
        bands = torch.linspace(1e-4, max(self.bands - 1, 1e-4), self.bands, device=k.device, dtype=torch.float64)
        phase = bands * (2 * math.pi / self.length) * k
        return torch.cat([s, torch.cos(phase), -torch.sin(phase)], dim=1)

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n], in the parameters' dtype but at least float32.

        Cost O(n * (width^2 * inner + width * channels)). Tap k does not depend on n, so that prefixes agree.
        """
        return self.mixed(self.hidden(n, start), n, start, channels)

    def hidden(self, n: int, start: int = 0) -> Tensor:
        """The sine MLP's last hidden layer [n, width], which all channels share."""
        dtype = torch.float64 if self.freq.dtype == torch.float64 else torch.float32
        with torch.autocast(self.freq.device.type, enabled=False):
            h, freq = self.features(n, start).to(dtype), self.freq.to(dtype)
            for linear in self.linears:
                h = torch.sin(freq * nn.functional.linear(h, linear.weight.to(dtype), linear.bias.to(dtype)))
        return h

    def mixed(self, h: Tensor, n: int, start: int, channels: slice) -> Tensor:
        """Taps of some channels from the hidden layer at the same positions: a mixture of its columns, windowed."""
        with torch.autocast(self.freq.device.type, enabled=False):
            rho = self.out.weight[channels].to(h.dtype) @ h.T
            if self.modulate:
                k = torch.arange(start, start + n, device=h.device, dtype=torch.float64)
                s = k / max(self.length - 1, 1)
                window = torch.exp(-self.deltas[channels].to(torch.float64).abs()[:, None] * s) + self.shift
                rho = rho * window.to(h.dtype)
        return rho
