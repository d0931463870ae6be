"""H3 with long convolutions in the place of its state spaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from flash_inference.models.block import Block, BlockPast, Convolutions
from flash_inference.models.h3 import H3Config
from flash_inference.models.hyena import FilterConfig
from flash_inference.ops.causal_conv import causal_conv


@dataclass(frozen=True, slots=True)
class H3ConvConfig(H3Config):
    """H3 with filters of `length` taps, which is the longest sequence the model can run. Heads are of width 1."""

    family: ClassVar[str] = "h3-conv"
    length_key: ClassVar[str] = ""

    filter: FilterConfig = field(default_factory=lambda: FilterConfig("squashed"))

    def operator(self, block: int) -> Block:
        """What mixes along time in a block."""
        return H3Config.operator(self, block) if block in self.attention else H3Conv(self)


class H3Conv(Block):
    """out(q * (second conv ((first conv k) * v))): H3's gates around two long convolutions, each with a skip term.

    Source: Fu et al., Simple Hardware-Efficient Long Convolutions (2023), arXiv 2302.06646, section 4.
    """

    def __init__(self, config: H3ConvConfig) -> None:
        super().__init__()
        D = config.width
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))
        self.first, self.second = (LongFilter(config) for _ in range(2))
        self.out_proj = nn.Linear(D, D)

    @property
    def convolutions(self) -> Sequence[Convolutions]:
        """The convolution of the keys, and that of keys times values."""
        D = self.out_proj.in_features
        return tuple(Convolutions(part.filter, D, part.skip) for part in (self.first, self.second))

    @property
    def activations(self) -> int:
        """Those of the linear layers, and the convolutions' inputs and outputs."""
        return 12 * self.out_proj.in_features

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        kv = self.first(self.k_proj(x)) * self.v_proj(x)
        return self.out_proj(self.q_proj(x) * self.second(kv))

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        kv = past.mix(0, self.k_proj(x)) * self.v_proj(x)
        return self.out_proj(self.q_proj(x) * past.mix(1, kv))


class LongFilter(nn.Module):
    """A filter and a skip term [D], and their convolution with a whole sequence."""

    def __init__(self, config: H3ConvConfig) -> None:
        super().__init__()
        self.filter = config.filter.build(config.width, config.length)
        self.skip = nn.Parameter(torch.randn(config.width))

    def forward(self, y: Tensor) -> Tensor:
        """y [B, L, D] -> [B, L, D], by FFT."""
        return causal_conv(y.mT, self.filter.taps(y.shape[1])).mT + self.skip.to(y.dtype) * y
