"""Residual blocks around what mixes along time, and a block that is one mixer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from flash_inference.mixers.mixer import Mixer
from flash_inference.models.block import Block, BlockPast, Convolutions


class MixerBlock(Block):
    """A mixer that is a block by itself, such as attention."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.mixer = mixer

    @property
    def mixers(self) -> Sequence[Mixer[Any]]:
        """The mixer."""
        return (self.mixer,)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        return self.mixer(x)

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        return self.mixer.extend(past.pasts[0], x, past.moment)


class Residual(Block):
    """x + mixer(norm1(x)) around a block."""

    def __init__(self, norm1: nn.Module, mixer: Block, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.mixer = norm1, mixer
        self.dropout = nn.Dropout(dropout)

    @property
    def convolutions(self) -> Sequence[Convolutions]:
        """The inner block's."""
        return self.mixer.convolutions

    @property
    def mixers(self) -> Sequence[Mixer[Any]]:
        """The inner block's."""
        return self.mixer.mixers

    @property
    def activations(self) -> int:
        """The inner block's, and the residual stream."""
        return self.mixer.activations

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        return x + self.dropout(self.mixer(self.norm1(x)))

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        return x + self.mixer.extend(self.norm1(x), past)


class PreNorm(Residual):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)): the residual block around a block and what is by position."""

    def __init__(self, norm1: nn.Module, mixer: Block, norm2: nn.Module, mlp: nn.Module, dropout: float = 0.0) -> None:
        super().__init__(norm1, mixer, dropout)
        self.norm2, self.mlp = norm2, mlp

    @property
    def activations(self) -> int:
        """The wider of the mixer's peak and the MLP's."""
        linears = [module for module in self.mlp.modules() if isinstance(module, nn.Linear)]
        return max(self.mixer.activations, sum(linear.in_features + linear.out_features for linear in linears))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        x = super().forward(x)
        return x + self.dropout(self.mlp(self.norm2(x)))

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        x = super().extend(x, past)
        return x + self.mlp(self.norm2(x))
