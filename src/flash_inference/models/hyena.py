"""Hyena language models: gated long convolutions with filters given by a small network, or tap by tap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flash_inference.errors import ModelError
from flash_inference.filters import FILTERS, Filter
from flash_inference.mixers.short_conv import ShortConv
from flash_inference.models.block import Block, BlockPast, Convolutions
from flash_inference.models.config import ModelConfig
from flash_inference.models.mlp import MLP
from flash_inference.models.residual import PreNorm
from flash_inference.ops.causal_conv import causal_conv


@dataclass(frozen=True, slots=True)
class FilterConfig:
    """How a layer's filter is given: `kind` names a class of `filters.FILTERS`.

    The fields are the settings of kind "implicit" (sine MLP and window). `options` are those of any other kind, by the
    names of its class's arguments: FilterConfig("squashed", options={"threshold": 0.2}). Raises ModelError.
    """

    kind: str = "implicit"
    width: int = 64
    features: int = 5
    inner: int = 2
    frequency: float = 10.0
    modulate: bool = True
    shift: float = 0.0
    fast_decay: float = 0.3
    slow_decay: float = 1.5
    positions: str = "rebuilt"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in FILTERS:
            raise ModelError(f"filter kind {self.kind!r} is unknown; expected one of {', '.join(FILTERS)}.")
        if self.options and self.kind == "implicit":
            raise ModelError(
                f"options {self.options} are given for kind 'implicit', whose settings are the other fields."
            )

    def settings(self) -> dict[str, Any]:
        """The arguments that the filter class of this kind takes."""
        values = dataclasses.asdict(self)
        kind, options = values.pop("kind"), values.pop("options")
        return values if kind == "implicit" else options

    def build(self, channels: int, length: int) -> Filter:
        """The filter, with fresh weights."""
        try:
            return FILTERS[self.kind](channels, length, **self.settings())
        except TypeError as error:
            raise ModelError(
                f"options {self.options} make no filter of kind {self.kind!r}: {error}. Compare with the arguments of "
                f"{FILTERS[self.kind].__name__}."
            ) from None


@dataclass(frozen=True, slots=True)
class HyenaConfig(ModelConfig):
    """A Hyena language model. `length` is the filter length, hence the longest sequence the model can run."""

    family: ClassVar[str] = "hyena"

    order: int = 2
    inner: int = 0
    short_taps: int = 3
    filter: FilterConfig = field(default_factory=FilterConfig)
    norm_eps: float = 1e-5

    def ranges(self) -> dict[str, bool]:
        """Whether each field that has a range lies in it."""
        own = {"order": self.order >= 2, "inner": self.inner >= 0, "short_taps": self.short_taps >= 1}
        return ModelConfig.ranges(self) | own

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's hidden layer: `inner`, or 4 x width where inner is 0."""
        return self.inner or 4 * self.width

    def blocks(self) -> list[Block]:
        """`layers` blocks of one kind."""
        return [HyenaBlock(self) for _ in range(self.layers)]

    def final_norm(self) -> nn.Module:
        """A LayerNorm."""
        return nn.LayerNorm(self.width, eps=self.norm_eps)


class Hyena(Block):
    """The Hyena operator of order N: x_0 * (k_{N-2} conv (.. x_{N-2} * (k_0 conv (x_{N-1} * v)))), gates and filters.

    u = W_in x, a depthwise short convolution, split into x_0, .., x_{N-1}, v; then for i = N-1 down to 1:
    v <- k_o * (x_i v) + skip_o (x_i v) with o = 0, 1, ..; output W_out (x_0 v). Filters are [(N-1) D, taps], laid out
    (order, channel). Source: Poli et al., Hyena Hierarchy (2023), arXiv 2302.10866, definition 3.1.
    """

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        D, N = config.width, config.order
        self.width, self.order = D, N
        self.in_proj = nn.Linear(D, (N + 1) * D)
        self.short = ShortConv((N + 1) * D, config.short_taps)
        self.filter = config.filter.build((N - 1) * D, config.length)
        self.skip = nn.Parameter(torch.randn((N - 1) * D))
        self.out_proj = nn.Linear(D, D)

    @property
    def convolutions(self) -> Sequence[Convolutions]:
        """N - 1 convolutions of width D."""
        return (Convolutions(self.filter, self.width, self.skip),)

    @property
    def mixers(self) -> Sequence[ShortConv]:
        """The short convolution."""
        return (self.short,)

    @property
    def activations(self) -> int:
        """The projection and its short convolution, twice each, and what is gated."""
        return 4 * (self.order + 1) * self.width + 4 * self.width

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

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        u = self.short.extend(past.pasts[0], self.in_proj(x), past.moment)
        *gates, v = u.split(self.width, dim=2)
        for o, gate in enumerate(reversed(gates[1:])):
            v = past.mix(o, gate * v)
        return self.out_proj(gates[0] * v)


class HyenaBlock(PreNorm):
    """A Hyena operator and a tanh-GELU MLP, each behind a LayerNorm: the block that the fused steps know."""

    mixer: Hyena
    mlp: MLP

    def __init__(self, config: HyenaConfig) -> None:
        D, eps = config.width, config.norm_eps
        norm1, mixer, norm2 = nn.LayerNorm(D, eps=eps), Hyena(config), nn.LayerNorm(D, eps=eps)
        super().__init__(norm1, mixer, norm2, MLP(D, config.mlp_width), config.dropout)
