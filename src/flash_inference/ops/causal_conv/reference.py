"""The definition of causal convolution, as a direct float64 sum."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv_reference(y: Tensor, rho: Tensor) -> Tensor:
    """z[.., t] = sum over i <= t of y[.., i] rho[.., t - i], summed directly in float64. Time is the last axis.

    Taps beyond `rho`'s end are zero. Cost O(L * taps) per channel: for tests and small checks.
    """
    y, rho = y.double(), rho.double()
    length, taps = y.shape[-1], rho.shape[-1]
    z = torch.zeros((*torch.broadcast_shapes(y.shape[:-1], rho.shape[:-1]), length), dtype=torch.float64)
    for lag in range(min(length, taps)):
        z[..., lag:] += rho[..., lag, None] * y[..., : length - lag]
    return z
