"""A filter of stride 2 by FFT: even positions as real parts and odd ones as imaginary parts of one sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_inference.ops.causal_conv import good_size
from flash_inference.ops.threads import threads_for
from flash_inference.ops.tile_conv.filter import PreparedFilter

CHUNK_BYTES = 1 << 20


def pairs_up(y: Tensor, filter: PreparedFilter, first: int, out: Tensor) -> bool:
    """Whether a tile's even and odd positions make the same tile twice, so that `tile_conv_paired` can pay it."""
    S, T = y.shape[0], out.shape[0]
    return filter.stride == 2 and S % 2 == T % 2 == (first + S - 1) % 2 == 0


def tile_conv_paired(y: Tensor, filter: PreparedFilter, first: int, out: Tensor, channels: slice) -> None:
    """out[j] += sum over i of y[i] rho[first + (S - 1) + j - i] for y [S, B, C], out [T, B, C] that `pairs_up`.

    Sources at even and at odd positions meet the same real taps, so that one complex transform of half the points
    serves both. O(n log n) per channel; error as `tile_conv_fft`.
    """
    S, T = y.shape[0], out.shape[0]
    n, lag = good_size((S + T) // 2 - 1), (first + 1) // 2
    _add_paired(y, filter, out, channels, n, S - 2, lambda some: filter.spectrum(lag, n, some, whole=True))


def triangle_conv_paired(y: Tensor, filter: PreparedFilter, out: Tensor, channels: slice) -> None:
    """out[j] += sum over i <= j of y[i] rho[j - i] for y, out [N, B, C], N even, stride 2. O(N log N) per channel."""
    N = y.shape[0]
    n = good_size(N - 1)
    _add_paired(y, filter, out, channels, n, 0, lambda some: torch.fft.fft(filter.taps(0, N // 2, some), n=n))


def _add_paired(
    y: Tensor,
    filter: PreparedFilter,
    out: Tensor,
    channels: slice,
    n: int,
    place: int,
    spectrum: Callable[[slice], Tensor],
) -> None:
    """Adds places place .. place + T - 1 of a circle of n pairs, in pieces of about 1 MiB of channels."""
    (_, B, C), T, start = y.shape, out.shape[0], channels.indices(filter.channels)[0]
    step = max(1, CHUNK_BYTES // (2 * n * B * filter.rho.itemsize))
    lanes, targets = y.permute(2, 1, 0), out.permute(2, 1, 0)
    with threads_for(2 * C * B * n):
        for c in range(0, C, step):
            piece = slice(c, min(c + step, C))
            around = spectrum(slice(start + piece.start, start + piece.stop))
            sums = _circular(lanes[piece].to(filter.rho.dtype), around)
            targets[piece] += sums[..., place : place + T]


def _circular(lanes: Tensor, spectrum: Tensor) -> Tensor:
    """Even and odd places of lanes [C, B, L] on circles of n points, each times spectrum [C, n]: [C, B, 2 n]."""
    n = spectrum.shape[1]
    padded = torch.nn.functional.pad(lanes, (0, 2 * n - lanes.shape[2])).contiguous()
    pairs = torch.fft.fft(torch.view_as_complex(padded.unflatten(2, (n, 2))))
    return torch.view_as_real(torch.fft.ifft(pairs.mul_(spectrum[:, None]))).flatten(2)
