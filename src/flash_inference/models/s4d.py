"""S4D language models: a diagonal state space a channel, then a nonlinearity and a linear map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from flash_inference.errors import ModelError
from flash_inference.filters import Modal
from flash_inference.mixers.mixer import Mixer
from flash_inference.mixers.modal import ModalConv
from flash_inference.models.block import Block, BlockPast
from flash_inference.models.config import ModelConfig
from flash_inference.models.hyena import FilterConfig
from flash_inference.models.mlp import MLP
from flash_inference.models.residual import PreNorm

JOINS = ("linear", "glu")


@dataclass(frozen=True, slots=True)
class S4DConfig(ModelConfig):
    """An S4D language model. Its state spaces know no longest sequence: `length` bounds what is asked of it.

    `filter` is of a kind that is a sum of modes ("s4d", "diagonal", "modal", "real-modal"). `join` says what follows: a
    "linear" map, or a "glu", which gates one half of a linear map by the other.
    """

    family: ClassVar[str] = "s4d"
    length_key: ClassVar[str] = "l_max"

    inner: int = 0
    filter: FilterConfig = field(default_factory=lambda: FilterConfig("s4d"))
    join: str = "linear"
    norm_eps: float = 1e-5

    def ranges(self) -> dict[str, bool]:
        """Whether each field that has a range lies in it."""
        return ModelConfig.ranges(self) | {"inner": self.inner >= 0, "join": self.join in JOINS}

    def blocks(self) -> list[Block]:
        """`layers` blocks of one kind."""
        D, inner = self.width, self.inner or 4 * self.width
        return [
            PreNorm(self.final_norm(), S4D(self), self.final_norm(), MLP(D, inner), self.dropout)
            for _ in range(self.layers)
        ]

    def final_norm(self) -> nn.Module:
        """A LayerNorm."""
        return nn.LayerNorm(self.width, eps=self.norm_eps)


class S4D(Block):
    """out(gelu(h * x + skip x)), h a sum of modes a channel, which runs as a recurrence of S complex numbers.

    Source: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models (2022), arXiv
    2206.11893.
    """

    def __init__(self, config: S4DConfig) -> None:
        super().__init__()
        D = config.width
        filter = config.filter.build(D, config.length)
        if not isinstance(filter, Modal):
            raise ModelError(f"filter kind {config.filter.kind!r} is no sum of modes. Use a Hyena or LongConv family.")
        self.long = ModalConv(D, filter)
        self.join = config.join
        self.out_proj = nn.Linear(D, 2 * D if config.join == "glu" else D)

    @property
    def mixers(self) -> Sequence[Mixer[Any]]:
        """The state space."""
        return (self.long,)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        return self.joined(self.long(x))

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        return self.joined(self.long.extend(past.pasts[0], x, past.moment))

    def joined(self, z: Tensor) -> Tensor:
        """What follows the state space, by position."""
        y = self.out_proj(nn.functional.gelu(z))
        return nn.functional.glu(y) if self.join == "glu" else y
