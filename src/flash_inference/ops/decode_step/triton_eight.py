"""The decode step of order-N Hyena blocks for five to eight rows on a GPU: `triton_batch`, turned around.

A product of the tensor cores has 16 rows and 8 columns. Here output rows are its rows and the sequences its columns, so
that up to eight of them fill it; the parts of activations in front of tf32 and behind it have sums of their own, and
neither chain of products waits for the other. That is half of the products and two thirds of the instructions of
`triton_batch`, whose kernels are faster for more rows.

LayerNorm is folded as there: whoever writes x also writes z = gamma (x - c) and, for its few channels, the sums of
x - c and of its square (`moments` [2, B, programs]).

Activations are [B, channels] float32; `history` is time-major [rows, M D, B], `pending` [TAPS - 1, B, (N + 1) D].
"""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flash_inference.ops.decode_step.triton import gelu, largest
from flash_inference.ops.decode_step.triton_batch import GpuBatchStep, add_pairs, tf32
from flash_inference.ops.decode_step.triton_log import leave_token


@triton.jit
def _stream(w, row, wanted, N: tl.constexpr, WARPS: tl.constexpr, DEPTH: tl.constexpr):
    """Rows of a matrix [.., N] in pieces [WARPS, ROWS, DEPTH]: every warp holds its own part of the sum."""
    place = tl.arange(0, WARPS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    pieces = ()
    for c in tl.static_range((N + WARPS * DEPTH - 1) // (WARPS * DEPTH)):
        k = c * WARPS * DEPTH + place
        known = wanted[None, :, None] & (k < N)
        pieces = pieces + (tl.load(w + row[None, :, None].to(tl.int64) * N + k, known, 0.0),)
    return pieces


@triton.jit
def _add_product(sums, rests, w, a, WIDE: tl.constexpr):
    """sums + w a; `rests` take what stands behind tf32."""
    if WIDE:
        return tl.dot(w, a, sums, input_precision="tf32x3"), rests
    else:
        upper = tf32(a)
        rests = tl.dot(w, a - upper, rests, input_precision="tf32")
        return tl.dot(w, upper, sums, input_precision="tf32"), rests


@triton.jit
def _product(
    v, weights, N: tl.constexpr, B: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows in pieces times v [B, N]: [ROWS, BATCH]."""
    column = (tl.program_id(1) * BATCH + tl.arange(0, BATCH))[None, None, :]
    place = tl.arange(0, WARPS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, :, None]
    inputs = ()
    for c in tl.static_range(len(weights)):
        k = c * WARPS * DEPTH + place
        inputs = inputs + (tl.load(v + column * N + k, (column < B) & (k < N), 0.0),)
    sums = tl.zeros([WARPS, ROWS, BATCH], tl.float32)
    rests = tl.zeros([WARPS, ROWS, BATCH], tl.float32)
    for c in tl.static_range(len(weights)):
        sums, rests = _add_product(sums, rests, weights[c].to(tl.float32), inputs[c], WIDE)
    return tl.sum(sums + rests, 0)


@triton.jit
def _fetch_moments(
    moments, centres, batch, here, WHICH: tl.constexpr, B: tl.constexpr, D: tl.constexpr, SHARE: tl.constexpr,
    PROGRAMS: tl.constexpr
):  # fmt: skip
    """Sums of x - c and of its square [BATCH, PROGRAMS] of SHARE channels each, and c [BATCH]."""
    PARTS: tl.constexpr = (D + SHARE - 1) // SHARE
    p = tl.arange(0, PROGRAMS)[None, :]
    at = moments + batch[:, None] * PARTS + p
    known = (p < PARTS) & here[:, None]
    centre = tl.load(centres + WHICH * B + batch, here, 0.0)
    return tl.load(at, known, 0.0), tl.load(at + PARTS * B, known, 0.0), centre


@triton.jit
def _deviation(sums, squares, eps, D: tl.constexpr):
    """The mean of x - c and 1 / deviation [BATCH]."""
    total, square = tl.reduce((sums, squares), 1, add_pairs)
    mean = total / D
    return mean, tl.rsqrt(square / D - mean * mean + eps)


@triton.jit
def _normed(
    products, slope, bias, sums, squares, centre, centres, batch, here, eps, WHICH: tl.constexpr, B: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """W norm(x) + b [ROWS, BATCH] from W z; the first program tells the mean to whoever writes x next."""
    mean, inverse = _deviation(sums, squares, eps, D)
    if tl.program_id(0) == 0:
        tl.store(centres + (1 - WHICH) * B + batch, centre + mean, here)
    return (products - mean[None, :] * slope) * inverse[None, :] + bias


@triton.jit(do_not_specialize=["offset", "lane"])
def project_and_mix(
    z, moments, centres, w, b, w_gamma, short_w, short_b, pending, history, near, diagonal, clock, out, offset,
    lane, C, eps, B: tl.constexpr, D: tl.constexpr, ORDER: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr,
    BLOCK: tl.constexpr, SHARE: tl.constexpr, PROGRAMS: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WARPS:
    tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, D] = x_0 z_last, as `triton.project_and_mix`; `b` holds W beta too, and `w_gamma` is W gamma.

    A program's channels stand side by side for all ORDER + 1 groups of the projection, GROUPS a power of two: one
    product makes them all.
    """
    if PDL:
        gdc_launch_dependents()
    W: tl.constexpr = (ORDER + 1) * D
    side = tl.arange(0, GROUPS * ROWS)
    channel = side // ROWS * D + tl.program_id(0) * ROWS + side % ROWS
    whole = (side // ROWS <= ORDER) & (tl.program_id(0) * ROWS + side % ROWS < D)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    here = batch < B
    every = whole[:, None] & here[None, :]
    weights = _stream(w, channel, whole, D, WARPS, DEPTH)
    bias = tl.load(b + channel, whole, 0.0)[:, None]
    slope = tl.load(w_gamma + channel, whole, 0.0)[:, None]
    taps = ()
    owed = ()
    for j in tl.static_range(TAPS):
        taps = taps + (tl.load(short_w + (TAPS - 1 - j) * W + channel, whole, 0.0)[:, None],)
        if j + 1 < TAPS:
            owed = owed + (tl.load(pending + (j * B + batch)[None, :] * W + channel[:, None], every, 0.0),)
        else:
            owed = owed + (tl.load(short_b + channel, whole, 0.0)[:, None],)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = row < D
    both = wanted[:, None] & here[None, :]
    base = tl.load(clock)
    now = history + ((base + offset) * C + lane + row)[:, None] * B + batch[None, :]
    past = tl.arange(0, BLOCK)[:, None, None]
    earlier = past < offset
    sums = ()
    own = ()
    for o in tl.static_range(ORDER - 1):
        column = (lane + o * D + row)[None, :, None]
        at = history + ((base + past) * C + column) * B + batch[None, None, :]
        y = tl.load(at, both[None, :, :] & earlier, 0.0).to(tl.float32)
        rho = tl.load(near + (offset - past) * C + column, wanted[None, :, None] & earlier, 0.0)
        sums = sums + (tl.load(now + o * D * B, both, 0.0).to(tl.float32) + tl.sum(y * rho, 0),)
        own = own + (tl.load(diagonal + lane + o * D + row, wanted, 0.0)[:, None],)
    if PDL:
        gdc_wait()
    first, second, centre = _fetch_moments(moments, centres, batch, here, 0, B, D, SHARE, PROGRAMS)
    u = _product(z, weights, D, B, BATCH, GROUPS * ROWS, WARPS, DEPTH, WIDE)
    u = _normed(u, slope, bias, first, second, centre, centres, batch, here, eps, 0, B, D)
    for j in tl.static_range(TAPS - 1):
        at = pending + (j * B + batch)[None, :] * W + channel[:, None]
        tl.store(at, owed[j + 1] + u * taps[j + 1], every)
    gates = tl.reshape(u * taps[0] + owed[0], (GROUPS, ROWS, BATCH))
    group = tl.arange(0, GROUPS)[:, None, None]
    v = tl.sum(tl.where(group == ORDER, gates, 0.0), 0)
    for o in tl.static_range(ORDER - 1):
        y = tl.sum(tl.where(group == ORDER - 1 - o, gates, 0.0), 0) * v
        v = sums[o] + own[o] * y
        tl.store(now + o * D * B, y.to(history.dtype.element_ty), both)
    gate = tl.sum(tl.where(group == 0, gates, 0.0), 0)
    tl.store(out + batch[None, :] * D + row[:, None], gate * v, both)


@triton.jit
def add_product(
    x, v, w, b, gamma, z, moments, centres, B: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BATCH: tl.constexpr,
    ROWS: tl.constexpr, WHICH: tl.constexpr, WARPS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, PDL:
    tl.constexpr,
):  # fmt: skip
    """x [B, D] += v [B, N] w [D, N]^T + b; z = gamma (x - centres[WHICH]), and the moments of every ROWS channels."""
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    wanted = row < D
    here = batch < B
    both = wanted[:, None] & here[None, :]
    weights = _stream(w, row, wanted, N, WARPS, DEPTH)
    bias = tl.load(b + row, wanted, 0.0).to(tl.float32)[:, None]
    scale = tl.load(gamma + row, wanted, 0.0)[:, None]
    at = batch[None, :] * D + row[:, None]
    if PDL:
        gdc_wait()
    centre = tl.load(centres + WHICH * B + batch, here, 0.0)[None, :]
    stands = tl.load(x + at, both, 0.0) + bias
    new = stands + _product(v, weights, N, B, BATCH, ROWS, WARPS, DEPTH, WIDE)
    tl.store(x + at, new, both)
    apart = tl.where(both, new - centre, 0.0)
    tl.store(z + at, scale * apart, both)
    total, square = tl.reduce((apart, apart * apart), 0, add_pairs)
    PARTS: tl.constexpr = (D + ROWS - 1) // ROWS
    tl.store(moments + batch * PARTS + program, total, here)
    tl.store(moments + (B + batch) * PARTS + program, square, here)


@triton.jit
def norm_expand(
    z, moments, centres, w, b, w_gamma, out, N, eps, B: tl.constexpr, D: tl.constexpr, SHARE: tl.constexpr, PROGRAMS:
    tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [B, N] = gelu(norm(x) w [N, D]^T + b), the tanh form of GELU."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    wanted = row < N
    here = batch < B
    weights = _stream(w, row, wanted, D, WARPS, DEPTH)
    bias = tl.load(b + row, wanted, 0.0)[:, None]
    slope = tl.load(w_gamma + row, wanted, 0.0)[:, None]
    if PDL:
        gdc_wait()
    first, second, centre = _fetch_moments(moments, centres, batch, here, 1, B, D, SHARE, PROGRAMS)
    u = _product(z, weights, D, B, BATCH, ROWS, WARPS, DEPTH, WIDE)
    u = _normed(u, slope, bias, first, second, centre, centres, batch, here, eps, 1, B, D)
    new = gelu(u)
    tl.store(out + batch[None, :] * N + row[:, None], new, wanted[:, None] & here[None, :])


@triton.jit
def head(
    z, moments, centres, w, b, w_gamma, logits, best, best_at, V, eps, B: tl.constexpr, D: tl.constexpr, SHARE:
    tl.constexpr, PROGRAMS: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDE:
    tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits [B, V] = norm(x) w [V, D]^T; each program also keeps its largest logits and the lowest tokens that have
    them, `best` and `best_at` [programs, B]. A row with a NaN among its logits keeps NaN.
    """
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    wanted = row < V
    here = batch < B
    both = wanted[:, None] & here[None, :]
    bias = tl.load(b + row, wanted, 0.0)[:, None]
    slope = tl.load(w_gamma + row, wanted, 0.0)[:, None]
    place = tl.arange(0, DEPTH)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    first, second, _ = _fetch_moments(moments, centres, batch, here, 0, B, D, SHARE, PROGRAMS)
    sums = tl.zeros([ROWS, BATCH], tl.float32)
    rests = tl.zeros([ROWS, BATCH], tl.float32)
    for c in range((D + DEPTH - 1) // DEPTH):
        k = c * DEPTH + place
        y = tl.load(z + batch[None, :] * D + k[:, None], (k < D)[:, None] & here[None, :], 0.0)
        known = wanted[:, None] & (k < D)[None, :]
        weights = tl.load(w + row[:, None].to(tl.int64) * D + k[None, :], known, 0.0)
        sums, rests = _add_product(sums, rests, weights.to(tl.float32), y, WIDE)
    mean, inverse = _deviation(first, second, eps, D)
    u = (sums + rests - mean[None, :] * slope) * inverse[None, :] + bias
    tl.store(logits + batch[None, :].to(tl.int64) * V + row[:, None], u, both)
    worst = tl.sum(((u != u) & both).to(tl.int32), 0) > 0
    u = tl.where(both & (u == u), u, -float("inf"))
    top = tl.max(u, 0)
    tl.store(best + program * B + batch, tl.where(worst, float("nan"), top), here)
    tl.store(best_at + program * B + batch, tl.min(tl.where(u == top[None, :], row[:, None], V), 0), here)


@triton.jit(do_not_specialize=["offset"])
def choose_and_embed(
    best, best_at, token, embedding, gamma, x, z, moments, centres, clock, tokens, host_tokens, stamps, offset,
    programs, V, step, B: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, GREEDY: tl.constexpr,
    LAST: tl.constexpr, PDL: tl.constexpr, STAMP: tl.constexpr,
):  # fmt: skip
    """x [B, D] = embedding[token], as `triton.choose_and_embed`: a program a row; logs are [rows, B]."""
    k = tl.arange(0, K)
    b = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    base = tl.load(clock + 2 + b)
    chosen = largest(best, best_at, b, B, programs, V, PIECES) if GREEDY else tl.load(token + b)
    row = tl.where(chosen < 0, 0, chosen)
    new = tl.load(embedding + row * D + k, k < D, 0.0).to(tl.float32)
    mean = tl.sum(new, 0) / D
    apart = tl.where(k < D, new - mean, 0.0)
    tl.store(centres + b, mean)
    tl.store(x + b * D + k, new, k < D)
    tl.store(z + b * D + k, tl.load(gamma + k, k < D, 0.0) * apart, k < D)
    tl.store(moments + b, tl.sum(apart, 0))
    tl.store(moments + B + b, tl.sum(apart * apart, 0))
    leave_token(token, row, chosen, clock, tokens, host_tokens, stamps, base, offset, step, b, B, LAST, STAMP)


class GpuEightStep(GpuBatchStep):
    """Launches one position of up to eight sequences, or eights of them, through all layers, head and choice.

    The interface of `GpuBatchStep`.
    """

    kernels = sys.modules[__name__]

    @property
    def share(self) -> int:
        """The embedding writes the moments of all channels together."""
        return self.width

    def start(self, rows: Tensor) -> None:
        """Puts embeddings [B, D] where the next position reads them."""
        rows = rows.float()
        apart = rows - rows.mean(1, keepdim=True)
        self.x.copy_(rows)
        self.centres[0] = rows.mean(1)
        self.z.copy_(self.layers[0].gammas[0] * apart)
        self.moments[: 2 * self.batch] = torch.cat([apart.sum(1), apart.square().sum(1)])

    @property
    def _embedded(self) -> tuple[list[Tensor], dict[str, int]]:
        return super()._embedded[0], {"B": self.batch, "K": int(triton.next_power_of_2(self.width))}
