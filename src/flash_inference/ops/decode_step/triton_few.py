"""The decode step of order-N Hyena blocks for 2 and 3 rows on a GPU: the kernels of `triton`, row after row.

A program holds its weights in registers, as for one row, and multiplies them by the vectors of the batch's rows, one
after the other; sums are scalars, gathered in vectors [BATCH] over the rows for what stands behind a product.

x, and what goes from kernel to kernel, is [B, channels] float32, each row as `triton` keeps a vector; `centres` [2, B];
`history` is time-major [rows, M D, B], `pending` [TAPS - 1, B, (N + 1) D].
"""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flash_inference.ops.decode_step.triton import (
    GpuStep,
    gelu,
    largest,
    place,
    placed,
    rows_held,
    scaled,
    spread,
    stream,
    weighted,
)
from flash_inference.ops.decode_step.triton_log import leave_token

FEW = 3
"""Up to so many rows this is faster than tensor cores: 221 us instead of 272 for 2, 264 instead of 275 for 3, but 297
where they take 276 for 4 (H100, 18 layers, D = 768, without tiles)."""


@triton.jit
def _streams(w, first, last, ROWS: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr):
    """Rows first, first + 1, .. of a matrix, each in pieces [1, 256 WARPS], if they are below `last`."""
    found = ()
    for r in tl.static_range(ROWS):
        row = first + r + tl.arange(0, 1)
        found = found + (stream(w, row, row < last, N, WARPS),)
    return found


@triton.jit
def _dots(held, weights, v, batch, b):
    """What is held for every row of weights [BATCH], with its product with the vector of row b."""
    found = ()
    for r in tl.static_range(len(weights)):
        found = found + (tl.where(batch == b, tl.sum(weighted(weights[r], v)), held[r]),)
    return found


@triton.jit
def _products(v, weights, batch, B: tl.constexpr, BATCH: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr):
    """v [B, N] times rows: [BATCH] for each."""
    KEPT: tl.constexpr = (N + 255) // 256 * 256
    held = (tl.zeros([BATCH], tl.float32),) * len(weights)
    for b in tl.static_range(B):
        held = _dots(held, weights, spread(v + b * KEPT, N, WARPS), batch, b)
    return held


@triton.jit
def _normed(
    x, gamma, centres, weights, slopes, biases, batch, eps, WHICH: tl.constexpr, B: tl.constexpr, BATCH: tl.constexpr,
    D: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """norm(x) times rows + biases: [BATCH] for each; the first program tells the means to the next LayerNorm."""
    KEPT: tl.constexpr = (D + 255) // 256 * 256
    held = (tl.zeros([BATCH], tl.float32),) * len(weights)
    sums = tl.zeros([BATCH], tl.float32)
    squares = tl.zeros([BATCH], tl.float32)
    centre = tl.load(centres + WHICH * B + batch, batch < B, 0.0)
    for b in tl.static_range(B):
        z, _, first, second = scaled(x + b * KEPT, gamma, centres + WHICH * B + b, 0, D, WARPS)
        held = _dots(held, weights, z, batch, b)
        sums = tl.where(batch == b, tl.sum(first), sums)
        squares = tl.where(batch == b, tl.sum(second), squares)
    mean = sums / D
    inverse = tl.rsqrt(squares / D - mean * mean + eps)
    if tl.program_id(0) == 0:
        tl.store(centres + (1 - WHICH) * B + batch, centre + mean, batch < B)
    found = ()
    for r in tl.static_range(len(weights)):
        found = found + ((held[r] - mean * slopes[r]) * inverse + biases[r],)
    return found


@triton.jit
def _scalars(v, first, last, ROWS: tl.constexpr):
    """Elements first, first + 1, .. of a vector, 0 from `last` on."""
    found = ()
    for r in tl.static_range(ROWS):
        found = found + (tl.load(v + first + r, first + r < last, 0.0).to(tl.float32),)
    return found


@triton.jit(do_not_specialize=["offset", "lane"])
def project_and_mix(
    x, gamma, centres, w, b, slope, short_w, short_b, pending, history, near, diagonal, clock, out, offset, lane, C,
    eps, B: tl.constexpr, BATCH: tl.constexpr, D: tl.constexpr, ORDER: tl.constexpr, TAPS: tl.constexpr, BLOCK:
    tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, D] = x_0 z_last, as `triton.project_and_mix`, for one channel."""
    tl.static_assert(ROWS == 1)
    if PDL:
        gdc_launch_dependents()
    W: tl.constexpr = (ORDER + 1) * D
    KEPT: tl.constexpr = (D + 255) // 256 * 256
    channel = tl.program_id(0)
    batch = tl.arange(0, BATCH)
    here = batch < B
    weights = ()
    biases = ()
    slopes = ()
    for g in tl.static_range(ORDER + 1):
        weights = weights + _streams(w, g * D + channel, W, 1, D, WARPS)
        biases = biases + (tl.load(b + g * D + channel),)
        slopes = slopes + (tl.load(slope + g * D + channel),)
    scale = spread(gamma, D, WARPS)
    base = tl.load(clock)
    past = tl.arange(0, BLOCK)
    sums = ()
    own = ()
    for o in tl.static_range(ORDER - 1):
        column = lane + o * D + channel
        at = history + ((base + past) * C + column)[:, None] * B + batch[None, :]
        y = tl.load(at, (past < offset)[:, None] & here[None, :], 0.0).to(tl.float32)
        rho = tl.load(near + (offset - past) * C + column, past < offset, 0.0)
        stands = tl.load(history + ((base + offset) * C + column) * B + batch, here, 0.0).to(tl.float32)
        sums = sums + (stands + tl.sum(y * rho[:, None], 0),)
        own = own + (tl.load(diagonal + column),)
    owed = ()
    taps = ()
    for g in tl.static_range(ORDER + 1):
        for k in tl.static_range(TAPS):
            taps = taps + (tl.load(short_w + (TAPS - 1 - k) * W + g * D + channel),)
            if k + 1 < TAPS:
                owed = owed + (tl.load(pending + (k * B + batch) * W + g * D + channel, here, 0.0),)
            else:
                owed = owed + (tl.load(short_b + g * D + channel) + tl.zeros([BATCH], tl.float32),)
    if PDL:
        gdc_wait()
    u = _normed(x, scale, centres, weights, slopes, biases, batch, eps, 0, B, BATCH, D, WARPS)
    gates = ()
    for g in tl.static_range(ORDER + 1):
        gates = gates + (u[g] * taps[g * TAPS] + owed[g * TAPS],)
        for k in tl.static_range(TAPS - 1):
            later = owed[g * TAPS + k + 1] + u[g] * taps[g * TAPS + k + 1]
            tl.store(pending + (k * B + batch) * W + g * D + channel, later, here)
    v = gates[ORDER]
    for o in tl.static_range(ORDER - 1):
        y = gates[ORDER - 1 - o] * v
        v = sums[o] + own[o] * y
        at = history + ((base + offset) * C + lane + o * D + channel) * B + batch
        tl.store(at, y.to(history.dtype.element_ty), here)
    tl.store(out + batch * KEPT + place(channel), gates[0] * v, here)


@triton.jit
def add_product(
    x, v, w, b, B: tl.constexpr, BATCH: tl.constexpr, D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, WARPS:
    tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """x [B, D] += v [B, N] w [D, N]^T + b."""
    if PDL:
        gdc_launch_dependents()
    KEPT: tl.constexpr = (D + 255) // 256 * 256
    first = tl.program_id(0) * ROWS
    batch = tl.arange(0, BATCH)
    weights = _streams(w, first, D, ROWS, N, WARPS)
    biases = _scalars(b, first, D, ROWS)
    if PDL:
        gdc_wait()
    stands = ()
    for r in tl.static_range(ROWS):
        wanted = (batch < B) & (first + r < D)
        stands = stands + (tl.load(x + batch * KEPT + place(first + r), wanted, 0.0) + biases[r],)
    found = _products(v, weights, batch, B, BATCH, N, WARPS)
    for r in tl.static_range(ROWS):
        wanted = (batch < B) & (first + r < D)
        tl.store(x + batch * KEPT + place(first + r), stands[r] + found[r], wanted)


@triton.jit
def norm_expand(
    x, gamma, centres, w, b, slope, out, eps, B: tl.constexpr, BATCH: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """out [B, N] = gelu(norm(x) w [N, D]^T + b), the tanh form of GELU."""
    if PDL:
        gdc_launch_dependents()
    KEPT: tl.constexpr = (N + 255) // 256 * 256
    first = tl.program_id(0) * ROWS
    batch = tl.arange(0, BATCH)
    weights = _streams(w, first, N, ROWS, D, WARPS)
    biases = _scalars(b, first, N, ROWS)
    slopes = _scalars(slope, first, N, ROWS)
    scale = spread(gamma, D, WARPS)
    if PDL:
        gdc_wait()
    found = _normed(x, scale, centres, weights, slopes, biases, batch, eps, 1, B, BATCH, D, WARPS)
    for r in tl.static_range(ROWS):
        new = gelu(found[r])
        tl.store(out + batch * KEPT + place(first + r), new, (batch < B) & (first + r < N))


@triton.jit
def head(
    x, gamma, centres, w, b, slope, logits, best, best_at, V, eps, B: tl.constexpr, BATCH: tl.constexpr, D:
    tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """logits [B, V] = norm(x) w [V, D]^T, and each program's largest ones `best` and `best_at` [programs, B], as
    `triton.head`.
    """
    program = tl.program_id(0)
    first = program * ROWS
    batch = tl.arange(0, BATCH)
    here = batch < B
    weights = _streams(w, first, V, ROWS, D, WARPS)
    biases = _scalars(b, first, V, ROWS)
    slopes = _scalars(slope, first, V, ROWS)
    scale = spread(gamma, D, WARPS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    found = _normed(x, scale, centres, weights, slopes, biases, batch, eps, 0, B, BATCH, D, WARPS)
    top = tl.full([BATCH], -float("inf"), tl.float32)
    at = tl.zeros([BATCH], tl.int32) + V
    bad = tl.zeros([BATCH], tl.int32)
    for r in tl.static_range(ROWS):
        u = found[r]
        wanted = here & (first + r < V)
        tl.store(logits + batch.to(tl.int64) * V + first + r, u, wanted)
        bad = bad | (wanted & (u != u)).to(tl.int32)
        more = wanted & (u > top)
        at = tl.where(more, first + r, at)
        top = tl.where(more, u, top)
    tl.store(best + program * B + batch, tl.where(bad > 0, float("nan"), top), here)
    tl.store(best_at + program * B + batch, at, here)


@triton.jit(do_not_specialize=["offset"])
def choose_and_embed(
    best, best_at, token, embedding, x, centres, clock, tokens, host_tokens, stamps, offset, programs, V, step, B:
    tl.constexpr, D: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, GREEDY: tl.constexpr, LAST: tl.constexpr,
    PDL: tl.constexpr, STAMP: tl.constexpr,
):  # fmt: skip
    """x [B, D] = embedding[token], as `triton.choose_and_embed`: a program a row; logs are [rows, B]."""
    KEPT: tl.constexpr = (D + 255) // 256 * 256
    k = tl.arange(0, K)
    b = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    base = tl.load(clock + 2 + b)
    chosen = largest(best, best_at, b, B, programs, V, PIECES) if GREEDY else tl.load(token + b)
    row = tl.where(chosen < 0, 0, chosen)
    new = tl.load(embedding + row * D + k, k < D, 0.0).to(tl.float32)
    tl.store(x + b * KEPT + place(k), new, k < D)
    tl.store(centres + b, tl.sum(new, 0) / D)
    leave_token(token, row, chosen, clock, tokens, host_tokens, stamps, base, offset, step, b, B, LAST, STAMP)


@dataclass(frozen=True)
class FewShapes:
    """Output rows a program and its warps, of every kernel; `mix` has one channel. Measured on an H100 at D = 768."""

    mix: tuple[int, int] = (1, 1)
    out: tuple[int, int] = (2, 1)
    fc1: tuple[int, int] = (4, 1)
    fc2: tuple[int, int] = (2, 2)
    head: tuple[int, int] = (4, 1)

    @classmethod
    def fit(cls, width: int, inner: int, itemsize: int = 2) -> FewShapes:
        """For a model of that width, as `triton.Shapes.fit`."""
        if width < 512:
            return cls(out=(1, 1), fc1=(2, 1), fc2=(1, 1))
        more = min(triton.next_power_of_2(triton.cdiv(width, 1024)), 8)
        fc1, fc2 = rows_held(4, width * itemsize, more), rows_held(2, inner * itemsize, 2 * more)
        return cls((1, more), (2, more), (fc1, more), (fc2, 2 * more), (rows_held(4, width * itemsize, more), more))


class GpuFewStep(GpuStep):
    """Launches one position of 2 to `FEW` sequences through all layers, head and choice, on the current stream.

    The interface of `GpuStep`, with rows [B, D], logits [B, V], token [B], logs [rows, B] and a clock of [2 + B].
    """

    kernels, fit = sys.modules[__name__], FewShapes.fit

    def __init__(self, *parts: Any, batch: int, **settings: Any) -> None:
        self.batch = batch
        super().__init__(*parts, **settings)

    @property
    def _rows(self) -> dict[str, int]:
        return {"B": self.batch, "BATCH": int(triton.next_power_of_2(self.batch))}

    @property
    def _embedded(self) -> tuple[list[Tensor], dict[str, int]]:
        tensors, constants = super()._embedded
        return tensors, {**constants, "B": self.batch}

    def _scratch(self) -> None:
        B, new = self.batch, self.diagonal.new_empty
        self.x, self.mixed, self.hidden = (
            self.diagonal.new_zeros(B, triton.cdiv(n, 256) * 256) for n in (self.width, self.width, self.inner)
        )
        self.centres, self.logits, self.best = new(2, B), new(B, self.vocab), new(self.programs, B)
        self.token = torch.zeros(B, dtype=torch.long, device=self.diagonal.device)
        self.best_at = torch.zeros(self.programs, B, dtype=torch.int32, device=self.diagonal.device)

    def start(self, rows: Tensor) -> None:
        """Puts embeddings [B, D] where the next position reads them."""
        rows = rows.float()
        self.x.copy_(torch.stack([placed(row) for row in rows]))
        self.centres[0] = rows.mean(1)
