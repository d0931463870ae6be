"""A tile as a direct sum: the least work for small sides, and for tiles one position wide."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flash_inference.ops.threads import threads_for
from flash_inference.ops.tile_conv.filter import NEAR, PreparedFilter

PIECE, FEW = 1 << 18, 8


def tile_conv_direct(y: Tensor, filter: PreparedFilter, first: int, out: Tensor, channels: slice) -> None:
    """out[j] += sum over i of y[i] rho[first + (S - 1) + j - i] for y [S, B, C], out [T, B, C].

    One target is a dot product, a few sources are a rank-one update each, anything else is a depthwise correlation of
    the taps with the reversed sources, whose launch costs as much as twenty small calls.
    O(S T) per channel. Error at most S eps sum |y| |rho| per element.
    """
    S, T = y.shape[0], out.shape[0]
    y = y.to(filter.rho.dtype)
    if S == 1:
        if first + T <= min(NEAR, filter.rho.shape[1]) and out.dtype == y.dtype:
            out.addcmul_(filter.near[first : first + T, None, channels], y)
        else:
            piece = max(1, PIECE // y.numel())
            for t in range(0, T, piece):
                n = min(piece, T - t)
                out[t : t + n] += filter.taps(first + t, n, channels).T[:, None] * y
    elif T == 1:
        S = min(S, filter.rho.shape[1] - first)
        if S > 0:
            out[0] += _dot(y[-S:], filter.backwards(first, S, channels))
    elif S <= FEW:
        window = filter.taps(first, S + T - 1, channels).T[:, None]
        sums = window[S - 1 : S - 1 + T] * y[0]
        for i in range(1, S):
            sums += window[S - 1 - i : S - 1 - i + T] * y[i]
        out.add_(sums)
    else:
        out.add_(correlate(filter.taps(first, S + T - 1, channels), y))


def _dot(y: Tensor, rho: Tensor) -> Tensor:
    """sum over i of y[i, b, c] rho[c, i]: einsum of numpy on a CPU (torch's is three times slower), torch elsewhere."""
    if y.device.type == "cpu":
        return torch.from_numpy(np.einsum("ibc,ci->bc", y.numpy(), rho.numpy()))
    return torch.einsum("ibc,ci->bc", y, rho)


def correlate(window: Tensor, y: Tensor) -> Tensor:
    """window [C, S + T - 1] correlated with the reversed sources y [S, B, C], as [T, B, C]."""
    S, B, C = y.shape
    kernel = y.permute(1, 2, 0).flip(2).reshape(B * C, 1, S)
    lanes = window.expand(B, *window.shape).reshape(1, B * C, -1)
    with threads_for(lanes.numel()):
        return torch.nn.functional.conv1d(lanes, kernel, groups=B * C).view(B, C, -1).permute(2, 0, 1)
