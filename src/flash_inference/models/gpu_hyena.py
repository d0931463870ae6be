"""How positions of Hyena models run on a GPU: by kernels that fuse each layer into four."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_inference.models.fused import layer_weights
from flash_inference.models.gpu_memory import fits_bfloat16
from flash_inference.ops.decode_step import LayerWeights
from flash_inference.ops.decode_step.triton import GpuStep, Shapes
from flash_inference.ops.decode_step.triton_batch import BatchShapes, GpuBatchStep
from flash_inference.ops.decode_step.triton_few import FEW, GpuFewStep

if TYPE_CHECKING:
    from flash_inference.models.backbone import LanguageModel
    from flash_inference.models.gpu import GpuRun


class HyenaSteps:
    """The fused steps of a model of Hyena blocks; `exact` is the model in float32.

    What they keep beside the history is one tensor [layers, taps - 1, B, (N + 1) D]: what past inputs of the short
    convolutions owe the next positions.
    """

    def __init__(
        self, model: LanguageModel, exact: LanguageModel, *, near: Tensor, diagonal: Tensor, block: int,
        shapes: Shapes | None, batch_shapes: BatchShapes | None, pdl: bool | None,
    ) -> None:  # fmt: skip
        if pdl is None:
            pdl = near.is_cuda and torch.cuda.get_device_capability(near.device)[0] >= 9
        self.exact, self.batch_shapes, config = exact, batch_shapes, model.config
        layers = [_streamed(layer_weights(block)) for block in exact.blocks]
        norm = exact.norm.weight.detach(), exact.norm.bias.detach()
        parts = layers, norm, model.embedding.weight.detach(), _narrow(model.head.weight.detach()), diagonal, near
        settings = {"order": config.order, "eps": config.norm_eps, "block": block, "pdl": pdl}
        self._one = partial(GpuStep, *parts, shapes=shapes, **settings)
        self._few, self._several = (partial(kind, *parts, **settings) for kind in (GpuFewStep, GpuBatchStep))

    def make(self, batch: int, shapes: BatchShapes | None) -> GpuStep | GpuBatchStep:
        """The kernels for one sequence, for a few, or for a batch of them, which given shapes ask for."""
        if batch == 1:
            return self._one()
        shapes = shapes or self.batch_shapes
        if batch <= FEW and not shapes:
            return self._few(batch=batch)
        return self._several(batch=batch, shapes=shapes)

    def pending(self, batch: int, rows: int) -> Tensor:
        """Empty pasts of the short convolutions."""
        return torch.stack([block.mixer.short.init(batch).pending.transpose(0, 1) for block in self.exact.blocks])

    def keep(self, run: GpuRun, row: int, pasts: list[list[Any]], prompt: int, clock: int) -> None:
        """Puts a row's pasts into the tensor; they know no clock."""
        for number, (past,) in enumerate(pasts):
            run.pending[number, :, row] = past.pending[0]

    def repeat(self, run: GpuRun, twin: int, row: int) -> None:
        """Gives a row the pasts of another."""
        run.pending[:, :, row] = run.pending[:, :, twin]

    def turn(self, run: GpuRun, by: int) -> None:
        """Nothing here is laid out by the clock."""


def _narrow(weight: Tensor) -> Tensor:
    """The same values as bfloat16 if none changes."""
    return weight.to(torch.bfloat16) if fits_bfloat16(weight) else weight.contiguous()


def _streamed(layer: LayerWeights) -> LayerWeights:
    """The same layer as the kernels read it: matrices narrow where nothing is lost, short filters [taps, W]."""
    matrices = {name: getattr(layer, name) for name in ("in_proj", "out_proj", "fc1", "fc2")}
    narrow = {name: (_narrow(weight), bias) for name, (weight, bias) in matrices.items()}
    return replace(layer, short=(layer.short[0].T.contiguous(), layer.short[1]), **narrow)
