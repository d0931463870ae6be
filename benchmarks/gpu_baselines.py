"""What do the usual decoders of long convolution models cost per token on a GPU, and a Transformer of the same size?

z[t, c] = sum over i <= t of y[i, c] rho[t - i, c], for all channels c of all layers. Every mixer here gives the part
of the past, i < t; the term i = t is one product a channel. Each one is compared with a float64 direct sum before
anything is timed. Mixers keep float32, blocks bfloat16; batch 1. Times are of the device alone where the host keeps up:
every call starts behind a long write, which also empties the cache as the weights of a real step would.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

VOCABULARY = 50304
POSITIONS = (16, 1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 81920, 98304, 114688, 131071)
EPS = torch.finfo(torch.float32).eps


# -------------------------------------------------------------------------------------------------------------- timing


class Timing(NamedTuple):
    """Microseconds of one call: the median over repeats, the least and the most."""

    median: float
    low: float
    high: float


def default_device() -> str:
    """The GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_time(fn: Callable[[], object], repeats: int = 5) -> Timing:
    """Microseconds of fn() after a warm-up: on the device by events, or by the clock where there is no device.

    On a device every repeat follows a write of 1 GiB, outside the time taken: it empties the cache, and the host
    queues fn's launches meanwhile.
    """
    if not torch.cuda.is_available():
        fn()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            fn()
            seconds.append(time.perf_counter() - start)
        micros = [s * 1e6 for s in seconds]
    else:
        filler = torch.empty(1 << 28, device="cuda")
        for _ in range(2):
            fn()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        for first, last in marks:
            filler.fill_(1.0)
            first.record()
            fn()
            last.record()
        torch.cuda.synchronize()
        micros = [first.elapsed_time(last) * 1e3 for first, last in marks]
    return Timing(float(np.median(micros)), min(micros), max(micros))


def interpolate(positions: Sequence[int], times: Sequence[float], at: np.ndarray) -> np.ndarray:
    """The piecewise linear curve through the samples, read at `at`; flat beyond the first and the last sample."""
    return np.interp(at, positions, times)


def integrate(positions: Sequence[int], times: Sequence[float], L: int) -> float:
    """Mean microseconds per token over t = 0 .. L - 1 of the piecewise linear curve through the samples."""
    return float(interpolate(positions, times, np.arange(L)).mean())


class Captured:
    """A call without arguments, recorded once as a CUDA graph and replayed; without a GPU, the call itself."""

    def __init__(self, fn: Callable[[], object]) -> None:
        self.fn: Callable[[], object] = fn
        if torch.cuda.is_available():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    fn()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                fn()
            self.fn = graph.replay

    def __call__(self) -> None:
        self.fn()


# ---------------------------------------------------------------------------------------------------------- lazy, fused


@dataclass(frozen=True, slots=True)
class Tile:
    """How the fused lazy mixer is cut: rows and channels read at a time, warps, and how many programs to aim for."""

    rows: int
    channels: int
    warps: int
    programs: int


SMS = 132
TILES = (
    Tile(16, 128, 4, 4 * SMS),
    Tile(16, 128, 4, 16 * SMS),
    Tile(8, 128, 4, 8 * SMS),
    Tile(8, 256, 4, 4 * SMS),
    Tile(16, 256, 8, 8 * SMS),
    Tile(8, 512, 8, 16 * SMS),
)


@triton.jit(do_not_specialize=["t", "share"])
def _partial_sums(y, rho, scratch, t, share, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """scratch[s, c] = sum of y[i, c] rho[t - i, c] over the s-th share of the rows i < t."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    s = tl.program_id(1)
    inside = c < C
    start = s * share
    last = tl.minimum(start + share, t)
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    while start < last:
        i = start + tl.arange(0, ROWS)
        mask = (i < last)[:, None] & inside[None, :]
        a = tl.load(y + (i.to(tl.int64) * C)[:, None] + c[None, :], mask=mask, other=0.0)
        b = tl.load(rho + ((t - i).to(tl.int64) * C)[:, None] + c[None, :], mask=mask, other=0.0)
        total += a * b
        start += ROWS
    tl.store(scratch + s.to(tl.int64) * C + c, tl.sum(total, axis=0), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _add_splits(scratch, base, out, splits, C, BASE: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr):
    """out[c] = sum over s < splits of scratch[s, c], plus base[c] if BASE; SPLITS, a power of two, is the room."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    s = tl.arange(0, SPLITS)
    inside = c < C
    mask = (s < splits)[:, None] & inside[None, :]
    total = tl.sum(tl.load(scratch + (s * C)[:, None] + c[None, :], mask=mask, other=0.0), axis=0)
    if BASE:
        total += tl.load(base + c, mask=inside, other=0.0)
    tl.store(out + c, total, mask=inside)


def lazy_fused(y: Tensor, rho: Tensor, t: int, out: Tensor, base: Tensor | None = None, tile: Tile = TILES[0]) -> None:
    """out[c] = sum over i < t of y[i, c] rho[t - i, c], plus base[c] if given: all layers in two launches.

    y and rho are float32, contiguous and time-major [.., C], with at least t and t + 1 rows; out and base are [C].
    Reads 2 t C numbers, once. Time is shared out over programs, whose sums a second kernel adds.
    """
    C = out.shape[0]
    blocks = triton.cdiv(C, tile.channels)
    wanted = max(1, min(tile.programs // blocks, triton.cdiv(t, tile.rows)))
    share = triton.cdiv(max(1, triton.cdiv(t, wanted)), tile.rows) * tile.rows
    splits = max(1, triton.cdiv(t, share))
    scratch = torch.empty(splits, C, device=out.device)
    _partial_sums[(blocks, splits)](
        y, rho, scratch, t, share, C, ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps
    )
    start = out if base is None else base
    padded = triton.next_power_of_2(splits)
    _add_splits[(triton.cdiv(C, 64),)](
        scratch, start, out, splits, C, BASE=base is not None, SPLITS=padded, CHANNELS=64, num_warps=4
    )


def lazy_fused_time(
    y: Tensor, rho: Tensor, t: int, out: Tensor, base: Tensor | None = None, repeats: int = 5
) -> Timing:
    """The fused lazy mixer's time at position t, with the best of the tiles for this t."""
    tiles = TILES if y.is_cuda else TILES[:1]
    return min(device_time(lambda tile=tile: lazy_fused(y, rho, t, out, base, tile), repeats) for tile in tiles)


# ------------------------------------------------------------------------------------------------ lazy and eager, plain


def lazy_plain(y: Tensor, reversed_rho: Tensor, t: int, layers: int, form: str = "einsum") -> Tensor:
    """[C]: sum over i < t of y[c, i] rho[c, t - i], in plain PyTorch, one call per layer.

    y and reversed_rho are channel-major [C, L], with reversed_rho[c, L - 1 - j] = rho[c, j]. `form` is "einsum", one
    dot product per channel, or "sum", the products in memory and then their sums.
    """
    C, L = y.shape
    D = C // layers
    parts = []
    for first in range(0, C, D):
        past = y[first : first + D, :t]
        taps = reversed_rho[first : first + D, L - 1 - t : L - 1]
        parts.append(torch.einsum("ct,ct->c", past, taps) if form == "einsum" else (past * taps).sum(dim=1))
    return torch.cat(parts)


def eager_plain(z: Sequence[Tensor], rho: Sequence[Tensor], y: Tensor, t: int) -> None:
    """Adds the share of the inputs y [layers, D] of position t to all later positions, in place, one call per layer.

    z and rho hold one contiguous [L, D] per layer.
    """
    for sums, taps, row in zip(z, rho, y, strict=True):
        sums[t + 1 :].addcmul_(taps[1 : sums.shape[0] - t], row)


# ------------------------------------------------------------------------------------------------------------- epoched


def epoch_length(L: int) -> int:
    """FutureFill's epoch: sqrt(L log2 L), rounded up to a multiple of 256."""
    return 256 * math.ceil(round(math.sqrt(L * math.log2(L))) / 256)


def fast_length(n: int) -> int:
    """The least even number from n on without prime factors above 7."""
    n += n % 2
    while True:
        rest = n
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 2


def rectangle(past: Tensor, taps: Tensor, epoch: int) -> Tensor:
    """[D, epoch]: what the past [D, t] gives to positions t .. t + epoch - 1, by FFT.

    A circle of t + epoch points is enough: what wraps around falls on positions before t.
    """
    t = past.shape[1]
    n = fast_length(t + epoch)
    spectrum = torch.fft.rfft(past, n).mul_(torch.fft.rfft(taps[:, : t + epoch], n))
    return torch.fft.irfft(spectrum, n)[:, t : t + epoch]


class Epoched:
    """FutureFill: once per epoch one FFT rectangle per layer, from the whole past into the epoch; lazy inside of it.

    past and taps are channel-major [C, L], for the FFT. The epoch's own inputs and the first taps are time-major.
    """

    def __init__(self, past: Tensor, taps: Tensor, layers: int, epoch: int | None = None) -> None:
        C, L = taps.shape
        self.past, self.taps, self.layers = past, taps, layers
        self.epoch = min(epoch_length(L) if epoch is None else epoch, L)
        self.rho = taps[:, : self.epoch].T.contiguous()
        self.inputs = torch.empty(self.epoch, C, device=taps.device).normal_()
        self.filled = torch.empty(self.epoch, C, device=taps.device).normal_()

    def fill(self, t: int) -> None:
        """The work at the start of the epoch at t: the last epoch's inputs join the past; then the rectangles."""
        if t == 0:
            self.filled.zero_()
            return
        self.past[:, t - self.epoch : t] = self.inputs.T
        D = self.past.shape[0] // self.layers
        for first in range(0, self.past.shape[0], D):
            layer = slice(first, first + D)
            self.filled[:, layer] = rectangle(self.past[layer, :t], self.taps[layer], self.epoch).T

    def mix(self, t: int, out: Tensor) -> None:
        """out[c] = sum over i < t of y[i, c] rho[t - i, c], for the positions one after the other."""
        r = t % self.epoch
        if r == 0:
            self.fill(t)
        lazy_fused(self.inputs, self.rho, r, out, self.filled[r])

    def push(self, t: int, y: Tensor) -> None:
        """Takes the inputs y [C] of position t."""
        self.inputs[t % self.epoch] = y

    def rectangle_time(self, t: int, repeats: int = 3) -> Timing:
        """What the start of the epoch at t costs, all layers; t is a multiple of the epoch, at least one epoch."""
        return device_time(lambda: self.fill(t), repeats)

    def inside_time(self, r: int, out: Tensor, repeats: int = 5) -> Timing:
        """What a token costs r positions into its epoch, the rectangle aside."""
        return lazy_fused_time(self.inputs, self.rho, r, out, self.filled[r], repeats)


# ------------------------------------------------------------------------------------------------------- whole steps


def mlp(width: int) -> nn.Module:
    """Two linear layers with 4 x width between them, tanh GELU."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


class HyenaBlock(nn.Module):
    """One pre-norm block of an order-2 Hyena model, one position at a time, with the long convolution left out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.taps = nn.Parameter(torch.randn(3, 3 * width))
        self.bias = nn.Parameter(torch.randn(3 * width))
        self.skip = nn.Parameter(torch.randn(width))
        self.mlp = mlp(width)

    def short(self, u: Tensor, pending: Tensor) -> Tensor:
        """The 3-tap convolution of u [1, 3 D]; pending [2, 3 D] is what the past gives this position and the next."""
        out = pending[0] + torch.addcmul(self.bias, self.taps[0], u)
        torch.addcmul(pending[1], self.taps[1], u[0], out=pending[0])
        torch.mul(self.taps[2], u[0], out=pending[1])
        return out

    def forward(self, x: Tensor, mixed: Tensor, pending: Tensor, staged: Tensor) -> Tensor:
        """x [1, D] -> [1, D]. `mixed` [D] stands for the convolution's past; its input is left in `staged` [D]."""
        gate, key, value = self.short(self.in_proj(self.norm1(x)), pending).chunk(3, dim=1)
        y = key * value
        staged.copy_(y[0])
        z = (mixed + self.skip * y).to(x.dtype)
        x = x + self.out_proj(gate * z)
        return x + self.mlp(self.norm2(x))


class PlainStep:
    """A whole decode step of an order-2 Hyena model in plain PyTorch, mixing removed, as one CUDA graph.

    From a token to the next one: embedding, blocks, norm, head, argmax. A given float32 row takes the place of what
    the long convolutions sum over the past, so that a mixer's time can be added.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        vocabulary: int = VOCABULARY,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        with torch.device(device):
            self.embedding = nn.Embedding(vocabulary, width).to(dtype)
            self.blocks = [HyenaBlock(width).to(dtype) for _ in range(layers)]
            self.norm = nn.LayerNorm(width).to(dtype)
            self.head = nn.Linear(width, vocabulary, bias=False).to(dtype)
            self.token = torch.ones(1, dtype=torch.long)
            self.pending = torch.randn(layers, 2, 3 * width).to(dtype)
            self.mixed = torch.randn(layers, width)
            self.staged = torch.randn(layers, width)
        with torch.no_grad():
            self.replay = Captured(self.step)

    @torch.no_grad()
    def step(self) -> None:
        """One position, call by call."""
        x = self.embedding(self.token)
        for block, mixed, pending, staged in zip(self.blocks, self.mixed, self.pending, self.staged, strict=True):
            x = block(x, mixed, pending, staged)
        self.token.copy_(self.head(self.norm(x)).argmax(-1))

    def step_time(self, repeats: int = 20) -> Timing:
        """The graph's time."""
        return device_time(self.replay, repeats)


class AttentionBlock(nn.Module):
    """One pre-norm GPT block, one position at a time; `attend` maps queries, keys and values to heads' outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """x [1, D] -> [1, D]."""
        q, k, v = self.in_proj(self.norm1(x)).view(3, 1, heads, 1, -1)
        x = x + self.out_proj(attend(q, k, v).reshape(1, -1))
        return x + self.mlp(self.norm2(x))


BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


class TransformerStep:
    """A whole decode step of a GPT of the same size over a preallocated cache full of noise.

    The cache is [layers, 2, 1, heads, L, 64], keys and values. The step at t writes row t and reads rows 0 .. t.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        length: int,
        vocabulary: int = VOCABULARY,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.heads = max(1, width // 64)
        self.backend: SDPBackend | None = None
        self.refused: dict[str, str] = {}
        with torch.device(device):
            self.embedding = nn.Embedding(vocabulary, width).to(dtype)
            self.places = torch.empty(length, width, dtype=dtype).normal_()
            self.blocks = [AttentionBlock(width).to(dtype) for _ in range(layers)]
            self.norm = nn.LayerNorm(width).to(dtype)
            self.head = nn.Linear(width, vocabulary, bias=False).to(dtype)
            self.token = torch.ones(1, dtype=torch.long)
            self.cache = torch.empty(layers, 2, 1, self.heads, length, width // self.heads, dtype=dtype).normal_()

    def attend(self, layer: int, t: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores the key and the value of position t, and attends to positions 0 .. t; all are [1, heads, 1, 64]."""
        keys, values = self.cache[layer]
        keys[:, :, t : t + 1] = k
        values[:, :, t : t + 1] = v
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, keys[:, :, : t + 1], values[:, :, : t + 1])

    @torch.no_grad()
    def step(self, t: int) -> None:
        """Position t, call by call."""
        x = self.embedding(self.token) + self.places[t]
        for layer, block in enumerate(self.blocks):
            x = block(x, self.heads, lambda q, k, v, layer=layer: self.attend(layer, t, q, k, v))
        self.token.copy_(self.head(self.norm(x)).argmax(-1))

    def choose_backend(self, t: int) -> None:
        """Takes the fastest implementation of attention for position t, of those that run here and are right.

        An output further from the float32 one than 1 / 16 of its norm is wrong: rounding to bfloat16 does 1 / 100.
        """
        shape = (3, 1, self.heads, 1, self.cache.shape[-1])
        q, k, v = torch.randn(shape, device=self.cache.device).to(self.cache.dtype)
        with sdpa_kernel(SDPBackend.MATH):
            self.cache[0, 0, :, :, t], self.cache[0, 1, :, :, t] = k[:, :, 0], v[:, :, 0]
            exact = F.scaled_dot_product_attention(q.float(), *self.cache[0, :, :, :, : t + 1].float())
        times: list[tuple[float, SDPBackend]] = []
        for self.backend in BACKENDS:
            try:
                error = (self.attend(0, t, q, k, v).float() - exact).norm() / exact.norm()
                if not float(error) < 1 / 16:
                    raise RuntimeError(f"wrong at {t} by {float(error):.3g}")
                times.append((device_time(lambda: self.attend(0, t, q, k, v), 3).median, self.backend))
            except RuntimeError as reason:
                self.refused[self.backend.name] = str(reason).split("\n")[0]
        self.backend = min(times, key=lambda pair: pair[0])[1]

    def step_time(self, t: int, repeats: int = 5) -> Timing:
        """The time of the step at position t as one CUDA graph, with the attention that is fastest there."""
        if self.cache.is_cuda:
            self.choose_backend(t)
        return device_time(Captured(lambda: self.step(t)), repeats)


# -------------------------------------------------------------------------------------------------------------- checks


def direct_sum(y: Tensor, rho: Tensor, t: int) -> Tensor:
    """[C] in float64: sum over i < t of y[i] rho[t - i], time-major."""
    return (y[:t].double() * rho[1 : t + 1].flip(0).double()).sum(dim=0)


def demand(name: str, got: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Raises AssertionError unless every |got - exact| is within its bound."""
    excess = (got.double() - exact).abs() - bound
    if not bool((excess <= 0).all()):
        i = int(torch.where(excess.isnan(), math.inf, excess).argmax())
        error = float((got.double() - exact).abs().flatten()[i])
        raise AssertionError(f"{name}: error {error:.3g} where {float(bound.flatten()[i]):.3g} is allowed.")


def check(device: str | None = None) -> None:
    """Compares every mixer with a float64 direct sum, and attention with the full forward, at small sizes.

    Bounds come from the data: t eps sum |y| |rho| for direct sums, 8 eps log2(n) ||y|| ||rho|| for an FFT of n points.
    Raises AssertionError with the figures.
    """
    device = default_device() if device is None else device
    layers, C, L = 2, 40, 300
    D = C // layers
    generator = torch.Generator().manual_seed(0)
    y, rho = torch.randn(2, L, C, generator=generator).to(device)
    exact = torch.stack([direct_sum(y, rho, t) for t in range(L)])
    size = torch.stack([direct_sum(y.abs(), rho.abs(), t) for t in range(L)])
    bound = torch.arange(L, device=device)[:, None] * EPS * size
    out = torch.empty(C, device=device)

    for wide in (1, 16):
        inputs, taps, total = y.repeat(1, wide), rho.repeat(1, wide), torch.empty(C * wide, device=device)
        for tile in TILES:
            for t in (0, 1, 2, 15, 16, 17, 130, 255, 299):
                total.fill_(math.nan)
                lazy_fused(inputs, taps, t, total, tile=tile)
                demand(f"lazy_fused {tile} at {t}", total, exact[t].repeat(wide), bound[t].repeat(wide))

    columns, reversed_rho = y.T.contiguous(), rho.T.flip(1).contiguous()
    for form in ("einsum", "sum"):
        for t in (1, 2, 17, 255, 299):
            got = lazy_plain(columns, reversed_rho, t, layers, form)
            demand(f"lazy_plain {form} at {t}", got, exact[t], bound[t])

    z = [torch.zeros(L, D, device=device) for _ in range(layers)]
    taps = [part.contiguous() for part in rho.split(D, dim=1)]
    for t in range(L):
        eager_plain(z, taps, y[t].view(layers, D), t)
    demand("eager_plain", torch.cat(z, dim=1), exact, bound)

    norms = y.double().norm(dim=0) * rho.double().norm(dim=0)
    for epoch in (32, None):
        past = torch.full((C, L), math.nan, device=device)
        epoched = Epoched(past, rho.T.contiguous(), layers, epoch)
        n = fast_length(L + epoched.epoch)
        for t in range(L):
            epoched.mix(t, out)
            epoched.push(t, y[t])
            fft = 8 * EPS * math.log2(n) * norms if t >= epoched.epoch else 0 * norms
            demand(f"epoched by {epoched.epoch} at {t}", out, exact[t], bound[t] + fft)

    check_attention(device)
    check_short(device)


def check_attention(device: str) -> None:
    """One layer's cached attention, position after position, against the full causal one in float64.

    With s = q k / 8 and p = softmax(s), an error d of the scores moves p by a factor within e^(2 d), so the output may
    err by (t + 8 + 4 (64 + 2) max |q| |k| / 8) eps sum p |v|.
    """
    length, heads, size = 70, 2, 64
    step = TransformerStep(1, heads * size, length, 64, device, torch.float32)
    q, k, v = torch.randn(3, 1, heads, length, size, generator=torch.Generator().manual_seed(1)).to(device)
    got = torch.cat([step.attend(0, t, *(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(length)], dim=2)
    scores = q.double() @ k.double().mT / math.sqrt(size)
    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    p = scores.masked_fill(hidden, -math.inf).softmax(-1)
    largest = (q.double().abs() @ k.double().abs().mT / math.sqrt(size)).amax()
    terms = torch.arange(length, device=device)[:, None] + 8 + 4 * (size + 2) * largest
    demand("attention", got, p @ v.double(), EPS * terms * (p @ v.double().abs()))


def check_short(device: str) -> None:
    """The step's short convolution by pending sums against the direct one in float64."""
    with torch.no_grad(), torch.device(device):
        block = HyenaBlock(8)
        u, pending = torch.randn(9, 24), torch.zeros(2, 24)
        got = torch.cat([block.short(row[None], pending) for row in u])
        padded, taps, bias = F.pad(u, (0, 0, 2, 0)).double(), block.taps.double(), block.bias.double()
        exact = bias + sum(taps[j] * padded[2 - j : 11 - j] for j in range(3))
        size = bias.abs() + sum(taps[j].abs() * padded[2 - j : 11 - j].abs() for j in range(3))
    demand("short convolution", got, exact, 4 * EPS * size)


# --------------------------------------------------------------------------------------------------------- measurement


def positions_below(L: int) -> list[int]:
    """The sampled positions of a sequence of length L, its last one among them."""
    return [*(t for t in POSITIONS if t < L - 1), L - 1]


def row(
    name: str, what: str, mean: float, positions: Sequence[int], timings: Sequence[Timing], **more: Any
) -> dict[str, Any]:
    """One baseline's result, ready for JSON."""
    return {
        "name": name,
        "what": what,
        "mean_us": mean,
        "positions": list(positions),
        "times_us": [t.median for t in timings],
        "spread": [[t.low, t.high] for t in timings],
        **more,
    }


def rates(sizes: Sequence[int], timings: Sequence[Timing]) -> list[float]:
    """Bytes per second."""
    return [size / (t.median * 1e-6) for size, t in zip(sizes, timings, strict=True)]


def noise(*shape: int, device: str) -> Tensor:
    """Float32 noise made in place; small, so that sums of it stay ordinary numbers."""
    return torch.empty(*shape, device=device).normal_(std=0.1)


def medians(timings: Sequence[Timing]) -> list[float]:
    """The median of each."""
    return [t.median for t in timings]


def measure_lazy_fused(M: int, D: int, L: int, device: str) -> dict[str, Any]:
    """The strong lazy mixer, first compared with the direct sum at the last position in some channels."""
    y, rho, out = noise(L, M * D, device=device), noise(L, M * D, device=device), noise(M * D, device=device)
    places = positions_below(L)
    some, last = [0, M * D // 2, M * D - 1], places[-1]
    a, b = y[:, some], rho[:, some]
    for tile in TILES if y.is_cuda else TILES[:1]:
        lazy_fused(y, rho, last, out, tile=tile)
        bound = last * EPS * direct_sum(a.abs(), b.abs(), last)
        demand(f"lazy_fused {tile} at {last}", out[some], direct_sum(a, b, last), bound)
    timings = [lazy_fused_time(y, rho, t, out) for t in places]
    speed = rates([8 * t * M * D for t in places], timings)
    return row("lazy_fused", "mixer", integrate(places, medians(timings), L), places, timings, bytes_per_s=speed)


def measure_lazy_plain(M: int, D: int, L: int, device: str) -> dict[str, Any]:
    """The lazy mixer in plain PyTorch, in the faster of its two forms at each position."""
    y, reversed_rho = noise(M * D, L, device=device), noise(M * D, L, device=device)
    places, timings, forms = positions_below(L), [], []
    for t in places:
        tried = {
            form: device_time(lambda t=t, form=form: lazy_plain(y, reversed_rho, t, M, form), 3)
            for form in ("einsum", "sum")
        }
        forms.append(min(tried, key=lambda form: tried[form]))
        timings.append(tried[forms[-1]])
    speed = rates([8 * t * M * D for t in places], timings)
    mean = integrate(places, medians(timings), L)
    return row("lazy_plain", "mixer", mean, places, timings, bytes_per_s=speed, forms=forms)


def measure_eager_plain(M: int, D: int, L: int, device: str) -> dict[str, Any]:
    """The eager mixer in plain PyTorch."""
    z, rho = ([noise(L, D, device=device) for _ in range(M)] for _ in range(2))
    y = noise(M, D, device=device)
    places = positions_below(L)
    timings = [device_time(lambda t=t: eager_plain(z, rho, y, t), 4) for t in places]
    speed = rates([12 * (L - 1 - t) * M * D for t in places], timings)
    return row("eager_plain", "mixer", integrate(places, medians(timings), L), places, timings, bytes_per_s=speed)


def measure_epoched(M: int, D: int, L: int, device: str) -> dict[str, Any]:
    """FutureFill: positions and times are those of the rectangles, the tokens between them have keys of their own."""
    epoched = Epoched(noise(M * D, L, device=device), noise(M * D, L, device=device), M)
    K, out = epoched.epoch, noise(M * D, device=device)
    starts = np.arange(K, L, K)
    places = sorted({min(max(K, t // K * K), int(starts[-1])) for t in positions_below(L)}) if len(starts) else []
    timings = [epoched.rectangle_time(t) for t in places]
    depths = sorted({0, 16, *(K * i // 8 for i in range(1, 8)), K - 1})
    inside = [epoched.inside_time(r, out) for r in depths]
    mean = float(interpolate(depths, medians(inside), np.arange(L) % K).mean())
    share = float(interpolate(places, medians(timings), starts).sum() / L) if places else 0.0
    return row(
        "epoched",
        "mixer",
        mean + share,
        places,
        timings,
        epoch=K,
        rectangles_mean_us=share,
        inside_mean_us=mean,
        inside_positions=depths,
        inside_times_us=medians(inside),
        inside_spread=[[t.low, t.high] for t in inside],
    )


def measure_plain_step(M: int, D: int, L: int, device: str) -> dict[str, Any]:
    """The Hyena step without mixing; the same at every position."""
    timing = PlainStep(M, D, device=device).step_time()
    return row("plain_step", "step", timing.median, [0], [timing])


def measure_transformer(M: int, D: int, L: int, device: str) -> dict[str, Any]:
    """The Transformer's whole step."""
    step = TransformerStep(M, D, L, device=device)
    places, timings, backends = positions_below(L), [], []
    for t in places:
        timings.append(step.step_time(t))
        backends.append(None if step.backend is None else step.backend.name)
    weights = [p for module in (*step.blocks, step.norm, step.head) for p in module.parameters()]
    fixed = sum(p.numel() * p.element_size() for p in weights)
    speed = rates([fixed + 4 * (t + 1) * M * D for t in places], timings)
    mean = integrate(places, medians(timings), L)
    return row(
        "transformer", "whole", mean, places, timings, bytes_per_s=speed, backends=backends, refused=step.refused
    )


def measure(layers: int = 18, width: int = 768, length: int = 131072, device: str = "cuda") -> list[dict[str, Any]]:
    """Checks every baseline, then times them one after the other; one row each.

    mean_us is over the positions 0 .. length - 1. "what" says whether the time is a mixer's, a step's without mixing,
    or a whole step's. Memory is given back between baselines.
    """
    check(device)
    rows = []
    for run in (
        measure_lazy_fused,
        measure_lazy_plain,
        measure_eager_plain,
        measure_epoched,
        measure_plain_step,
        measure_transformer,
    ):
        rows.append(run(layers, width, length, device))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Prints the rows as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--small", "--quick", action="store_true", help="2 layers of width 64, 2048 positions; runs on a CPU too"
    )
    args = parser.parse_args()
    rows = measure(2, 64, 2048, default_device()) if args.small else measure()
    for result in rows:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
