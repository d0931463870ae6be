"""H3 language models: state spaces between gates, some blocks attending instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flash_inference.filters import DiagonalFilter
from flash_inference.mixers.attention import Attention, AttentionConfig, Rotary
from flash_inference.mixers.mixer import Mixer
from flash_inference.mixers.modal import ModalConv
from flash_inference.mixers.shift import ShiftSSM
from flash_inference.models.block import Block, BlockPast
from flash_inference.models.config import ModelConfig
from flash_inference.models.heads import ORDERS, contract, outer
from flash_inference.models.mlp import MLP
from flash_inference.models.residual import MixerBlock, PreNorm


@dataclass(frozen=True, slots=True)
class H3Config(ModelConfig):
    """An H3 language model. Its state spaces know no longest sequence: `length` bounds what is asked of it.

    shift: inputs that the shift state space remembers. modes: complex modes of the diagonal one, `copies` of whose
    poles are shared by channels in turn (0: one each), sampled by `discretization`. head_width: keys and values meet in
    outer products of heads so wide; `order` is that of the outputs before the last map. attention: the blocks, by
    number, that attend instead, with `heads` heads, the first `rotary` places of each turned by position.
    """

    family: ClassVar[str] = "h3"
    length_key: ClassVar[str] = "l_max"

    inner: int = 0
    shift: int = 64
    modes: int = 32
    copies: int = 0
    discretization: str = "bilinear"
    head_width: int = 1
    order: str = "head-place"
    attention: tuple[int, ...] = ()
    heads: int = 1
    rotary: int = 0
    norm_eps: float = 1e-5

    def ranges(self) -> dict[str, bool]:
        """Whether each field that has a range lies in it."""
        return ModelConfig.ranges(self) | {
            "inner": self.inner >= 0,
            "shift": self.shift >= 1,
            "modes": self.modes >= 1,
            "head_width": self.head_width >= 1 and self.width % self.head_width == 0,
            "order": self.order in ORDERS,
            "attention": all(0 <= block < self.layers for block in self.attention),
        }

    def blocks(self) -> list[Block]:
        """`layers` blocks, those of `attention` with attention."""
        return [
            PreNorm(
                self.final_norm(), self.operator(i), self.final_norm(), MLP(self.width, self.inner or 4 * self.width)
            )
            for i in range(self.layers)
        ]

    def operator(self, block: int) -> Block:
        """What mixes along time in a block."""
        if block not in self.attention:
            return H3(self)
        rotary = Rotary(width=self.rotary) if self.rotary else None
        config = AttentionConfig(self.width, self.heads, rotary=rotary, qkv_bias=True, out_bias=True)
        return MixerBlock(Attention(config))

    def final_norm(self) -> nn.Module:
        """A LayerNorm."""
        return nn.LayerNorm(self.width, eps=self.norm_eps)


class H3(Block):
    """out(q * diagonal(shift(k) * v)): gates around two state spaces, both of which decode as they are defined.

    With heads of width d, shift(k) and v meet in outer products, d x d for each head, which the diagonal state space of
    the head runs over; q contracts the first axis. `skip` [D / d] is the diagonal state space's. Cost per position: D
    shift multiply-adds and 4 D d modes. Source: Fu et al., Hungry Hungry Hippos (2022), arXiv 2212.14052, section 3.
    """

    def __init__(self, config: H3Config) -> None:
        super().__init__()
        D, d = config.width, config.head_width
        self.head_width, self.order = d, config.order
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))
        self.shift = ShiftSSM(D, config.shift)
        filter = DiagonalFilter(
            D // d, config.length, modes=config.modes, copies=config.copies, discretization=config.discretization
        )
        self.diagonal = ModalConv(D * d, filter, skip=False)
        self.skip = nn.Parameter(torch.randn(D // d))
        self.out_proj = nn.Linear(D, D)

    @property
    def mixers(self) -> Sequence[Mixer[Any]]:
        """The shift and the diagonal state space."""
        return (self.shift, self.diagonal)

    @property
    def activations(self) -> int:
        """Those of the linear layers, and the outer products before and after the diagonal state space."""
        return 8 * self.out_proj.in_features + 3 * self.diagonal.channels

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        kv = outer(self.shift(self.k_proj(x)), self.v_proj(x), self.head_width)
        return self.join(x, kv, self.diagonal(kv))

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        k = self.shift.extend(past.pasts[0], self.k_proj(x), past.moment)
        kv = outer(k, self.v_proj(x), self.head_width)
        return self.join(x, kv, self.diagonal.extend(past.pasts[1], kv, past.moment))

    def join(self, x: Tensor, kv: Tensor, z: Tensor) -> Tensor:
        """What the queries of x [B, N, D] take of the outer products kv and of the state z [B, N, D d]."""
        z = z + self.skip.to(z.dtype).repeat_interleave(self.head_width**2) * kv
        return self.out_proj(contract(self.q_proj(x), z, self.head_width, self.order))
