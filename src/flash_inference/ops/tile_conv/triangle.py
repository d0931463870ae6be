"""The triangle of a chunk: every source pays every target of the same chunk from itself on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flash_inference.ops.causal_conv import good_size
from flash_inference.ops.threads import threads_for
from flash_inference.ops.tile_conv.direct import correlate
from flash_inference.ops.tile_conv.fft import CHUNK_BYTES
from flash_inference.ops.tile_conv.filter import NEAR, PreparedFilter
from flash_inference.ops.tile_conv.paired import triangle_conv_paired

DIRECT_SIDE, SQUARES_SIDE = 24, 32


def triangle_conv(y: Tensor, filter: PreparedFilter, *, out: Tensor, channels: slice = slice(None)) -> None:
    """out[j] += sum over i <= j of y[i] rho[j - i] for y, out [N, B, C], filter channels `channels`, lag 0 included.

    Direct up to 24 positions (32 on a CPU), by FFT above: O(N log N) per channel, in pieces of about 1 MiB. A filter
    with a stride pays one triangle for each remainder of positions.
    """
    y, s = y.to(filter.rho.dtype), filter.stride
    if s == 2 and y.shape[0] > DIRECT_SIDE and y.shape[0] % 2 == 0:
        triangle_conv_paired(y, filter, out, channels)
        return
    for remainder in range(min(s, y.shape[0])):
        _triangle(y[remainder::s], filter, out[remainder::s], channels)


def _triangle(y: Tensor, filter: PreparedFilter, out: Tensor, channels: slice) -> None:
    """The triangle of positions that lie `filter.stride` apart: tap k is paid k places on."""
    N, B, C = y.shape
    start, stop, _ = channels.indices(filter.channels)
    if N <= SQUARES_SIDE and y.device.type == "cpu":
        _squares(y, filter, out, channels)
        return
    if N <= DIRECT_SIDE:
        window = torch.nn.functional.pad(filter.taps(0, N, channels), (N - 1, 0))
        out.add_(correlate(window, y))
        return
    n = good_size(2 * N - 1)
    step = max(1, CHUNK_BYTES // (n * B * filter.rho.itemsize))
    lanes, targets = y.permute(2, 1, 0), out.permute(2, 1, 0)
    with threads_for(C * B * n):
        for c in range(0, C, step):
            piece = slice(c, min(c + step, C))
            rho = filter.taps(0, N, slice(start + piece.start, min(start + piece.stop, stop)))
            spectrum = torch.fft.rfft(lanes[piece], n=n).mul_(torch.fft.rfft(rho, n=n)[:, None])
            targets[piece] += torch.fft.irfft(spectrum, n=n)[..., :N]


def _squares(y: Tensor, filter: PreparedFilter, out: Tensor, channels: slice) -> None:
    """The triangle as squares of side 1, 2, 4, ..: in every 2s positions the first s pay the last s.

    All squares of a side are one sum with the channels innermost, where numpy's einsum runs at the speed of the first
    cache; a depthwise convolution takes two to three times as long for few positions, and a half more for 32.
    """
    N, B, C = y.shape
    side = 1 << (N - 1).bit_length()
    near = filter.near if side <= min(NEAR, filter.rho.shape[1]) else filter.taps(0, side).T
    # A copy, since rows of all channels lie apart by powers of two, and so in one set of the cache.
    rho = np.ascontiguousarray(near.numpy()[:side, channels])
    sources = np.zeros((side, B, C), rho.dtype)
    sources[:N] = y.numpy()
    sums = rho[0] * sources
    row, one = rho.strides
    s = 1
    while s < side:
        taps = np.ndarray((s, s, C), rho.dtype, rho, row, (row, row, one))
        halves, targets = (a.reshape(side // (2 * s), 2, s, B, C) for a in (sources, sums))
        targets[:, 1] += np.einsum("jic,gibc->gjbc", taps, halves[:, 0, ::-1])
        s *= 2
    out.add_(torch.from_numpy(sums[:N]))
