"""Large tiles on time-major state: transposed into scratch by channels, transformed there, added back."""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor


def pack(history: Tensor, start: int, n: int, channels: range, out: Tensor) -> None:
    """out[c, :n] = history[start : start + n, channels[c]] in float32, then zeros; history [rows, C]."""
    grid = (triton.cdiv(out.shape[1], 64), triton.cdiv(len(channels), 64))
    _pack[grid](
        history, out, start, n, channels.start, len(channels), out.shape[1], history.shape[1], num_warps=8, SIDE=64
    )


def unpack_add(sums: Tensor, skip: int, history: Tensor, start: int, n: int, channels: range) -> None:
    """history[start + j, channels[c]] += sums[c, skip + j] for j < n."""
    grid = (triton.cdiv(n, 64), triton.cdiv(len(channels), 64))
    _unpack_add[grid](
        sums, history, skip, start, n, channels.start, len(channels), sums.shape[1], history.shape[1], num_warps=8,
        SIDE=64,
    )  # fmt: skip


def multiply(
    y: Tensor, rho: Tensor, out: Tensor, *, add: bool, also: Tensor | None, also_rho: Tensor | None, batch: int = 1
) -> None:
    """out = y rho, plus also also_rho if given, plus what out holds if `add`: complex, contiguous, one pass.

    y, out and `also` are [c batch, n]; rho and `also_rho` [c, n], each row for `batch` neighbours.
    """
    n = y.numel()
    views = [
        torch.view_as_real(t) for t in (y, rho, y if also is None else also, rho if also_rho is None else also_rho)
    ]
    _multiply[(triton.cdiv(n, 1024),)](
        *views,
        torch.view_as_real(out),
        n,
        y.shape[-1],
        ADD=add,
        TWO=also is not None,
        SIZE=1024,
        BATCH=batch,
        num_warps=8,
    )


class TileFFT:
    """Tiles of V targets from whole V-blocks of sources: circles of 2 V places, one inverse for all blocks.

    Between a source block that starts at s and targets that start at s + (k + 1) V stand the taps rho[k V : (k + 2) V];
    what a circle holds at its last V places is what they pay. `taps(first, stop, channels)` gives rho as
    [c, stop - first], zeros past the end. `prepare` makes spectra that are kept; others are made when needed. Float32;
    error about eps log2(2 V) ||y|| ||rho||.
    """

    def __init__(self, size: int, taps: Callable[[int, int, range], Tensor]) -> None:
        self.size, self.taps = size, taps
        self._spectra: dict[int, Tensor] = {}

    def prepare(self, k: int, channels: int, piece: int) -> None:
        """Keeps the spectra of rho[k V : (k + 2) V] for all channels: 8 (V + 1) bytes each. Made `piece` at a time."""
        for c in range(0, channels, piece):
            made = self._make(k, range(c, min(c + piece, channels)))
            if k not in self._spectra:
                self._spectra[k] = made.new_empty(channels, self.size + 1)
            self._spectra[k][c : c + piece] = made

    def spectrum(self, k: int, channels: range) -> Tensor:
        """rfft of rho[k V : (k + 2) V] for some channels [c, V + 1]."""
        if k in self._spectra:
            return self._spectra[k][channels.start : channels.stop]
        return self._make(k, channels)

    def _make(self, k: int, channels: range) -> Tensor:
        return torch.fft.rfft(self.taps(k * self.size, (k + 2) * self.size, channels), n=2 * self.size)

    def pay(self, history: Tensor, row: int, blocks: int, targets: range, channels: range, batch: int = 1) -> None:
        """Adds what the last `blocks` V-blocks before `row` owe to at most V targets, whole V-blocks behind `row`.

        history [rows, C batch]; `channels` are of the filter.
        """
        V, c, lanes = self.size, len(channels) * batch, range(channels.start * batch, channels.stop * batch)
        gap = (targets.start - row) // V
        places = torch.empty(blocks * c, 2 * V, device=history.device)
        for b in range(blocks):
            pack(history, row - (b + 1) * V, V, lanes, places[b * c : (b + 1) * c])
        spectra = torch.fft.rfft(places)
        for b in range(0, blocks, 2):
            second = b + 1 if b + 1 < blocks else None
            multiply(
                spectra[b * c : (b + 1) * c], self.spectrum(b + gap, channels), spectra[:c], add=b > 0,
                also=None if second is None else spectra[second * c : (second + 1) * c],
                also_rho=None if second is None else self.spectrum(second + gap, channels), batch=batch,
            )  # fmt: skip
        unpack_add(torch.fft.irfft(spectra[:c], n=2 * V), V, history, targets.start, len(targets), lanes)

    def warm(self, history: Tensor, blocks: int, channels: int, batch: int) -> None:
        """Runs all that `pay` runs on zeros, so that nothing is compiled, planned or allocated later."""
        V, c, n = self.size, channels * batch, min(self.size, len(history))
        places = torch.zeros(blocks * c, 2 * V, device=history.device)
        pack(history, 0, n, range(c), places[:c])
        y = torch.fft.rfft(places)
        again = y[-c:] if blocks == 2 else None
        rho = y[:channels].clone()
        multiply(y[:c], rho, y[:c], add=False, also=again, also_rho=None if again is None else rho, batch=batch)
        unpack_add(torch.fft.irfft(y[:c], n=2 * V), V, history, 0, n, range(c))


@triton.jit
def _multiply(
    y, rho, also, also_rho, out, n, places, ADD: tl.constexpr, TWO: tl.constexpr, SIZE: tl.constexpr,
    BATCH: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    pair = 2 * at[:, None] + tl.arange(0, 2)[None, :]
    shared = pair
    if BATCH > 1:
        shared = 2 * (at // places // BATCH * places + at % places)[:, None] + tl.arange(0, 2)[None, :]
    inside = (at < n)[:, None]
    a, b = tl.split(tl.load(y + pair, inside, 0.0))
    c, d = tl.split(tl.load(rho + shared, inside, 0.0))
    real, imaginary = a * c - b * d, a * d + b * c
    if TWO:
        a, b = tl.split(tl.load(also + pair, inside, 0.0))
        c, d = tl.split(tl.load(also_rho + shared, inside, 0.0))
        real += a * c - b * d
        imaginary += a * d + b * c
    if ADD:
        a, b = tl.split(tl.load(out + pair, inside, 0.0))
        real += a
        imaginary += b
    tl.store(out + pair, tl.join(real, imaginary), inside)


@triton.jit(do_not_specialize=["start"])
def _pack(history, out, start, n, first, count, places, C, SIDE: tl.constexpr):
    time = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    lane = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    at = (start + time).to(tl.int64)[:, None] * C + (first + lane)[None, :]
    tile = tl.load(history + at, (time < n)[:, None] & (lane < count)[None, :], 0.0).to(tl.float32)
    to = lane.to(tl.int64)[:, None] * places + time[None, :]
    tl.store(out + to, tl.trans(tile), (lane < count)[:, None] & (time < places)[None, :])


@triton.jit(do_not_specialize=["start"])
def _unpack_add(sums, history, skip, start, n, first, count, places, C, SIDE: tl.constexpr):
    time = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    lane = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    known = (lane < count)[:, None] & (time < n)[None, :]
    tile = tl.trans(tl.load(sums + lane.to(tl.int64)[:, None] * places + (skip + time)[None, :], known, 0.0))
    at = history + (start + time).to(tl.int64)[:, None] * C + (first + lane)[None, :]
    wanted = (time < n)[:, None] & (lane < count)[None, :]
    tl.store(at, (tl.load(at, wanted, 0.0).to(tl.float32) + tile).to(history.dtype.element_ty), wanted)
