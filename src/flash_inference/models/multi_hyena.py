"""MultiHyena language models: heads that share a long filter, over outer products of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flash_inference.filters import Modal, SharedFilter
from flash_inference.mixers.mixer import Mixer
from flash_inference.mixers.modal import ModalConv
from flash_inference.mixers.short_conv import ShortConv
from flash_inference.models.block import Block, BlockPast, Convolutions
from flash_inference.models.config import ModelConfig
from flash_inference.models.heads import contract, outer
from flash_inference.models.hyena import FilterConfig
from flash_inference.models.mlp import MLP, GatedMLP
from flash_inference.models.norms import RMSNorm
from flash_inference.models.residual import PreNorm, Residual
from flash_inference.ops.causal_conv import causal_conv

NORMS = ("layer", "rms")
FEEDS = ("none", "gelu-tanh", "gated-gelu", "gated-silu")


@dataclass(frozen=True, slots=True)
class MultiHyenaConfig(ModelConfig):
    """A MultiHyena language model. `length` is the filter length, hence the longest sequence the model can run.

    heads: filters, each for an equal part of the width. projections: heads by which published projections are laid out,
    which changes nothing here but the way back. feed: what follows the operator in a block, "gelu-tanh" (an
    MLP), "gated-gelu", "gated-silu", or "none". norm: "layer", or "rms" with eps outside the root. mlp_norm: whether
    and which norm stands before the MLP, one of these or "none".
    """

    family: ClassVar[str] = "multi-hyena"

    heads: int = 1
    projections: int = 1
    inner: int = 0
    short_taps: int = 3
    filter: FilterConfig = field(default_factory=FilterConfig)
    feed: str = "gelu-tanh"
    norm: str = "layer"
    mlp_norm: str = "layer"
    norm_eps: float = 1e-5

    def ranges(self) -> dict[str, bool]:
        """Whether each field that has a range lies in it."""
        return ModelConfig.ranges(self) | {
            "heads": self.heads >= 1 and self.width % self.heads == 0,
            "inner": self.inner >= 0,
            "short_taps": self.short_taps >= 1,
            "feed": self.feed in FEEDS,
            "norm": self.norm in NORMS,
            "mlp_norm": self.mlp_norm in (*NORMS, "none"),
        }

    def blocks(self) -> list[Block]:
        """`layers` blocks of one kind."""
        if self.feed == "none":
            return [Residual(self.final_norm(), MultiHyena(self), self.dropout) for _ in range(self.layers)]
        return [
            PreNorm(self.final_norm(), MultiHyena(self), self.make_norm(self.mlp_norm), self.make_mlp(), self.dropout)
            for _ in range(self.layers)
        ]

    def make_mlp(self) -> nn.Module:
        """What follows the operator."""
        inner = self.inner or 4 * self.width
        if self.feed == "gelu-tanh":
            return MLP(self.width, inner)
        return GatedMLP(self.width, inner, activation=self.feed.removeprefix("gated-"))

    def make_norm(self, kind: str) -> nn.Module:
        """A norm of a kind."""
        if kind == "none":
            return nn.Identity()
        if kind == "layer":
            return nn.LayerNorm(self.width, eps=self.norm_eps)
        return RMSNorm(self.width, self.norm_eps, eps_place="outside")

    def final_norm(self) -> nn.Module:
        """A norm of the model's kind."""
        return self.make_norm(self.norm)


class MultiHyena(Block):
    """out(sum over a of q[a] (h * (k[a] v[b]) + skip k[a] v[b])) for every head: q, k, v short convolutions of in(x).

    A head is d = D / heads wide and has one filter h and one skip term, for its d x d products of k and v. Tiles pay D
    d channels, whose taps are the heads' repeated d^2 times. A filter that is a sum of modes runs as a recurrence.
    Source: Massaroli et al., Laughing Hyena Distillery (2023), arXiv 2310.18780, section 4.
    """

    def __init__(self, config: MultiHyenaConfig) -> None:
        super().__init__()
        D = config.width
        self.head_width = D // config.heads
        self.in_proj = nn.Linear(D, 3 * D)
        self.short = ShortConv(3 * D, config.short_taps)
        filter = config.filter.build(config.heads, config.length)
        self.skip = nn.Parameter(torch.randn(config.heads))
        self.recurrence, self.filter = None, None
        if isinstance(filter, Modal):
            self.recurrence = ModalConv(D * self.head_width, filter, skip=False)
        else:
            self.filter = filter
        self.out_proj = nn.Linear(D, D)

    @property
    def times(self) -> int:
        """Channels that share a filter."""
        return self.head_width**2

    @property
    def convolutions(self) -> Sequence[Convolutions]:
        """One, of width D d, unless the filter is a sum of modes."""
        if self.filter is None:
            return ()
        shared = SharedFilter(self.filter, self.times)
        return (Convolutions(shared, shared.channels, self.skip.repeat_interleave(self.times)),)

    @property
    def mixers(self) -> Sequence[Mixer[Any]]:
        """The short convolution, and the long one if its filter is a sum of modes."""
        return (self.short,) if self.recurrence is None else (self.short, self.recurrence)

    @property
    def activations(self) -> int:
        """The projections, and the products of keys and values before and after the convolution."""
        D = self.out_proj.in_features
        return 8 * D + 3 * D * self.head_width

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        q, k, v = self.short(self.in_proj(x)).chunk(3, dim=2)
        kv = outer(k, v, self.head_width)
        if self.recurrence is not None:
            return self.join(q, self.skipped(self.recurrence(kv), kv))
        assert self.filter is not None
        rho = SharedFilter(self.filter, self.times).taps(x.shape[1])
        return self.join(q, self.skipped(causal_conv(kv.mT, rho).mT, kv))

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        q, k, v = self.short.extend(past.pasts[0], self.in_proj(x), past.moment).chunk(3, dim=2)
        kv = outer(k, v, self.head_width)
        if self.recurrence is None:
            return self.join(q, past.mix(0, kv))
        return self.join(q, self.skipped(self.recurrence.extend(past.pasts[1], kv, past.moment), kv))

    def skipped(self, z: Tensor, kv: Tensor) -> Tensor:
        """The convolution's outputs z with the skip term added."""
        return z + self.skip.to(z.dtype).repeat_interleave(self.times) * kv

    def join(self, q: Tensor, z: Tensor) -> Tensor:
        """What queries q [B, N, D] take of z [B, N, D d]."""
        return self.out_proj(contract(q, z, self.head_width))
