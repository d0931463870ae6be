"""Causal convolution of a whole sequence: the definition that training and full forwards use."""

from __future__ import annotations

from flash_inference.ops.causal_conv.fft import causal_conv, good_size
from flash_inference.ops.causal_conv.reference import causal_conv_reference

__all__ = ["causal_conv", "causal_conv_reference", "good_size"]
