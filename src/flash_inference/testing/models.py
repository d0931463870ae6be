"""Random models whose greedy runs prove something: they keep changing, and depend on the whole past."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from flash_inference.models.backbone import LanguageModel
from flash_inference.models.hyena import FilterConfig, HyenaConfig

CONFIG = HyenaConfig(vocab_size=64, width=16, layers=2, length=512, filter=FilterConfig(width=16), tied=False)
GAIN = 3.0


@torch.no_grad()
def random_model(
    order: int = 2,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    filter: FilterConfig | None = None,
    **settings: Any,
) -> LanguageModel:
    """A LanguageModel with random weights, in eval mode with gradients off; `settings` are fields of HyenaConfig.

    Biases are non-zero, norms are not the identity and embeddings have unit scale: with default initialisation long
    greedy runs repeat one token. Filters reach over the whole length with a gain of at most 3, so that the far past
    counts; sine networks have small weights, since unit-scale ones amplify float32 error to 3e-3. Drawn in float64:
    the same seed gives the same model in every dtype, rounded.
    """
    config = dataclasses.replace(CONFIG, order=order, **settings)
    config = config if filter is None else dataclasses.replace(config, filter=filter)
    generator = torch.Generator().manual_seed(seed)
    model = LanguageModel(config).double().eval().requires_grad_(False)

    def normal(tensor: torch.Tensor, std: float) -> None:
        tensor.copy_(std * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))

    normal(model.embedding.weight, 1.0)
    if not config.tied:
        normal(model.head.weight, 1.0)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            normal(module.weight, 0.2)
            module.weight.add_(1)
            normal(module.bias, 0.2)
    for block in model.blocks:
        mixer = block.mixer
        for linear in (mixer.in_proj, mixer.out_proj, block.mlp.fc1, block.mlp.fc2):
            normal(linear.weight, 2 * linear.in_features**-0.5)
            normal(linear.bias, 0.2)
        normal(mixer.short.weight, config.short_taps**-0.5)
        normal(mixer.short.bias, 0.5)
        normal(mixer.skip, 0.5)
        if config.filter.kind == "explicit":
            normal(mixer.filter.rho, 1.0)
            mixer.filter.rho *= GAIN / _peak(mixer.filter.rho)
        else:
            for linear in mixer.filter.linears:
                normal(linear.weight, 0.2 * linear.in_features**-0.5)
                normal(linear.bias, 0.2)
            normal(mixer.filter.out.weight, 1.0)
            mixer.filter.out.weight *= GAIN / _peak(mixer.filter.taps(config.length))
    return model.to(dtype)


def _peak(rho: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfft(rho, n=2 * rho.shape[1]).abs().amax(1, keepdim=True)
