"""One position, or a few, through all layers, fused: what a decode step does between the mixers."""

from __future__ import annotations

from flash_inference.ops.decode_step.numpy import BoundStep, HyenaStep, LayerWeights
from flash_inference.ops.decode_step.numpy_chunk import HyenaChunk

__all__ = ["BoundStep", "HyenaChunk", "HyenaStep", "LayerWeights"]
