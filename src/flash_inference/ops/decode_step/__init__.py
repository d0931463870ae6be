"""One position through one layer, fused: what a decode step does between the mixers."""

from __future__ import annotations

from flash_inference.ops.decode_step.numpy import BoundStep, HyenaStep, LayerWeights

__all__ = ["BoundStep", "HyenaStep", "LayerWeights"]
