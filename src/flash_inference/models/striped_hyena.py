"""StripedHyena language models: short explicit and modal convolutions between gates, striped with attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from flash_inference.errors import ModelError
from flash_inference.filters import ModalFilter, RealModalFilter
from flash_inference.mixers.attention import Attention, AttentionConfig, Rotary
from flash_inference.mixers.fir import FIR
from flash_inference.mixers.mixer import Mixer
from flash_inference.mixers.modal import ModalConv
from flash_inference.models.block import Block, BlockPast
from flash_inference.models.config import ModelConfig
from flash_inference.models.mlp import ACTIVATIONS, GatedMLP
from flash_inference.models.norms import EPS_PLACES, EpsPlace, RMSNorm
from flash_inference.models.residual import MixerBlock, PreNorm


@dataclass(frozen=True, slots=True)
class StripedHyenaConfig(ModelConfig):
    """A StripedHyena language model, of the first or the second kind, or a mixture of both.

    `pattern` names the operator of each layer: a key of OPERATORS, or "attention". `activations` names that of each
    layer's MLP. `modes` is the number of exponentials in a "modal" or "long" filter; "short" and "medium" filters have
    `short_taps` and `medium_taps`, one for each of so many groups of channels. `feature_taps` are those of the
    convolution behind every projection. `length` bounds caches alone: no weight depends on it. Raises ModelError.
    """

    family: ClassVar[str] = "striped-hyena"
    length_key: ClassVar[str] = "max_seqlen"

    pattern: tuple[str, ...]
    activations: tuple[str, ...]
    inner: int
    heads: int = 1
    kv_heads: int = 0
    modes: int = 8
    feature_taps: int = 3
    short_taps: int = 7
    short_groups: int = 1
    medium_taps: int = 128
    medium_groups: int = 1
    in_bias: bool = True
    feature_bias: bool = True
    out_bias: bool = True
    qkv_bias: bool = True
    attention_out_bias: bool = True
    rotary_base: float = 10_000.0
    rotary_interpolation: float = 1.0
    norm_eps: float = 1e-6
    norm_eps_place: EpsPlace = "outside"

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        self._check_layers("pattern", (*OPERATORS, "attention"))
        self._check_layers("activations", tuple(ACTIVATIONS))

    def _check_layers(self, name: str, known: tuple[str, ...]) -> None:
        values = getattr(self, name)
        if len(values) != self.layers:
            raise ModelError(f"{name} has {len(values)} entries; expected one for each of {self.layers} layers.")
        for layer, value in enumerate(values):
            if value not in known:
                raise ModelError(f"{name}[{layer}] is {value!r}; expected one of {', '.join(known)}.")

    def ranges(self) -> dict[str, bool]:
        """Whether each field that has a range lies in it."""
        taps = ("feature_taps", "short_taps", "short_groups", "medium_taps", "medium_groups")
        sizes = ("inner", "heads", "modes", *taps)
        own = {name: getattr(self, name) >= 1 for name in sizes}
        own |= {"norm_eps": self.norm_eps >= 0, "norm_eps_place": self.norm_eps_place in EPS_PLACES}
        return ModelConfig.ranges(self) | own

    def attention(self) -> AttentionConfig:
        """The settings of an attention layer."""
        rotary = Rotary(self.rotary_base, self.rotary_interpolation)
        return AttentionConfig(
            self.width, self.heads, self.kv_heads, rotary=rotary, qkv_bias=self.qkv_bias,
            out_bias=self.attention_out_bias,
        )  # fmt: skip

    def mixer(self, name: str) -> Block:
        """The operator of a layer, with fresh weights."""
        if name == "attention":
            return MixerBlock(Attention(self.attention()))
        return GatedConv(self, OPERATORS[name](self))

    def blocks(self) -> list[Block]:
        """One block a layer, as `pattern` and `activations` say."""
        return [
            PreNorm(
                self.final_norm(),
                self.mixer(name),
                self.final_norm(),
                GatedMLP(self.width, self.inner, activation=activation),
                self.dropout,
            )
            for name, activation in zip(self.pattern, self.activations, strict=True)
        ]

    def final_norm(self) -> RMSNorm:
        """An RMSNorm, as all blocks have them."""
        return RMSNorm(self.width, self.norm_eps, eps_place=self.norm_eps_place)


def _modal(config: StripedHyenaConfig) -> Mixer[Any]:
    """StripedHyena 1: complex poles and residues."""
    return ModalConv(config.width, ModalFilter(config.width, config.length, modes=config.modes))


def _long(config: StripedHyenaConfig) -> Mixer[Any]:
    """Hyena-LI: real poles and residues."""
    return ModalConv(config.width, RealModalFilter(config.width, config.length, modes=config.modes))


def _medium(config: StripedHyenaConfig) -> Mixer[Any]:
    """Hyena-MR: the first tap multiplies the newest input; with a skip term."""
    D, taps, groups = config.width, config.medium_taps, config.medium_groups
    return FIR(D, taps, groups=groups, order="convolution", bias=False, skip=True)


def _short(config: StripedHyenaConfig) -> Mixer[Any]:
    """Hyena-SE: the last tap multiplies the newest input; no skip term."""
    return FIR(config.width, config.short_taps, groups=config.short_groups, bias=False)


OPERATORS: dict[str, Callable[[StripedHyenaConfig], Mixer[Any]]] = {
    "modal": _modal,
    "long": _long,
    "medium": _medium,
    "short": _short,
}
"""The convolutions between the gates, by name."""


class GatedConv(Block):
    """W_out (x_2 * (h conv (x_1 * v))), where x_2 | x_1 | v is a short convolution of W_in x.

    `inner` is the convolution with h, its skip term included. Source: Poli et al., StripedHyena (2023); Ku et al.,
    Systems and Algorithms for Convolutional Multi-Hybrid Language Models at Scale (2025), arXiv 2503.01868.
    """

    def __init__(self, config: StripedHyenaConfig, inner: Mixer[Any]) -> None:
        super().__init__()
        D = config.width
        self.in_proj = nn.Linear(D, 3 * D, bias=config.in_bias)
        self.features = FIR(3 * D, config.feature_taps, bias=config.feature_bias)
        self.inner = inner
        self.out_proj = nn.Linear(D, D, bias=config.out_bias)

    @property
    def mixers(self) -> Sequence[Mixer[Any]]:
        """The convolution behind the projection, and the one between the gates."""
        return self.features, self.inner

    def forward(self, x: Tensor) -> Tensor:
        """The whole sequence at once: x [B, L, D] -> [B, L, D]."""
        gate, key, value = self.features(self.in_proj(x)).chunk(3, dim=-1)
        return self.out_proj(gate * self.inner.forward(key * value))

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        features, inner = past.pasts
        gate, key, value = self.features.extend(features, self.in_proj(x), past.moment).chunk(3, dim=-1)
        return self.out_proj(gate * self.inner.extend(inner, key * value, past.moment))
