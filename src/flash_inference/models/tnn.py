"""Toeplitz neural networks: gated long convolutions whose filters are networks of the relative position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from flash_inference.models.block import Block, Convolutions
from flash_inference.models.config import ModelConfig
from flash_inference.models.convolving import Convolving, Mix
from flash_inference.models.hyena import FilterConfig
from flash_inference.models.mlp import ACTIVATIONS, GatedMLP, activation_of
from flash_inference.models.norms import PlainRMSNorm
from flash_inference.models.residual import PreNorm

NORMS = {"simplermsnorm": PlainRMSNorm, "layernorm": nn.LayerNorm}


@dataclass(frozen=True, slots=True)
class TNNConfig(ModelConfig):
    """A Toeplitz network. Its filters are defined at every lag; `length` is how many positions it is made for.

    `expanded` is the width of the convolutions, `inner` that of the MLP. `norm` and `last_norm` are names of NORMS, the
    latter of the norm before the head. The embedding is multiplied by `embedding_scale` (0: the root of the width).
    `heads` is how many groups the channels of a published filter lie in: nothing is computed by group.
    """

    family: ClassVar[str] = "tnn"
    length_key: ClassVar[str] = "max_target_positions"

    heads: int = 1
    expanded: int = 0
    inner: int = 0
    activation: str = "silu"
    mlp_activation: str = "silu"
    norm: str = "simplermsnorm"
    last_norm: str = "simplermsnorm"
    filter: FilterConfig = field(default_factory=lambda: FilterConfig("relative"))
    embedding_scale: float = 1.0

    def ranges(self) -> dict[str, bool]:
        """Whether each field that has a range lies in it."""
        own = {
            "heads": self.heads >= 1,
            "expanded": self.expanded >= 0 and (self.expanded or 3 * self.width) % self.heads == 0,
            "inner": self.inner >= 0,
            "activation": self.activation in ACTIVATIONS,
            "mlp_activation": self.mlp_activation in ACTIVATIONS,
            "norm": self.norm in NORMS,
            "last_norm": self.last_norm in NORMS,
            "embedding_scale": self.embedding_scale >= 0,
        }
        return ModelConfig.ranges(self) | own

    def embedding(self) -> nn.Embedding:
        """An embedding that is scaled as it is read: a tied head has the weights as they are."""
        return ScaledEmbedding(self.vocab_size, self.width, self.embedding_scale or math.sqrt(self.width))

    def blocks(self) -> list[Block]:
        """`layers` blocks of one kind."""
        D, norm = self.width, NORMS[self.norm]
        inner, a = self.inner or self.width, self.mlp_activation
        return [
            PreNorm(norm(D), GatedToeplitz(self), norm(D), GatedMLP(D, inner, activation=a, bias=True), self.dropout)
            for _ in range(self.layers)
        ]

    def final_norm(self) -> nn.Module:
        """As `last_norm` says."""
        return NORMS[self.last_norm](self.width)


class ScaledEmbedding(nn.Embedding):
    """scale * weight[token]."""

    def __init__(self, count: int, width: int, scale: float) -> None:
        super().__init__(count, width)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [B, L] -> [B, L, D]."""
        return self.scale * super().forward(input)


class GatedToeplitz(Convolving):
    """out(a(gate(x)) * (rho * a(value(x)))): the gated Toeplitz unit, without a skip term.

    Source: Qin et al., Toeplitz Neural Network for Sequence Modeling (2023), arXiv 2305.04749, section 3.3.
    """

    def __init__(self, config: TNNConfig) -> None:
        super().__init__()
        D, channels = config.width, config.expanded or 3 * config.width
        self.gate, self.value, self.out = nn.Linear(D, channels), nn.Linear(D, channels), nn.Linear(channels, D)
        self.filter = config.filter.build(channels, config.length)
        self.activation = activation_of(config.activation)

    @property
    def convolutions(self) -> Sequence[Convolutions]:
        """One, as wide as the unit."""
        return (Convolutions(self.filter, self.filter.channels),)

    def compute(self, x: Tensor, mix: Mix) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        return self.out(self.activation(self.gate(x)) * mix(0, self.activation(self.value(x))))
