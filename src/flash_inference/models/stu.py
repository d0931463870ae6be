"""Spectral transform units, alternating with attention: Flash STU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from flash_inference.filters.spectral import HANKELS, SpectralBank, SpectralFilter, stored_basis
from flash_inference.mixers.attention import Attention, AttentionConfig
from flash_inference.models.block import Block, BlockPast, Convolutions
from flash_inference.models.config import ModelConfig
from flash_inference.models.convolving import Convolving, Mix
from flash_inference.models.mlp import ACTIVATIONS, GatedMLP
from flash_inference.models.residual import MixerBlock, PreNorm

KINDS = ("stu", "attention")
FORMS = ("tensordot", "exact")


@dataclass(frozen=True, slots=True)
class STUConfig(ModelConfig):
    """A model of spectral transform units. `length` is how many rows the basis phi has: no later tap exists.

    `pattern` names the mixers of the first layers, "stu" or "attention", and begins again behind its end. `count` is
    the number of eigenvectors; `hankel` the matrix that they belong to; `form` is "tensordot", one filter a channel, or
    "exact", a matrix for every eigenvector. `expanded` is the width inside which units work, behind a linear map and
    SiLU (0: the model's own, and no map). Attention sees the newest `window` positions, scores capped at `softcap` (0:
    not capped), then lowered by ALiBi of slopes times `slope_scale`.
    """

    family: ClassVar[str] = "stu"

    pattern: tuple[str, ...] = ("stu",)
    count: int = 24
    hankel: str = "Z"
    form: str = "tensordot"
    expanded: int = 0
    inner: int = 0
    activation: str = "gelu-tanh"
    heads: int = 8
    window: int = 1025
    softcap: float = 50.0
    slope_scale: float = 0.25
    norm_eps: float = 1e-6

    def ranges(self) -> dict[str, bool]:
        """Whether each field that has a range lies in it."""
        own = {
            "pattern": len(self.pattern) > 0 and all(kind in KINDS for kind in self.pattern),
            "count": 1 <= self.count <= self.length,
            "hankel": self.hankel in HANKELS,
            "form": self.form in FORMS,
            "expanded": self.expanded >= 0,
            "inner": self.inner >= 0,
            "activation": self.activation in ACTIVATIONS,
            "softcap": self.softcap >= 0,
        }
        return ModelConfig.ranges(self) | own

    def blocks(self) -> list[Block]:
        """A block for each layer. All units share one basis."""
        phi = nn.Parameter(stored_basis(self.length, self.count, self.hankel, None), requires_grad=False)
        blocks: list[Block] = []
        for layer in range(self.layers):
            mixer = MixerBlock(Attention(self.attention())) if self.kind(layer) == "attention" else self.unit(phi)
            mlp = GatedMLP(self.width, self.inner or 12 * self.width, activation=self.activation)
            blocks.append(PreNorm(self.final_norm(), mixer, self.final_norm(), mlp, self.dropout))
        return blocks

    def kind(self, layer: int) -> str:
        """What the pattern says of a layer."""
        return self.pattern[layer % len(self.pattern)]

    def unit(self, phi: nn.Parameter) -> Block:
        """One unit, on the basis phi."""
        D = self.expanded or self.width
        unit = (TensordotSTU if self.form == "tensordot" else ExactSTU)(self, D, phi)
        return Sandwich(self.width, D, unit) if self.expanded else unit

    def attention(self) -> AttentionConfig:
        """The attention of all attention layers."""
        slopes = tuple(self.slope_scale * slope for slope in alibi_slopes(self.heads))
        cap = self.softcap or None
        return AttentionConfig(self.width, self.heads, alibi=slopes, window=self.window, softcap=cap)

    def final_norm(self) -> nn.Module:
        """A root mean square norm, eps inside the root."""
        return nn.RMSNorm(self.width, eps=self.norm_eps)


class TensordotSTU(Convolving):
    """rho * (W x), rho = 2 phi M on even lags: both branches of an approximate unit as one strided convolution.

    Source: Liu et al., Flash STU: Fast Spectral Transform Units (2024), arXiv 2409.10489, section 3.
    """

    def __init__(self, config: STUConfig, width: int, phi: nn.Parameter) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, width, bias=False)
        self.filter = SpectralFilter(width, config.length, count=config.count, hankel=config.hankel, phi=phi)
        self.filter.phi = phi

    @property
    def convolutions(self) -> Sequence[Convolutions]:
        """One, of width D."""
        return (Convolutions(self.filter, self.filter.channels),)

    def compute(self, x: Tensor, mix: Mix) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        return mix(0, self.inputs(x))


class ExactSTU(Convolving):
    """sum over k of (phi_k * x) M+_k + ((-1)^lag phi_k * x) M-_k, with matrices M [K, D, D]; "L" has no minus branch.

    Each channel is convolved with 2 K scalar filters: their taps are repeated for every channel, so that taps and
    history take 2 K times those of a `TensordotSTU`. Source: as there.
    """

    def __init__(self, config: STUConfig, width: int, phi: nn.Parameter) -> None:
        super().__init__()
        K = config.count
        self.filter = SpectralBank(config.length, count=K, hankel=config.hankel, phi=phi, width=width)
        self.filter.phi = phi
        scale = (2 * K * width) ** -0.5
        self.plus = nn.Parameter(scale * torch.randn(K, width, width))
        self.minus = nn.Parameter(scale * torch.randn(K, width, width)) if config.hankel == "Z" else None

    @property
    def convolutions(self) -> Sequence[Convolutions]:
        """One, of width 2 K D, laid out (branch, k, channel)."""
        return (Convolutions(self.filter, self.filter.channels),)

    def compute(self, x: Tensor, mix: Mix) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        K, D = self.plus.shape[:2]
        z = mix(0, x.repeat(1, 1, self.filter.channels // D))
        y = z[..., : K * D] @ self.plus.flatten(0, 1)
        return y if self.minus is None else y + z[..., K * D :] @ self.minus.flatten(0, 1)


class Sandwich(Block):
    """down(unit(silu(up(x)))): a unit that works in another width."""

    def __init__(self, width: int, inner: int, unit: Block) -> None:
        super().__init__()
        self.up, self.unit = nn.Linear(width, inner, bias=False), unit
        self.down = nn.Linear(inner, width, bias=False)

    @property
    def convolutions(self) -> Sequence[Convolutions]:
        """The unit's."""
        return self.unit.convolutions

    @property
    def activations(self) -> int:
        """The unit's, and those of the maps around it."""
        return self.unit.activations + 2 * (self.up.in_features + self.up.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        return self.down(self.unit(nn.functional.silu(self.up(x))))

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        return self.down(self.unit.extend(nn.functional.silu(self.up(x)), past))


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 i / n) for head i = 1 .. n; for other than a power of two, those of the one below, then every second of 2n.

    Source: Press et al., Train Short, Test Long (2021), arXiv 2108.12409.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
