"""A small model of every family, with random weights under which greedy runs keep changing."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flash_inference.models.backbone import LanguageModel
from flash_inference.models.config import ModelConfig
from flash_inference.models.h3 import H3Config
from flash_inference.models.h3_conv import H3ConvConfig
from flash_inference.models.hyena import FilterConfig
from flash_inference.models.long_conv import LongConvConfig
from flash_inference.models.multi_hyena import MultiHyenaConfig
from flash_inference.models.s4d import S4DConfig
from flash_inference.models.striped_hyena import StripedHyenaConfig
from flash_inference.models.stu import STUConfig
from flash_inference.models.tnn import TNNConfig

Make = Callable[[int, int, int], ModelConfig]
"""(vocabulary, width, length) -> config; widths are multiples of 8."""

PATTERN = ("short", "medium", "long", "attention", "modal")


def _striped(vocab: int, width: int, length: int, **settings: Any) -> StripedHyenaConfig:
    return StripedHyenaConfig(
        vocab, width, 5, length, pattern=PATTERN, activations=("gelu", "none", "silu", "none", "none"), inner=2 * width,
        heads=4, kv_heads=2, modes=4, short_groups=4, medium_taps=20, medium_groups=8, tied=False, **settings,
    )  # fmt: skip


def _wide_filter(kind: str, **options: Any) -> FilterConfig:
    return FilterConfig(kind, options=options)


FAMILIES: dict[str, Make] = {
    "multi-hyena": lambda V, D, L: MultiHyenaConfig(
        V, D, 2, L, heads=D // 2, filter=FilterConfig(width=16), norm="rms", tied=False
    ),
    "multi-hyena-modal": lambda V, D, L: MultiHyenaConfig(
        V, D, 2, L, heads=D // 4, filter=_wide_filter("modal", modes=4), feed="gated-silu", tied=False
    ),
    "h3-hybrid": lambda V, D, L: H3Config(
        V, D, 3, L, shift=5, modes=4, head_width=2, attention=(1,), heads=4, rotary=2, tied=False
    ),
    "h3-conv": lambda V, D, L: H3ConvConfig(
        V, D, 2, L, filter=_wide_filter("squashed", threshold=0.0), attention=(1,), heads=2, tied=False
    ),
    "s4d": lambda V, D, L: S4DConfig(V, D, 2, L, join="glu", tied=False),
    "long-conv": lambda V, D, L: LongConvConfig(
        V, D, 2, L, heads=2, filter=_wide_filter("squashed", threshold=0.0), tied=False
    ),
    "sgconv": lambda V, D, L: LongConvConfig(
        V, D, 2, L, mixing="linear", filter=_wide_filter("multiscale"), tied=False
    ),
    "stu": lambda V, D, L: STUConfig(
        V, D, 2, L, pattern=("stu", "attention"), count=8, heads=4, window=21, inner=2 * D, tied=False
    ),
    "stu-exact": lambda V, D, L: STUConfig(
        V, D, 2, L, form="exact", count=4, expanded=8, inner=2 * D, tied=False
    ),
    "tnn": lambda V, D, L: TNNConfig(V, D, 2, L, expanded=D + 3, filter=_wide_filter("relative"), tied=False),
    "striped-hyena": _striped,
}  # fmt: skip


@torch.no_grad()
def family_model(name: str, vocab: int = 29, width: int = 16, length: int = 160) -> LanguageModel:
    """In float32, in eval mode, gradients off; the same model at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()) + 1)
        model = LanguageModel(FAMILIES[name](vocab, width, length)).eval().requires_grad_(False)
        model.embedding.weight.normal_()
        model.head.weight.normal_()
        for key, parameter in model.named_parameters():
            if key.endswith("bias") and "filter" not in key:
                parameter.normal_(std=0.2)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.head:
                module.weight.normal_(std=2 * module.in_features**-0.5)
    return model
