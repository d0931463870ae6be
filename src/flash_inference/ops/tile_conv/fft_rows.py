"""Large tiles on time-major state: transposed into scratch by channels, transformed there, added back."""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_inference.errors import ShapeError


def pack(history: Tensor, start: int, n: int, channels: range, out: Tensor) -> None:
    """out[c, :n] = history[start : start + n, channels[c]] in float32, then zeros; history [rows, C]."""
    grid = (triton.cdiv(out.shape[1], 64), triton.cdiv(len(channels), 64))
    unit = _unit(channels.start, len(channels))
    _pack[grid](
        history, out, start, n, channels.start // unit, len(channels) // unit, out.shape[1], history.shape[1],
        num_warps=8, SIDE=64, UNIT=unit,
    )  # fmt: skip


def unpack_add(sums: Tensor, skip: int, history: Tensor, start: int, n: int, channels: range) -> None:
    """history[start + j, channels[c]] += sums[c, skip + j] for j < n."""
    grid = (triton.cdiv(n, 64), triton.cdiv(len(channels), 64))
    unit = _unit(skip, n, channels.start, len(channels))
    _unpack_add[grid](
        sums, history, skip // unit, start, n // unit, channels.start // unit, len(channels) // unit, sums.shape[1],
        history.shape[1], num_warps=8, SIDE=64, UNIT=unit,
    )  # fmt: skip


def _unit(*numbers: int) -> int:
    """What all numbers are multiples of, 4 or 1: kernels know that much, to move neighbours at once, and no more."""
    return 1 if any(number % 4 for number in numbers) else 4


def multiply(y: Tensor, rho: Tensor, batch: int = 1) -> None:
    """y *= rho: complex, contiguous, one pass. y is [c batch, n], rho [c, n], each row for `batch` neighbours."""
    n, places = y.numel(), y.shape[-1]
    _multiply[(triton.cdiv(n, 1024),)](
        torch.view_as_real(y), torch.view_as_real(rho), n, places, SIZE=1024, BATCH=batch, num_warps=8
    )


class TileFFT:
    """Tiles of S sources and T targets that begin `lag` behind them, on circles of 2 V >= S + T places.

    Sources lie at the first S places, targets at those behind; between them stand the taps rho[lag : lag + 2 V].
    `taps(first, stop, channels)` gives rho as [c, stop - first], zeros past the end. `prepare` makes spectra that are
    kept; others are made when needed. Float32; error about eps log2(2 V) ||y|| ||rho||.
    """

    def __init__(self, size: int, taps: Callable[[int, int, range], Tensor], lag: int = 0) -> None:
        self.size, self.taps, self.lag = size, taps, lag
        self._spectra: Tensor | None = None

    def prepare(self, channels: int, piece: int) -> None:
        """Keeps the spectra for all channels: 8 (V + 1) bytes each. Made `piece` at a time."""
        for c in range(0, channels, piece):
            made = self._make(range(c, min(c + piece, channels)))
            if self._spectra is None:
                self._spectra = made.new_empty(channels, self.size + 1)
            self._spectra[c : c + piece] = made

    def spectrum(self, channels: range) -> Tensor:
        """rfft of rho[lag : lag + 2 V] for some channels [c, V + 1]."""
        return self._make(channels) if self._spectra is None else self._spectra[channels.start : channels.stop]

    def _make(self, channels: range) -> Tensor:
        return torch.fft.rfft(self.taps(self.lag, self.lag + 2 * self.size, channels), n=2 * self.size)

    def pay(self, history: Tensor, sources: range, targets: range, channels: range, batch: int = 1) -> None:
        """Adds to targets what sources owe them; history [rows, C batch], `channels` are of the filter."""
        S, T, n = len(sources), len(targets), 2 * self.size
        if targets.start - sources.stop != self.lag or n < S + T:
            raise ShapeError(
                f"sources {sources} and targets {targets} were given; expected {self.lag} rows between them and at "
                f"most {n} in both. Take another TileFFT."
            )
        lanes = range(channels.start * batch, channels.stop * batch)
        places = torch.empty(len(lanes), n, device=history.device)
        pack(history, sources.start, S, lanes, places)
        spectra = torch.fft.rfft(places)
        multiply(spectra, self.spectrum(channels), batch)
        unpack_add(torch.fft.irfft(spectra, n=n), S, history, targets.start, T, lanes)

    def warm(self, history: Tensor, channels: int, batch: int) -> None:
        """Runs all that `pay` runs on zeros, so that nothing is compiled, planned or allocated later."""
        n, some = 2 * self.size, min(self.size, len(history))
        lanes = range(channels * batch)
        places = torch.empty(len(lanes), n, device=history.device)
        pack(history, 0, some, lanes, places)
        y = torch.fft.rfft(places)
        multiply(y, y[:channels].clone(), batch)
        unpack_add(torch.fft.irfft(y, n=n), self.size, history, 0, some, lanes)


# What differs from chunk to chunk is not specialised: to compile a kernel anew stops a run for a tenth of a second.


@triton.jit(do_not_specialize=["n"])
def _multiply(y, rho, n, places, SIZE: tl.constexpr, BATCH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    pair = 2 * at[:, None] + tl.arange(0, 2)[None, :]
    shared = pair
    if BATCH > 1:
        shared = 2 * (at // places // BATCH * places + at % places)[:, None] + tl.arange(0, 2)[None, :]
    inside = (at < n)[:, None]
    a, b = tl.split(tl.load(y + pair, inside, 0.0))
    c, d = tl.split(tl.load(rho + shared, inside, 0.0))
    tl.store(y + pair, tl.join(a * c - b * d, a * d + b * c), inside)


@triton.jit(do_not_specialize=["start", "n", "first", "count"])
def _pack(history, out, start, n, first, count, places, C, SIDE: tl.constexpr, UNIT: tl.constexpr):
    first, count = first * UNIT, count * UNIT
    time = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    lane = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    at = (start + time).to(tl.int64)[:, None] * C + (first + lane)[None, :]
    tile = tl.load(history + at, (time < n)[:, None] & (lane < count)[None, :], 0.0).to(tl.float32)
    to = lane.to(tl.int64)[:, None] * places + time[None, :]
    tl.store(out + to, tl.trans(tile), (lane < count)[:, None] & (time < places)[None, :])


@triton.jit(do_not_specialize=["skip", "start", "n", "first", "count"])
def _unpack_add(
    sums, history, skip, start, n, first, count, places, C, SIDE: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    skip, n, first, count = skip * UNIT, n * UNIT, first * UNIT, count * UNIT
    time = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    lane = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    known = (lane < count)[:, None] & (time < n)[None, :]
    tile = tl.trans(tl.load(sums + lane.to(tl.int64)[:, None] * places + (skip + time)[None, :], known, 0.0))
    at = history + (start + time).to(tl.int64)[:, None] * C + (first + lane)[None, :]
    wanted = (time < n)[:, None] & (lane < count)[None, :]
    tl.store(at, (tl.load(at, wanted, 0.0).to(tl.float32) + tile).to(history.dtype.element_ty), wanted)
