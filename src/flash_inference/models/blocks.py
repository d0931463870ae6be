"""The blocks that models are composed of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flash_inference.errors import ModelError
from flash_inference.filters import FILTERS
from flash_inference.mixers.short_conv import ShortConv
from flash_inference.models.config import HyenaConfig
from flash_inference.ops.causal_conv import causal_conv


class Hyena(nn.Module):
    """The Hyena operator of order N: x_0 * (k_{N-2} conv (.. x_{N-2} * (k_0 conv (x_{N-1} * v)))), gates and filters.

    u = W_in x, a depthwise short convolution, split into x_0, .., x_{N-1}, v; then for i = N-1 down to 1:
    v <- k_o * (x_i v) + skip_o (x_i v) with o = 0, 1, ..; output W_out (x_0 v). Filters are [(N-1) D, taps], laid out
    (order, channel). Source: Poli et al., Hyena Hierarchy (2023), arXiv 2302.10866, definition 3.1.
    """

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        D, N = config.width, config.order
        if config.filter.kind not in FILTERS:
            raise ModelError(f"filter kind {config.filter.kind!r} is unknown; expected one of {', '.join(FILTERS)}.")
        self.width, self.order = D, N
        self.in_proj = nn.Linear(D, (N + 1) * D)
        self.short = ShortConv((N + 1) * D, config.short_taps)
        self.filter = FILTERS[config.filter.kind]((N - 1) * D, config.length, **config.filter.settings())
        self.skip = nn.Parameter(torch.randn((N - 1) * D))
        self.out_proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """The whole sequence at once: x [B, L, D] -> [B, L, D]."""
        D, N, L = self.width, self.order, x.shape[1]
        *gates, v = self.short(self.in_proj(x)).transpose(1, 2).split(D, dim=1)
        rho = self.filter.taps(L).unflatten(0, (N - 1, D))
        skip = self.skip.unflatten(0, (N - 1, D))[..., None]
        for o, gate in enumerate(reversed(gates[1:])):
            y = gate * v
            v = causal_conv(y, rho[o]) + skip[o].to(y.dtype) * y
        return self.out_proj((gates[0] * v).transpose(1, 2))

    def extend(self, x: Tensor, mix: Callable[[int, Tensor], Tensor], pending: Tensor, alive: Tensor | None) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D].

        `mix(o, y)` is long convolution o, `pending` the short convolution's state.
        `alive` [B, N] marks the positions at or after each row's start (None: all): what enters the short
        convolution before a start is zeroed, since biases refill padded inputs.
        """
        u = self.in_proj(x)
        if alive is not None:
            u = u * alive[..., None].to(u.dtype)
        *gates, v = self.short.extend(pending, u).split(self.width, dim=2)
        for o, gate in enumerate(reversed(gates[1:])):
            v = mix(o, gate * v)
        return self.out_proj(gates[0] * v)


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh form of GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., D]."""
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): the pre-norm residual block."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mixer = Hyena(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        x = x + self.dropout(self.mixer(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def extend(self, x: Tensor, mix: Callable[[int, Tensor], Tensor], pending: Tensor, alive: Tensor | None) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        x = x + self.mixer.extend(self.norm1(x), mix, pending, alive)
        return x + self.mlp(self.norm2(x))
