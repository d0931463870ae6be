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
from flash_inference.ops.tile_conv.triton import ONCE


def pack(
    history: Tensor, start: int, n: int, channels: range, out: Tensor, since: Tensor | None = None, position: int = 0
) -> None:  # fmt: skip
    """out[c, :n] = history[start : start + n, channels[c]] in float32, then zeros; history [rows, C].

    Rows of `out` are contiguous; it may be the end of wider rows. With `since` [B], column c belongs to sequence c % B,
    which begins at position since[c % B]: what stands before is zero, row `start` being position `position`.
    """
    grid = (triton.cdiv(out.shape[1], 64), triton.cdiv(len(channels), 64))
    unit = _unit(channels.start, len(channels))
    _pack[grid](
        history, out, history if since is None else since, start, n, position, channels.start // unit,
        len(channels) // unit, out.shape[1], out.stride(0), history.shape[1], num_warps=8, SIDE=64, UNIT=unit,
        ROWS=0 if since is None else len(since),
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


def multiply(z: Tensor, rho: Tensor, turns: Tensor, batch: int = 1) -> None:
    """Multiplies real sequences by others while they stand as half as many complex numbers: one pass, in place.

    z [c batch, V] is the FFT of sequences of 2 V real numbers taken as pairs; afterwards its unscaled inverse FFT gives
    the pairs of their cyclic products with the sequences whose rfft [c, V + 1] is `rho`, divided by 2 V by whoever made
    it; each row of it is for `batch` neighbours. `turns` [V // 2 + 1] is exp(-i pi k / V).
    """
    half = z.shape[1] // 2 + 1
    size = min(512, triton.next_power_of_2(half))
    views = (torch.view_as_real(t) for t in (z, rho, turns))
    _multiply[(len(z) * triton.cdiv(half, size),)](*views, half, z.shape[1], SIZE=size, BATCH=batch, num_warps=4)


def stretches(positions: range, ring: int | None) -> list[tuple[int, int, int]]:
    """(place, row, count) of each run of rows that holds positions, the one at `place` first; two where a ring ends."""
    if ring is None:
        return [(0, positions.start, len(positions))]
    row = positions.start % ring
    first = min(len(positions), ring - row)
    rest = len(positions) - first
    return [(0, row, first)] + ([(first, 0, rest)] if rest else [])


class TileFFT:
    """Tiles of S sources and T targets that begin `lag` behind them, on circles of 2 V >= S + T places.

    Sources lie at the first S places, targets at those behind; between them stand the taps rho[lag : lag + 2 V].
    `taps(first, stop, channels)` gives rho as [c, stop - first], zeros past the end. `prepare` makes spectra that are
    kept; others are made when needed. Real circles are transformed as V complex numbers, so that nothing but the two
    transforms, one product and the moves to and from time-major rows passes over them. Float32; error about
    eps log2(2 V) ||y|| ||rho||.
    """

    def __init__(self, size: int, taps: Callable[[int, int, range], Tensor], lag: int = 0) -> None:
        self.size, self.taps, self.lag = size, taps, lag
        self._spectra: Tensor | None = None
        self._turns: Tensor | None = None

    def prepare(self, channels: int, piece: int) -> None:
        """Keeps the spectra for all channels: 8 (V + 1) bytes each. Made `piece` at a time.

        They are transformed in float64 and rounded once, which takes a fifth off a tile's error.
        """
        for c in range(0, channels, piece):
            made = self._make(range(c, min(c + piece, channels)), torch.float64)
            if self._spectra is None:
                self._spectra = made.new_empty(channels, self.size + 1, dtype=torch.complex64)
            self._spectra[c : c + piece] = made

    @property
    def kept(self) -> bool:
        """Whether spectra are kept."""
        return self._spectra is not None

    def spectrum(self, channels: range) -> Tensor:
        """rfft of rho[lag : lag + 2 V] over 2 V, for some channels [c, V + 1]."""
        return self._make(channels) if self._spectra is None else self._spectra[channels.start : channels.stop]

    def _make(self, channels: range, dtype: torch.dtype = torch.float32) -> Tensor:
        n = 2 * self.size
        return torch.fft.rfft(self.taps(self.lag, self.lag + n, channels).to(dtype), n=n, norm="forward")

    def turns(self, device: torch.device) -> Tensor:
        """exp(-i pi k / V) for k = 0 .. V // 2, from float64."""
        if self._turns is None:
            k = torch.arange(self.size // 2 + 1, dtype=torch.float64, device=device)
            self._turns = torch.polar(torch.ones_like(k), -torch.pi / self.size * k).to(torch.complex64)
        return self._turns

    def pay(
        self, history: Tensor, sources: range, targets: range, channels: range, batch: int = 1,
        ring: int | None = None, since: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Adds to targets what sources owe them; history [rows, C batch], `channels` are of the filter.

        With `ring` history holds position i in row i modulo it. With `since` [batch], sequence b begins at position
        since[b], and owes nothing from before.
        """
        S, T, n = len(sources), len(targets), 2 * self.size
        if targets.start - sources.stop != self.lag or n < S + T:
            raise ShapeError(
                f"sources {sources} and targets {targets} were given; expected {self.lag} rows between them and at "
                f"most {n} in both. Take another TileFFT."
            )
        lanes = range(channels.start * batch, channels.stop * batch)
        places = torch.empty(len(lanes), n, device=history.device)
        for place, start, count in stretches(sources, ring):
            pack(history, start, count, lanes, places[:, place:], since, sources.start + place)
        sums = self._circle(places, self.spectrum(channels), batch)
        for place, start, count in stretches(targets, ring):
            unpack_add(sums, S + place, history, start, count, lanes)

    def owe(self, inputs: Tensor, out: Tensor, channels: range) -> None:
        """Adds to out [T, C] what inputs [C, S] owe the T positions that begin `lag` behind them."""
        S = inputs.shape[1]
        places = torch.zeros(len(channels), 2 * self.size, device=out.device)
        places[:, :S] = inputs[channels.start : channels.stop]
        unpack_add(self._circle(places, self.spectrum(channels), 1), S, out, 0, len(out), channels)

    def _circle(self, places: Tensor, rho: Tensor, batch: int) -> Tensor:
        z = torch.fft.fft(torch.view_as_complex(places.unflatten(1, (-1, 2))))
        multiply(z, rho, self.turns(places.device), batch)
        return torch.view_as_real(torch.fft.ifft(z, norm="forward")).flatten(1)

    def warm(self, history: Tensor, channels: int, batch: int) -> None:
        """Runs all that `pay` runs on zeros, so that nothing is compiled, planned or allocated later."""
        n, some = 2 * self.size, min(self.size, len(history))
        lanes = range(channels * batch)
        places = torch.empty(len(lanes), n, device=history.device)
        pack(history, 0, some, lanes, places)
        rho = torch.zeros(channels, self.size + 1, dtype=torch.complex64, device=history.device)
        unpack_add(self._circle(places, rho, batch), self.size, history, 0, some, lanes)


# What differs from chunk to chunk is not specialised: to compile a kernel anew stops a run for a tenth of a second.


@triton.jit
def _multiply(z, rho, turns, half, V, SIZE: tl.constexpr, BATCH: tl.constexpr):
    """X[k] = E + w O and X[V - k] = conj(E - w O), with 2 E = z[k] + conj z[V - k] and 2 i O = z[k] - conj z[V - k]."""
    parts = tl.cdiv(half, SIZE)
    row = (tl.program_id(0) // parts).to(tl.int64)
    k = tl.program_id(0) % parts * SIZE + tl.arange(0, SIZE)
    known, both = (k < half)[:, None], tl.arange(0, 2)[None, :]
    near = z + row * 2 * V + 2 * k[:, None] + both
    far = z + row * 2 * V + 2 * tl.where(k == 0, 0, V - k)[:, None] + both
    low = rho + row // BATCH * 2 * (V + 1) + 2 * k[:, None] + both
    high = rho + row // BATCH * 2 * (V + 1) + 2 * (V - k)[:, None] + both
    a, b = tl.split(tl.load(near, known, 0.0))
    c, d = tl.split(tl.load(far, known, 0.0))
    cosine, sine = tl.split(tl.load(turns + 2 * k[:, None] + both, known, 0.0))
    e, f = a + c, b - d
    # w O, doubled as E is
    g, h = b + d, c - a
    g, h = g * cosine - h * sine, g * sine + h * cosine
    p, q = tl.split(tl.load(low, known, 0.0, eviction_policy=ONCE))
    r, s = tl.split(tl.load(high, known, 0.0, eviction_policy=ONCE))
    x, y = e + g, f + h
    u, v = x * p - y * q, x * q + y * p
    x, y = e - g, h - f
    m, n = x * r - y * s, x * s + y * r
    # The products' E and w O, with the factor 1 / 2 that the doubled sums leave.
    e, f = 0.5 * (u + m), 0.5 * (v - n)
    g, h = 0.5 * (u - m), 0.5 * (v + n)
    g, h = g * cosine + h * sine, h * cosine - g * sine
    tl.store(near, tl.join(e - h, f + g), known)
    tl.store(far, tl.join(e + h, g - f), known)


@triton.jit(do_not_specialize=["start", "n", "position", "first", "count"])
def _pack(
    history, out, since, start, n, position, first, count, places, wide, C, SIDE: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    first, count = first * UNIT, count * UNIT
    time = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    lane = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    at = (start + time).to(tl.int64)[:, None] * C + (first + lane)[None, :]
    wanted = (time < n)[:, None] & (lane < count)[None, :]
    if ROWS:
        begun = tl.load(since + (first + lane) % ROWS)
        wanted &= (time.to(tl.int64) + position)[:, None] >= begun[None, :]
    tile = tl.load(history + at, wanted, 0.0, eviction_policy=ONCE).to(tl.float32)
    to = lane.to(tl.int64)[:, None] * wide + time[None, :]
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
    stands = tl.load(at, wanted, 0.0, eviction_policy=ONCE).to(tl.float32)
    tl.store(at, (stands + tile).to(history.dtype.element_ty), wanted, eviction_policy=ONCE)
