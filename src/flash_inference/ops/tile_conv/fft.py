"""A tile by FFT: a circular convolution in which only outputs that nobody reads wrap around."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_inference.ops.causal_conv import good_size
from flash_inference.ops.threads import threads_for
from flash_inference.ops.tile_conv.filter import PreparedFilter

CHUNK_BYTES = 1 << 20


def tile_conv_fft(y: Tensor, filter: PreparedFilter, first: int, out: Tensor, channels: slice) -> None:
    """out[j] += sum over i of y[i] rho[first + (S - 1) + j - i] for y [S, B, C], out [T, B, C].

    Sources at 0 .. S-1 of a circle of n >= S + T - 1 places, taps first .. first + n - 1 on it: places S-1 .. S+T-2
    hold the targets, and what wraps around falls on places before S-1. O(n log n) per channel; error about
    eps log2(n) ||y|| ||rho||. Works through the channels in pieces of about 1 MiB: large temporaries that are fresh
    each time cost more in page faults than the transforms. Source: Oncescu et al. (2024), arXiv 2410.12982, section 3.
    """
    S, B, C = y.shape
    T = out.shape[0]
    n = good_size(S + T - 1)
    start, stop, _ = channels.indices(filter.channels)
    step = max(1, CHUNK_BYTES // (n * B * filter.rho.itemsize))
    lanes, targets = y.permute(2, 1, 0), out.permute(2, 1, 0)
    with threads_for(C * B * n):
        for c in range(0, C, step):
            piece = slice(c, min(c + step, C))
            spectrum = torch.fft.rfft(lanes[piece].to(filter.rho.dtype), n=n)
            spectrum.mul_(filter.spectrum(first, n, slice(start + piece.start, min(start + piece.stop, stop)))[:, None])
            targets[piece] += torch.fft.irfft(spectrum, n=n)[..., S - 1 : S - 1 + T]
