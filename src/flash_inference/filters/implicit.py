"""A filter given by a small network of the position: Hyena's sine MLP under an exponential window."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from flash_inference.errors import FilterError
from flash_inference.filters.filter import check_choice, check_span


class ImplicitFilter(nn.Module):
    """rho[:, k] = (W_f sin(f * (W_2 sin(f * (W_1 sin(f * (W_0 z_k + b_0)) + b_1)) + b_2))) * window_k

    z_k = [s, cos(f_b w_k), -sin(f_b w_k)] with s = k / (length - 1), w_k = 2 pi k / length and bands f_b from 1e-4 to
    bands - 1. One frequency vector f is shared by all sines. window = exp(-s |delta_c|) + shift, with decay rates
    delta_c spread over the channels. `positions` "rebuilt" computes z and s from `length` alone; "stored" reads `z`
    [length, features] and s = `t` [length] from the state, beginning as the computed ones: published models trained z.
    Stored positions end at `length` (LengthError), and must be float32 at least (FilterError): 16 bits cannot tell
    neighbouring positions apart.

    Published by safari and HyenaDNA under `filter_fn.`: `pos_emb.z` (1, l_max, emb_dim), `pos_emb.t` (1, l_max, 1);
    `implicit_filter.{0, 2, ..}.{weight, bias}` are `linears.i`, the last, bias-free one `out`; `implicit_filter.{1, 3,
    ..}.freq` (1, width), one tensor under several names, is `freq`; `modulation.deltas` (1, 1, C). `shift` is not
    stored: 0.05 for the published HyenaDNA weights, 0.0 for safari. MultiHyena has one channel a head:
    `filter.pos_emb.*`, `filter.implicit_filter.*`, `filter.final_filter.weight` (heads, width) as `out`,
    `filter.modulation.weight` (1, 1, heads) as `deltas`; its random features [cos(W t'), sin(W t')], t' from -1 to 1,
    are a stored z with s = (t' + 1) / 2. Filters `normalized` over their channels have no counterpart here.
    Source: Poli et al., Hyena Hierarchy (2023), arXiv 2302.10866, section 3.3 and appendix D; Massaroli et al.,
    Laughing Hyena Distillery (2023), arXiv 2310.18780, for heads.
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
        positions: str = "rebuilt",
    ) -> None:
        super().__init__()
        check_choice("positions", positions, ("rebuilt", "stored"))
        if positions == "rebuilt":
            check_odd(features)
        self.channels, self.length, self.modulate, self.shift = channels, length, modulate, shift
        self.bands = (features - 1) // 2
        sizes = [features] + [width] * (inner + 1)
        self.linears = cast("list[nn.Linear]", nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes)))
        self.freq = nn.Parameter(torch.full((width,), float(frequency)))
        self.out = nn.Linear(width, channels, bias=False)
        slow, fast = math.log(target) / slow_decay, math.log(target) / fast_decay
        self.deltas = nn.Parameter(torch.linspace(slow, fast, channels), requires_grad=False)
        self.z: nn.Parameter | None = None
        self.t: nn.Parameter | None = None
        if positions == "stored":
            # An even number of features has no computed counterpart: they begin at random.
            t, z = self.times(length), self.features(length) if features % 2 else torch.randn(length, features)
            self.z = nn.Parameter(z.to(self.freq.dtype))
            self.t = nn.Parameter(t.to(self.freq.dtype), requires_grad=False)

    def times(self, n: int, start: int = 0) -> Tensor:
        """s [n] of positions start .. start + n - 1 in float64: as stored, or from 0 to 1 over the filter's length."""
        if self.t is not None:
            return self._stored(self.t, n, start).double()
        k = torch.arange(start, start + n, device=self.freq.device, dtype=torch.float64)
        return k / max(self.length - 1, 1)

    def features(self, n: int, start: int = 0) -> Tensor:
        """Positional features z [n, features] of positions start .. start + n - 1: as stored, or built in float64."""
        if self.z is not None:
            return self._stored(self.z, n, start)
        s = self.times(n, start)[:, None]
        k = torch.arange(start, start + n, device=s.device, dtype=torch.float64)[:, None]
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
                s = self.times(n, start)
                window = torch.exp(-self.deltas[channels].to(torch.float64).abs()[:, None] * s) + self.shift
                rho = rho * window.to(h.dtype)
        return rho

    def _stored(self, table: Tensor, n: int, start: int) -> Tensor:
        """Rows start .. start + n - 1 of stored positions."""
        check_span(n, start, self.length)
        if table.dtype.itemsize < 4:
            raise FilterError(
                f"the filter's stored positions are {table.dtype}; expected float32 at least: 16 bits cannot tell "
                "neighbouring positions apart. Keep filters in float32: filter.float() before the weights are loaded."
            )
        return table[start : start + n]


def check_odd(features: int) -> None:
    """Raises FilterError unless computed positions have this many features: a time, and a pair for each band."""
    if features < 3 or features % 2 == 0:
        raise FilterError(
            f"features is {features}; expected an odd number, 3 or more: the time, then a cosine and a sine per band. "
            'Others need positions="stored".'
        )
