"""The definition of a tile, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_inference.ops.tile_conv.filter import PreparedFilter


def tile_conv_reference(y: Tensor, filter: PreparedFilter, first: int, out: Tensor, channels: slice) -> None:
    """out[j] += sum over i of y[i] rho[first + (S - 1) + j - i], summed directly in float64. O(S T) per channel."""
    S, T = y.shape[0], out.shape[0]
    rho = filter.taps(first, S + T - 1, channels).double().T[:, None]
    for j in range(T):
        sums = torch.zeros_like(out[j], dtype=torch.float64)
        for i in range(S):
            sums += y[i].double() * rho[S - 1 + j - i]
        out[j] += sums.to(out.dtype)
