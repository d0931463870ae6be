"""The decode step of order-N Hyena blocks for a batch on a GPU: the kernels of `triton`, on tensor cores.

A program owns a few output rows for some sequences of the batch. Output rows are the rows of a tensor-core product, the
sequences its columns, eight at a time. Warps share the sum over the inputs; one reduction adds their parts.

- Nothing passes through shared memory before that reduction. A lane of a product holds four neighbours of a row twice,
  16 inputs apart; as sums have no order, these may be eight neighbours in memory. Weights and activations are loaded
  that way, 16 bytes at a time, straight into the registers that are multiplied: weights before the kernel waits.
- A float32 activation is the sum of three bfloat16 numbers, taken apart in registers. Products with bfloat16 weights
  are exact then, sums float32. Other weights take the three products of tf32x3.
- A kernel lets the next one start when it has waited itself, not before: more programs than one kernel's ahead take the
  registers and the bandwidth that this one's need. So what the kernel before the last one wrote may be read unwaited.
- LayerNorm costs no pass of its own. Whoever writes x also writes z = gamma (x - c), with the gamma of the LayerNorm to
  come and the mean c that x had at the last one, and, for its few channels, the sums of x - c and of its square
  (`moments` [2, B, programs]). The next kernel multiplies z and adds up the moments meanwhile: W norm(x) =
  (W z - (mean - c) W gamma) / deviation + W beta, where W gamma and W beta are prepared. c is close to the mean, so
  that nothing cancels. `centres` [2, B] holds c in turns: the first for the LayerNorms before mixers and head, the
  second for those before MLPs.

Activations are [B, channels] float32; `history` is time-major [rows, M D, B], `pending` [TAPS - 1, B, (N + 1) D].
"""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flash_inference.ops.decode_step.numpy import LayerWeights
from flash_inference.ops.decode_step.triton import Layer, Step, folded, gelu, largest, widest
from flash_inference.ops.decode_step.triton_log import leave_token

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""The interpreter multiplies bfloat16 numbers as if they were integers."""


@triton.jit
def operand(matrix, row, known, N: tl.constexpr, WARPS: tl.constexpr):
    """Rows [8, E] of a matrix [.., N] as operands of products, in pieces [WARPS, 8 E, 32].

    Every warp takes its own inputs. They stand in the order in which lanes hold them in a product: the first four of
    each of four lanes' eight neighbours, then the second four.
    """
    E: tl.constexpr = row.shape[1]
    CHUNKS: tl.constexpr = (N + 32 * WARPS - 1) // (32 * WARPS)
    k = tl.arange(0, WARPS)[None, :, None, None] * (32 * CHUNKS) + tl.arange(0, 32)[None, None, None, :]
    start = matrix + (row.to(tl.int64) * N)[:, None, :, None]
    pieces = ()
    for c in tl.static_range(CHUNKS):
        inside = known[:, None, :, None]
        if CHUNKS * WARPS * 32 > N:
            inside = inside & (32 * c + k < N)
        piece = tl.reshape(tl.load(start + 32 * c + k, inside, 0.0), (8, WARPS, E, 4, 2, 4))
        pieces = pieces + (tl.reshape(tl.permute(piece, (1, 2, 0, 4, 3, 5)), (WARPS, 8 * E, 32)),)
    return pieces


@triton.jit
def columns(vectors, row, known, N: tl.constexpr, WARPS: tl.constexpr):
    """As `operand`, of float32 vectors [.., N]: a lane's eight neighbours come by two loads."""
    E: tl.constexpr = row.shape[1]
    CHUNKS: tl.constexpr = (N + 32 * WARPS - 1) // (32 * WARPS)
    four = tl.arange(0, 16)[None, None, None, :]
    k = tl.arange(0, WARPS)[None, :, None, None] * (32 * CHUNKS) + (four // 4 * 8 + four % 4)
    start = vectors + (row * N)[:, None, :, None]
    pieces = ()
    for c in tl.static_range(CHUNKS):
        place = 32 * c + k
        first = known[:, None, :, None]
        second = first
        if CHUNKS * WARPS * 32 > N:
            first = first & (place < N)
            second = second & (place + 4 < N)
        both = tl.join(tl.load(start + place, first, 0.0), tl.load(start + place + 4, second, 0.0))
        piece = tl.permute(tl.reshape(both, (8, WARPS, E, 4, 4, 2)), (1, 2, 0, 5, 3, 4))
        pieces = pieces + (tl.reshape(piece, (WARPS, 8 * E, 32)),)
    return pieces


@triton.jit
def eights(first, COUNT: tl.constexpr):
    """Numbers first, first + 1, .. [8, COUNT // 8], as `operand` takes rows."""
    return first + tl.arange(0, 8)[:, None] + 8 * tl.arange(0, COUNT // 8)[None, :]


@triton.jit
def _upper(a):
    """The part of a that bfloat16 holds, cut off behind it."""
    return (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _dot(w, a, sums):
    """sums + w a^T of bfloat16 numbers."""
    if INTERPRETED:
        return tl.dot(w.to(tl.float32), tl.trans(a.to(tl.float32), 0, 2, 1), sums)
    else:
        return tl.dot(w, tl.trans(a, 0, 2, 1), sums)


@triton.jit
def _product(
    v, weights, N: tl.constexpr, B: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Rows in pieces times v [B, N]: [ROWS, BATCH]. Three sums, so that no product waits long for the last one."""
    column = eights(tl.program_id(1) * BATCH, BATCH)
    inputs = columns(v, column, column < B, N, WARPS)
    sums = tl.zeros([WARPS, ROWS, BATCH], tl.float32)
    rests = tl.zeros([WARPS, ROWS, BATCH], tl.float32)
    lasts = tl.zeros([WARPS, ROWS, BATCH], tl.float32)
    for c in tl.static_range(len(weights)):
        a = inputs[c]
        if weights[c].dtype == tl.bfloat16:
            upper = _upper(a)
            rest = a - upper
            middle = _upper(rest)
            sums = _dot(weights[c], upper.to(tl.bfloat16), sums)
            rests = _dot(weights[c], middle.to(tl.bfloat16), rests)
            lasts = _dot(weights[c], (rest - middle).to(tl.bfloat16), lasts)
        else:
            sums = tl.dot(weights[c].to(tl.float32), tl.trans(a, 0, 2, 1), sums, input_precision="tf32x3")
    return tl.sum(sums + (rests + lasts), 0)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


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
    total, square = tl.reduce((sums, squares), 1, _add_pairs)
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
    tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, D] = x_0 z_last, as `triton.project_and_mix`; `b` holds W beta too, and `w_gamma` is W gamma.

    A program's ROWS channels stand side by side for all ORDER + 1 groups of the projection, GROUPS a power of two: one
    product makes them all.
    """
    W: tl.constexpr = (ORDER + 1) * D
    first = tl.program_id(0) * ROWS
    side = eights(0, GROUPS * ROWS)
    known = (side // ROWS <= ORDER) & (first + side % ROWS < D)
    weights = operand(w, side // ROWS * D + first + side % ROWS, known, D, WARPS)
    side = tl.arange(0, GROUPS * ROWS)
    channel = side // ROWS * D + first + side % ROWS
    whole = (side // ROWS <= ORDER) & (first + side % ROWS < D)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    here = batch < B
    every = whole[:, None] & here[None, :]
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
    row = first + tl.arange(0, ROWS)
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
        gdc_launch_dependents()
    total, squares, centre = _fetch_moments(moments, centres, batch, here, 0, B, D, SHARE, PROGRAMS)
    u = _product(z, weights, D, B, BATCH, GROUPS * ROWS, WARPS)
    u = _normed(u, slope, bias, total, squares, centre, centres, batch, here, eps, 0, B, D)
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
    ROWS: tl.constexpr, WHICH: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [B, D] += v [B, N] w [D, N]^T + b; z = gamma (x - centres[WHICH]), and the moments of every ROWS channels."""
    program = tl.program_id(0)
    owned = eights(program * ROWS, ROWS)
    weights = operand(w, owned, owned < D, N, WARPS)
    row = program * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    wanted = row < D
    here = batch < B
    both = wanted[:, None] & here[None, :]
    bias = tl.load(b + row, wanted, 0.0).to(tl.float32)[:, None]
    scale = tl.load(gamma + row, wanted, 0.0)[:, None]
    at = batch[None, :] * D + row[:, None]
    stands = tl.load(x + at, both, 0.0) + bias
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    centre = tl.load(centres + WHICH * B + batch, here, 0.0)[None, :]
    new = stands + _product(v, weights, N, B, BATCH, ROWS, WARPS)
    tl.store(x + at, new, both)
    apart = tl.where(both, new - centre, 0.0)
    tl.store(z + at, scale * apart, both)
    total, square = tl.reduce((apart, apart * apart), 0, _add_pairs)
    PARTS: tl.constexpr = (D + ROWS - 1) // ROWS
    tl.store(moments + batch * PARTS + program, total, here)
    tl.store(moments + (B + batch) * PARTS + program, square, here)


@triton.jit
def norm_expand(
    z, moments, centres, w, b, w_gamma, out, eps, B: tl.constexpr, D: tl.constexpr, N: tl.constexpr, SHARE:
    tl.constexpr, PROGRAMS: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, PDL:
    tl.constexpr,
):  # fmt: skip
    """out [B, N] = gelu(norm(x) w [N, D]^T + b), the tanh form of GELU."""
    owned = eights(tl.program_id(0) * ROWS, ROWS)
    weights = operand(w, owned, owned < N, D, WARPS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    wanted = row < N
    here = batch < B
    bias = tl.load(b + row, wanted, 0.0)[:, None]
    slope = tl.load(w_gamma + row, wanted, 0.0)[:, None]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total, squares, centre = _fetch_moments(moments, centres, batch, here, 1, B, D, SHARE, PROGRAMS)
    u = _product(z, weights, D, B, BATCH, ROWS, WARPS)
    u = _normed(u, slope, bias, total, squares, centre, centres, batch, here, eps, 1, B, D)
    tl.store(out + batch[None, :] * N + row[:, None], gelu(u), wanted[:, None] & here[None, :])


@triton.jit
def head(
    z, moments, centres, w, b, w_gamma, logits, best, best_at, V, eps, B: tl.constexpr, D: tl.constexpr, SHARE:
    tl.constexpr, PROGRAMS: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, PDL:
    tl.constexpr,
):  # fmt: skip
    """logits [B, V] = norm(x) w [V, D]^T; each program also keeps its largest logits and the lowest tokens that have
    them, `best` and `best_at` [programs, B]. A row with a NaN among its logits keeps NaN.
    """
    program = tl.program_id(0)
    owned = eights(program * ROWS, ROWS)
    weights = operand(w, owned, owned < V, D, WARPS)
    row = program * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    wanted = row < V
    here = batch < B
    both = wanted[:, None] & here[None, :]
    bias = tl.load(b + row, wanted, 0.0)[:, None]
    slope = tl.load(w_gamma + row, wanted, 0.0)[:, None]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total, squares, _ = _fetch_moments(moments, centres, batch, here, 0, B, D, SHARE, PROGRAMS)
    products = _product(z, weights, D, B, BATCH, ROWS, WARPS)
    mean, inverse = _deviation(total, squares, eps, D)
    u = (products - mean[None, :] * slope) * inverse[None, :] + bias
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


class BatchShape(NamedTuple):
    """How a kernel is cut: output rows a program, warps that share its inputs, and sequences, a multiple of eight."""

    rows: int
    warps: int
    batch: int

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes of it."""
        return {"ROWS": self.rows, "WARPS": self.warps, "BATCH": self.batch, "num_warps": self.warps}


@dataclass(frozen=True)
class BatchShapes:
    """The shape of every kernel."""

    mix: BatchShape
    out: BatchShape
    fc1: BatchShape
    fc2: BatchShape
    head: BatchShape

    @classmethod
    def fit(cls, batch: int, width: int = 768, itemsize: int = 2) -> BatchShapes:
        """For a batch of that size and a model of that width, whose widest weights have `itemsize` bytes.

        Measured on an H100 at D = 768, each in the whole step: what overlaps matters. Narrow models take fewer rows a
        program, so that enough programs run, wide ones more warps, and wide weights fewer rows: they stay in registers.
        """
        more = min(int(triton.next_power_of_2(triton.cdiv(width, 1024))), 4)
        less = (2 if itemsize > 2 else 1) * (2 if width > 2048 else 1)

        def rows(most: int) -> int:
            return max(8, most // less)

        out = rows(32 if width >= 512 else 8)
        if batch > 16:
            return cls(
                mix=BatchShape(8 if less == 1 else 4, 2 * more, 8), out=BatchShape(out, 4 * more, 8),
                fc1=BatchShape(rows(32), 4 * more, 8), fc2=BatchShape(rows(16), 4 * more, 8),
                head=BatchShape(rows(16), 4 * more, 32),
            )  # fmt: skip
        return cls(
            mix=BatchShape(4, 4 * more, 8), out=BatchShape(out, 4 * more, 8), fc1=BatchShape(rows(16), 4 * more, 8),
            fc2=BatchShape(rows(16), 8 * more, 8), head=BatchShape(rows(32), 4 * more, 8),
        )  # fmt: skip


class GpuBatchStep(Step):
    """Launches one position of `batch` sequences through all layers, head and choice, on the current stream.

    The interface of `GpuStep`, with x [B, D], logits [B, V], token [B], logs [rows, B] and a clock of [2 + B].
    """

    kernels: ModuleType = sys.modules[__name__]

    def __init__(
        self, layers: list[LayerWeights], norm: tuple[Tensor, Tensor], embedding: Tensor, head_weight: Tensor,
        diagonal: Tensor, near: Tensor, *, batch: int, order: int, eps: float, block: int,
        shapes: BatchShapes | None = None, pdl: bool = True,
    ) -> None:  # fmt: skip
        self.embedding, self.batch = embedding, batch
        self.gamma = norm[0].float()
        self.head = folded(norm, (head_weight, head_weight.new_zeros(head_weight.shape[0])))
        self.diagonal, self.near, self.order, self.eps, self.block = diagonal, near, order, eps, block
        self.width, self.vocab = embedding.shape[1], head_weight.shape[0]
        self.shapes, self.pdl = shapes or BatchShapes.fit(batch, self.width, widest(layers, head_weight)), pdl
        self.inner, self.taps = layers[0].fc1[0].shape[0], layers[0].short[0].shape[0]
        self.layers = [
            Layer(
                (layer.norm1[0].float(), layer.norm2[0].float()), folded(layer.norm1, layer.in_proj), layer.short,
                layer.out_proj, folded(layer.norm2, layer.fc1), layer.fc2,
            )
            for layer in layers
        ]  # fmt: skip
        self.programs = int(triton.cdiv(self.vocab, self.shapes.head.rows))
        self._scratch()

    def _scratch(self) -> None:
        B, new = self.batch, self.diagonal.new_empty
        self.x, self.centres = new(B, self.width), new(2, B)
        self.z, self.mixed, self.hidden = (new(B, n) for n in (self.width, self.width, self.inner))
        self.logits, self.best = new(B, self.vocab), new(self.programs, B)
        self.moments = new(2 * triton.cdiv(self.width, min(self.shapes.out.rows, self.shapes.fc2.rows)) * B)
        self.token = torch.zeros(B, dtype=torch.long, device=self.diagonal.device)
        self.best_at = torch.zeros(self.programs, B, dtype=torch.int32, device=self.diagonal.device)

    def start(self, rows: Tensor) -> None:
        """Puts embeddings [B, D] where the next position reads them."""
        rows = rows.float()
        apart = rows - rows.mean(1, keepdim=True)
        self.x.copy_(rows)
        self.centres[0] = rows.mean(1)
        self.z.copy_(self.layers[0].gammas[0] * apart)
        self.moments[: 2 * self.batch] = torch.cat([apart.sum(1), apart.square().sum(1)])

    def forward(self, history: Tensor, pending: Tensor, clock: Tensor, offset: int) -> None:
        """x -> logits, the mixer rows written, as `Step.forward`."""
        D, F, B, eps, s, pdl = self.width, self.inner, self.batch, self.eps, self.shapes, self.pdl
        C, lanes, kernels = history.shape[1] // B, (self.order - 1) * D, self.kernels
        more, common = {"launch_pdl": True} if pdl else {}, {"B": B, "D": D, "PDL": pdl}

        def grid(shape: BatchShape, rows: int) -> tuple[int, int]:
            return int(triton.cdiv(rows, shape.rows)), int(triton.cdiv(B, shape.batch))

        def shares(share: int) -> dict[str, int]:
            return {"SHARE": share, "PROGRAMS": int(triton.next_power_of_2(-(-D // share)))}

        after = [layer.gammas[0] for layer in self.layers[1:]] + [self.gamma]
        for number, layer in enumerate(self.layers):
            # The clock moved at the end of the last block: its reader starts after that.
            early = more if number or offset else {}
            kernels.project_and_mix[grid(s.mix, D)](
                self.z, self.moments, self.centres, *layer.mix, *layer.short, pending[number], history, self.near,
                self.diagonal, clock, self.mixed, offset, number * lanes, C, eps, ORDER=self.order,
                GROUPS=triton.next_power_of_2(self.order + 1), TAPS=self.taps, BLOCK=self.block,
                **shares(s.fc2.rows if number else D), **common, **s.mix.options, **early,
            )  # fmt: skip
            kernels.add_product[grid(s.out, D)](
                self.x, self.mixed, *layer.out, layer.gammas[1], self.z, self.moments, self.centres, N=D,
                WHICH=1, **common, **s.out.options, **more,
            )  # fmt: skip
            kernels.norm_expand[grid(s.fc1, F)](
                self.z, self.moments, self.centres, *layer.fc1, self.hidden, eps, N=F, **shares(s.out.rows),
                **common, **s.fc1.options, **more,
            )  # fmt: skip
            kernels.add_product[grid(s.fc2, D)](
                self.x, self.hidden, *layer.fc2, after[number], self.z, self.moments, self.centres, N=F,
                WHICH=0, **common, **s.fc2.options, **more,
            )  # fmt: skip
        kernels.head[grid(s.head, self.vocab)](
            self.z, self.moments, self.centres, *self.head, self.logits, self.best, self.best_at, self.vocab, eps,
            **common, **s.head.options, **shares(s.fc2.rows), **more,
        )  # fmt: skip

    @property
    def _embedded(self) -> tuple[list[Tensor], dict[str, int]]:
        tensors = [self.layers[0].gammas[0], self.x, self.z, self.moments, self.centres]
        return tensors, {"B": self.batch, "K": int(triton.next_power_of_2(self.width))}
