"""Which models the fused decode steps know, and what the steps read of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from flash_inference.mixers.short_conv import ShortPast
from flash_inference.models.hyena import HyenaBlock, HyenaConfig
from flash_inference.ops.decode_step import HyenaStep, LayerWeights

if TYPE_CHECKING:
    from flash_inference.models.backbone import LanguageModel


def unfused(model: LanguageModel) -> str | None:
    """Why the fused steps cannot run a model, in a line; None if they can."""
    other = next((i for i, block in enumerate(model.blocks) if type(block) is not HyenaBlock), None)
    if other is not None:
        return f"block {other} is a {type(model.blocks[other]).__name__}, and the fused step knows Hyena blocks only"
    if not isinstance(model.config, HyenaConfig):
        return f"the model's config is a {type(model.config).__name__}, and the fused step knows Hyena models only"
    return None


def layer_weights(block: HyenaBlock) -> LayerWeights:
    """The tensors that a decode step reads of one block."""

    def pair(module: nn.Module) -> tuple[Tensor, Tensor]:
        return module.weight.detach(), module.bias.detach()  # type: ignore[union-attr, return-value]

    mixer, short = block.mixer, block.mixer.short
    return LayerWeights(
        norm1=pair(block.norm1),
        in_proj=pair(mixer.in_proj),
        short=(short.weight.detach()[:, 0], short.bias.detach()),
        out_proj=pair(mixer.out_proj),
        norm2=pair(block.norm2),
        fc1=pair(block.mlp.fc1),
        fc2=pair(block.mlp.fc2),
    )


def fused_step(model: LanguageModel, diagonal: Tensor) -> HyenaStep | None:
    """The step over numpy, where it can run this model: on a CPU, in float32 or float64."""
    weight = model.head.weight
    if unfused(model) or weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return None
    config = cast("HyenaConfig", model.config)
    layers = [layer_weights(cast("HyenaBlock", block)) for block in model.blocks]
    return HyenaStep(layers, config.order, config.norm_eps, diagonal)


def pack_short(pasts: list[ShortPast]) -> Tensor:
    """All short convolutions' pasts as one tensor [layers, taps - 1, B, C], of which they become views."""
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.stack([past.pending.transpose(0, 1) for past in pasts])
    for past, pending in zip(pasts, packed, strict=True):
        past.pending = pending.transpose(0, 1)
    return packed
