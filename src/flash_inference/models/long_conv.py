"""Language models of plain long convolutions: safari's LongConv and SGConv, which differ in their filters alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from flash_inference.models.block import Block, Convolutions
from flash_inference.models.config import ModelConfig
from flash_inference.models.convolving import Convolving, Mix
from flash_inference.models.hyena import FilterConfig
from flash_inference.models.mlp import MLP
from flash_inference.models.residual import PreNorm

MIXINGS = ("glu", "linear")


@dataclass(frozen=True, slots=True)
class LongConvConfig(ModelConfig):
    """A long convolution language model. `length` is the filter length, hence the longest sequence the model can run.

    `heads` filters act on every channel of the width; `mixing` says how their outputs are joined: "linear", or "glu",
    which gates one half of a linear map by the other. `inner` is the width of the MLP's hidden layer.
    """

    family: ClassVar[str] = "long-conv"

    heads: int = 1
    mixing: str = "glu"
    inner: int = 0
    filter: FilterConfig = field(default_factory=lambda: FilterConfig("squashed"))
    norm_eps: float = 1e-5

    def ranges(self) -> dict[str, bool]:
        """Whether each field that has a range lies in it."""
        own = {"heads": self.heads >= 1, "mixing": self.mixing in MIXINGS, "inner": self.inner >= 0}
        return ModelConfig.ranges(self) | own

    def blocks(self) -> list[Block]:
        """`layers` blocks of one kind."""
        D, inner = self.width, self.inner or 4 * self.width
        return [
            PreNorm(self.final_norm(), LongConvMixer(self), self.final_norm(), MLP(D, inner), self.dropout)
            for _ in range(self.layers)
        ]

    def final_norm(self) -> nn.Module:
        """A LayerNorm."""
        return nn.LayerNorm(self.width, eps=self.norm_eps)


class LongConvMixer(Convolving):
    """out(gelu(rho * x + skip x)): each channel convolved with `heads` filters, joined by a linear map.

    Filters are [heads D, taps], laid out (head, channel). "glu" makes the map twice as wide and multiplies its first
    half by the sigmoid of its second. Source: Fu et al., Simple Hardware-Efficient Long Convolutions (2023), arXiv
    2302.06646; Li et al., What Makes Convolutional Models Great on Long Sequence Modeling? (2022), arXiv 2210.09298.
    """

    def __init__(self, config: LongConvConfig) -> None:
        super().__init__()
        D, channels = config.width, config.heads * config.width
        self.heads, self.mixing = config.heads, config.mixing
        self.filter = config.filter.build(channels, config.length)
        self.skip = nn.Parameter(torch.randn(channels))
        self.out = nn.Linear(channels, 2 * D if config.mixing == "glu" else D)

    @property
    def convolutions(self) -> Sequence[Convolutions]:
        """One, of width heads * D."""
        return (Convolutions(self.filter, self.filter.channels, self.skip),)

    def compute(self, x: Tensor, mix: Mix) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        y = self.out(nn.functional.gelu(mix(0, x.repeat(1, 1, self.heads))))
        return nn.functional.glu(y) if self.mixing == "glu" else y
