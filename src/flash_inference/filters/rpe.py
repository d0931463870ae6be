"""A filter given by an MLP of the relative position under an exponential decay: the Toeplitz neural network's."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from flash_inference.errors import FilterError
from flash_inference.filters.filter import check_choice, wide

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "elu": nn.functional.elu,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
}
NORMS = ("simplermsnorm", "layernorm")
DECAYS = ("none", "fixed", "learned")
CONNECTIONS = ("plain", "residual")
NORM_EPS = 1e-8


class RelativePositionFilter(nn.Module):
    """rho[c, k] = final(gamma_c^k * f(k)[c]), f an MLP of the number k

    f(k) = W_out a(N(x_S)) + b_out, x_0 = w_0 k + b_0, x_{i+1} = W_i a(N(x_i)) + b_i, plus x_i where `connection` is
    "residual". N is x / (||x|| / sqrt(width) + 1e-8) ("simplermsnorm") or LayerNorm, a the activation. gamma_c is 1 for
    decay "none", the stored constant `gamma` for "fixed", and lower + (1 - lower) sigmoid(gamma) of the stored `gamma`
    for "learned", lower being the argument gamma. The network is defined for every k; `length` is how many taps
    are prepared.

    Published as Tno with `rpe`, keys under `toep.`: `rpe.pos_proj.{weight, bias}` (width, 1), (width) are `embed`,
    `rpe.layers.i.2.*` (width, width) `linears.i`, `rpe.out.2.*` (h * dim, width) `out`; LayerNorms are
    `rpe.layers.i.0.*` and `rpe.out.0.*`, here `norms.i`; `gamma` (h, 1, dim), here [h * dim], comes with `use_decay`
    ("fixed") or `use_multi_decay` ("learned"). Linears published without biases have zero ones here. `par_type` 2 and
    3 divide the position by the input's length, so that their taps change as the sequence grows, and `normalize`
    divides by the same convolution of ones: both raise FilterError.
    Source: Qin et al., Toeplitz Neural Network for Sequence Modeling (2023), arXiv 2305.04749, section 3.2.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        width: int = 64,
        layers: int = 3,
        activation: str = "relu",
        norm: str = "simplermsnorm",
        connection: str = "plain",
        decay: str = "fixed",
        gamma: float = 0.99,
        final: str = "none",
        par_type: int = 1,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        check_choice("par_type", par_type, (1,), "Others depend on the input's length: no step could keep its past.")
        if normalize:
            raise FilterError(
                "filter setting normalize is True; expected False: it divides by a convolution of ones, which may "
                "vanish. Use a checkpoint trained without it."
            )
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_choice("final", final, tuple(ACTIVATIONS))
        check_choice("norm", norm, NORMS)
        check_choice("connection", connection, CONNECTIONS)
        check_choice("decay", decay, DECAYS)
        if not 0 <= gamma <= 1:
            raise FilterError(f"gamma is {gamma}; expected what a channel keeps from tap to tap, between 0 and 1.")
        self.channels, self.length = channels, length
        self.activation, self.final = ACTIVATIONS[activation], ACTIVATIONS[final]
        self.connection, self.decay, self.lower = connection, decay, float(gamma)
        self.embed = nn.Linear(1, width)
        self.linears = cast("list[nn.Linear]", nn.ModuleList(nn.Linear(width, width) for _ in range(layers)))
        self.out = nn.Linear(width, channels)
        count = layers + 1 if norm == "layernorm" else 0
        self.norms = cast("list[nn.LayerNorm]", nn.ModuleList(nn.LayerNorm(width) for _ in range(count)))
        if decay == "fixed":
            self.gamma = nn.Parameter(torch.full((channels,), self.lower), requires_grad=False)
        elif decay == "learned":
            self.gamma = nn.Parameter(torch.randn(channels))

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n]. O(n (layers width^2 + width channels))."""
        k = torch.arange(start, start + n, device=self.embed.weight.device)
        with torch.autocast(k.device.type, enabled=False):
            weight, bias = wide(self.embed.weight), wide(self.embed.bias)
            x = nn.functional.linear(k[:, None].to(weight.dtype), weight, bias)
            for i, linear in enumerate(self.linears):
                y = nn.functional.linear(self._activated(x, i), wide(linear.weight), wide(linear.bias))
                x = x + y if self.connection == "residual" else y
            h = self._activated(x, len(self.linears))
            rho = wide(self.out.weight[channels]) @ h.T + wide(self.out.bias[channels])[:, None]
            if self.decay != "none":
                rho = (self.rates()[channels, None] ** k).to(rho.dtype) * rho
        return self.final(rho)

    def rates(self) -> Tensor:
        """gamma [channels] in float64: what a channel keeps from one tap to the next."""
        gamma = self.gamma.double()
        return gamma if self.decay == "fixed" else self.lower + (1 - self.lower) * torch.sigmoid(gamma)

    def _activated(self, x: Tensor, i: int) -> Tensor:
        """a(N(x)) before linear map i, for x [n, width]."""
        if self.norms:
            norm = self.norms[i]
            x = nn.functional.layer_norm(x, norm.normalized_shape, wide(norm.weight), wide(norm.bias), norm.eps)
        else:
            x = x / (x.norm(dim=1, keepdim=True) * x.shape[1] ** -0.5 + NORM_EPS)
        return self.activation(x)
