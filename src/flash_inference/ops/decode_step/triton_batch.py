"""The decode step of order-N Hyena blocks for a batch on a GPU: the kernels of `triton`, as matrix-matrix products.

For up to eight sequences those of `triton_eight` are faster.

A program owns a few output rows for some rows of the batch. Its warps share the sum over the inputs: each holds its own
part of the weights, fetched before the kernel waits, and multiplies it on the tensor cores; one reduction adds the
parts. Weights that have at most 10 bits of mantissa (bfloat16, float16) are exact in tf32; activations are split in two
tf32 numbers, which leaves an error of 2^-21 of each term. Other weights take the three products of tf32x3.

LayerNorm costs no pass of its own. Whoever writes x also writes z = gamma (x - c), with the gamma of the LayerNorm to
come and the mean c that x had at the last one, and the sums and squared deviations of its few channels (`moments`
[2, programs, B]). The next kernel multiplies z and adds up the moments meanwhile: W norm(x) =
(W z - (mean - c) W gamma) / deviation + W beta, where W gamma and W beta are prepared. c is close to the mean, so that
nothing cancels. `centres` [2, B] holds c in turns: the first for the LayerNorms before mixers and head, the second for
those before MLPs.

Activations are [B, channels] float32; `history` is time-major [rows, M D, B], `pending` [TAPS - 1, B, (N + 1) D].
"""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flash_inference.ops.decode_step.numpy import LayerWeights
from flash_inference.ops.decode_step.triton import Layer, Step, folded, gelu, largest
from flash_inference.ops.decode_step.triton_log import leave_token

SHARE = 16
"""Channels whose moments the embedding writes together."""

EIGHT = 8
"""Sequences up to which `triton_eight` takes the columns of a tensor-core product for them."""


@triton.jit
def _stream(w, row, wanted, N: tl.constexpr, WARPS: tl.constexpr, DEPTH: tl.constexpr):
    """Rows of a matrix [.., N] in pieces [WARPS, DEPTH, ROWS]: every warp holds its own part of the sum."""
    place = tl.arange(0, WARPS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, :, None]
    pieces = ()
    for c in tl.static_range((N + WARPS * DEPTH - 1) // (WARPS * DEPTH)):
        k = c * WARPS * DEPTH + place
        known = wanted[None, None, :] & (k < N)
        pieces = pieces + (tl.load(w + row[None, None, :].to(tl.int64) * N + k, known, 0.0),)
    return pieces


@triton.jit
def tf32(a):
    """a rounded to tf32. The rest, a minus that, keeps a NaN."""
    return ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _fetch_moments(
    moments, centres, batch, here, WHICH: tl.constexpr, B: tl.constexpr, D: tl.constexpr, SHARE: tl.constexpr,
    PROGRAMS: tl.constexpr
):  # fmt: skip
    """Sums and squared deviations [PROGRAMS, BATCH] of SHARE channels each, and c [BATCH]."""
    programs: tl.constexpr = (D + SHARE - 1) // SHARE
    p = tl.arange(0, PROGRAMS)[:, None]
    at = moments + p * B + batch[None, :]
    known = (p < programs) & here[None, :]
    return (
        tl.load(at, known, 0.0),
        tl.load(at + programs * B, known, 0.0),
        tl.load(centres + WHICH * B + batch, here, 0.0),
    )


@triton.jit
def _add_moments(total, squares, centre, eps, D: tl.constexpr, SHARE: tl.constexpr, PROGRAMS: tl.constexpr):
    """(mean - c, 1 / deviation) [BATCH] of all channels."""
    programs: tl.constexpr = (D + SHARE - 1) // SHARE
    p = tl.arange(0, PROGRAMS)[:, None]
    count = tl.maximum(tl.minimum(D - p * SHARE, SHARE), 1).to(tl.float32)
    apart = tl.where(p < programs, total - count * centre[None, :], 0.0)
    apart, squares = tl.reduce((apart, squares + apart * apart / count), 0, add_pairs)
    shift = apart / D
    return shift, tl.rsqrt(squares / D - shift * shift + eps)


@triton.jit
def _keep_moments(moments, x, both, batch, here, program, B: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Writes the sum and the squared deviations of a program's channels x [BATCH, ROWS]."""
    programs: tl.constexpr = (D + ROWS - 1) // ROWS
    total = tl.sum(x, 1)
    apart = tl.where(both, x - (total / tl.minimum(D - program * ROWS, ROWS).to(tl.float32))[:, None], 0.0)
    tl.store(moments + program * B + batch, total, here)
    tl.store(moments + (programs + program) * B + batch, tl.sum(apart * apart, 1), here)


@triton.jit
def _product(
    v, weights, N: tl.constexpr, B: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """v [B, N] times rows in pieces: [BATCH, ROWS]. The rest behind tf32 comes first; a NaN survives in it."""
    column = (tl.program_id(1) * BATCH + tl.arange(0, BATCH))[None, :, None]
    place = tl.arange(0, WARPS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    sums = tl.zeros([WARPS, BATCH, ROWS], tl.float32)
    for c in tl.static_range((N + WARPS * DEPTH - 1) // (WARPS * DEPTH)):
        k = c * WARPS * DEPTH + place
        a = tl.load(v + column * N + k, (column < B) & (k < N), 0.0)
        w = weights[c].to(tl.float32)
        if WIDE:
            sums = tl.dot(a, w, sums, input_precision="tf32x3")
        else:
            high = tf32(a)
            sums = tl.dot(a - high, w, sums, input_precision="tf32")
            sums = tl.dot(high, w, sums, input_precision="tf32")
    return tl.sum(sums, 0)


@triton.jit
def _normed(
    products, slope, bias, total, squares, centre, centres, batch, here, eps, WHICH: tl.constexpr, B: tl.constexpr,
    D: tl.constexpr, SHARE: tl.constexpr, PROGRAMS: tl.constexpr
):  # fmt: skip
    """norm(x) W + b [BATCH, ROWS] from z W; the first program tells the mean to whoever writes x next."""
    shift, inverse = _add_moments(total, squares, centre, eps, D, SHARE, PROGRAMS)
    if tl.program_id(0) == 0:
        tl.store(centres + (1 - WHICH) * B + batch, centre + shift, here)
    return (products - shift[:, None] * slope) * inverse[:, None] + bias


@triton.jit(do_not_specialize=["offset", "lane"])
def project_and_mix(
    z, moments, centres, w, b, w_gamma, short_w, short_b, pending, history, near, diagonal, clock, out, offset,
    lane, C, eps, B: tl.constexpr, D: tl.constexpr, ORDER: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr,
    BLOCK: tl.constexpr, SHARE: tl.constexpr, PROGRAMS: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
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
    every = here[:, None] & whole[None, :]
    weights = _stream(w, channel, whole, D, WARPS, DEPTH)
    bias = tl.load(b + channel, whole, 0.0)[None, :]
    slope = tl.load(w_gamma + channel, whole, 0.0)[None, :]
    taps = ()
    owed = ()
    for j in tl.static_range(TAPS):
        taps = taps + (tl.load(short_w + (TAPS - 1 - j) * W + channel, whole, 0.0)[None, :],)
        if j + 1 < TAPS:
            owed = owed + (tl.load(pending + (j * B + batch)[:, None] * W + channel[None, :], every, 0.0),)
        else:
            owed = owed + (tl.load(short_b + channel, whole, 0.0)[None, :],)
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
        partial = tl.load(now + o * D * B, both, 0.0).to(tl.float32) + tl.sum(y * rho, 0)
        sums = sums + (tl.trans(partial),)
        own = own + (tl.load(diagonal + lane + o * D + row, wanted, 0.0)[None, :],)
    if PDL:
        gdc_wait()
    total, squares, centre = _fetch_moments(moments, centres, batch, here, 0, B, D, SHARE, PROGRAMS)
    u = _product(z, weights, D, B, BATCH, GROUPS * ROWS, WARPS, DEPTH, WIDE)
    u = _normed(u, slope, bias, total, squares, centre, centres, batch, here, eps, 0, B, D, SHARE, PROGRAMS)
    for j in tl.static_range(TAPS - 1):
        at = pending + (j * B + batch)[:, None] * W + channel[None, :]
        tl.store(at, owed[j + 1] + u * taps[j + 1], every)
    gates = tl.reshape(u * taps[0] + owed[0], (BATCH, GROUPS, ROWS))
    group = tl.arange(0, GROUPS)[None, :, None]
    v = tl.sum(tl.where(group == ORDER, gates, 0.0), 1)
    for o in tl.static_range(ORDER - 1):
        y = tl.sum(tl.where(group == ORDER - 1 - o, gates, 0.0), 1) * v
        v = sums[o] + own[o] * y
        tl.store(now + o * D * B, tl.trans(y).to(history.dtype.element_ty), both)
    gate = tl.sum(tl.where(group == 0, gates, 0.0), 1)
    tl.store(out + batch[:, None] * D + row[None, :], gate * v, here[:, None] & wanted[None, :])


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
    both = here[:, None] & wanted[None, :]
    weights = _stream(w, row, wanted, N, WARPS, DEPTH)
    bias = tl.load(b + row, wanted, 0.0)[None, :]
    scale = tl.load(gamma + row, wanted, 0.0)[None, :]
    at = batch[:, None] * D + row[None, :]
    if PDL:
        gdc_wait()
    centre = tl.load(centres + WHICH * B + batch, here, 0.0)[:, None]
    stands = tl.load(x + at, both, 0.0)
    new = tl.where(both, stands + bias + _product(v, weights, N, B, BATCH, ROWS, WARPS, DEPTH, WIDE), 0.0)
    tl.store(x + at, new, both)
    tl.store(z + at, scale * (new - centre), both)
    _keep_moments(moments, new, both, batch, here, program, B, D, ROWS)


@triton.jit
def norm_expand(
    z, moments, centres, w, b, w_gamma, out, N, eps, B: tl.constexpr, D: tl.constexpr, SHARE: tl.constexpr,
    PROGRAMS: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, DEPTH: tl.constexpr, WIDE:
    tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, N] = gelu(norm(x) w [N, D]^T + b), the tanh form of GELU."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    wanted = row < N
    here = batch < B
    weights = _stream(w, row, wanted, D, WARPS, DEPTH)
    bias = tl.load(b + row, wanted, 0.0)[None, :]
    slope = tl.load(w_gamma + row, wanted, 0.0)[None, :]
    if PDL:
        gdc_wait()
    total, squares, centre = _fetch_moments(moments, centres, batch, here, 1, B, D, SHARE, PROGRAMS)
    u = _product(z, weights, D, B, BATCH, ROWS, WARPS, DEPTH, WIDE)
    u = _normed(u, slope, bias, total, squares, centre, centres, batch, here, eps, 1, B, D, SHARE, PROGRAMS)
    new = gelu(u)
    tl.store(out + batch[:, None] * N + row[None, :], new, here[:, None] & wanted[None, :])


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
    both = here[:, None] & wanted[None, :]
    bias = tl.load(b + row, wanted, 0.0)[None, :]
    slope = tl.load(w_gamma + row, wanted, 0.0)[None, :]
    place = tl.arange(0, DEPTH)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total, squares, centre = _fetch_moments(moments, centres, batch, here, 0, B, D, SHARE, PROGRAMS)
    sums = tl.zeros([BATCH, ROWS], tl.float32)
    for c in range((D + DEPTH - 1) // DEPTH):
        k = c * DEPTH + place
        inside = k < D
        y = tl.load(z + batch[:, None] * D + k[None, :], here[:, None] & inside[None, :], 0.0)
        weights = tl.load(w + row[None, :].to(tl.int64) * D + k[:, None], wanted[None, :] & inside[:, None], 0.0)
        if WIDE:
            sums = tl.dot(y, weights, sums, input_precision="tf32x3")
        else:
            high = tf32(y)
            sums = tl.dot(y - high, weights.to(tl.float32), sums, input_precision="tf32")
            sums = tl.dot(high, weights.to(tl.float32), sums, input_precision="tf32")
    shift, inverse = _add_moments(total, squares, centre, eps, D, SHARE, PROGRAMS)
    u = (sums - shift[:, None] * slope) * inverse[:, None] + bias
    tl.store(logits + batch[:, None].to(tl.int64) * V + row[None, :], u, both)
    worst = tl.sum(((u != u) & both).to(tl.int32), 1) > 0
    u = tl.where(both & (u == u), u, -float("inf"))
    top = tl.max(u, 1)
    tl.store(best + program * B + batch, tl.where(worst, float("nan"), top), here)
    tl.store(best_at + program * B + batch, tl.min(tl.where(u == top[:, None], row[None, :], V), 1), here)


@triton.jit(do_not_specialize=["offset"])
def choose_and_embed(
    best, best_at, token, embedding, gamma, x, z, moments, centres, clock, tokens, host_tokens, stamps, offset,
    programs, V, step, B: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SHARE: tl.constexpr, PIECES: tl.constexpr,
    GREEDY: tl.constexpr, LAST: tl.constexpr, PDL: tl.constexpr, STAMP: tl.constexpr,
):  # fmt: skip
    """x [B, D] = embedding[token], as `triton.choose_and_embed`: a program a row; logs are [rows, B]."""
    place = tl.arange(0, K // SHARE)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    b = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    base = tl.load(clock + 2 + b)
    chosen = largest(best, best_at, b, B, programs, V, PIECES) if GREEDY else tl.load(token + b)
    row = tl.where(chosen < 0, 0, chosen)
    new = tl.load(embedding + row * D + place, place < D, 0.0).to(tl.float32)
    mean = tl.sum(tl.sum(new, 1), 0) / D
    tl.store(centres + b, mean)
    tl.store(x + b * D + place, new, place < D)
    tl.store(z + b * D + place, tl.load(gamma + place, place < D, 0.0) * (new - mean), place < D)
    shares: tl.constexpr = (D + SHARE - 1) // SHARE
    share = tl.arange(0, K // SHARE)
    total = tl.sum(new, 1)
    count = tl.maximum(tl.minimum(D - share * SHARE, SHARE), 1).to(tl.float32)
    apart = tl.where(place < D, new - (total / count)[:, None], 0.0)
    tl.store(moments + share * B + b, total, share < shares)
    tl.store(moments + (shares + share) * B + b, tl.sum(apart * apart, 1), share < shares)
    leave_token(token, row, chosen, clock, tokens, host_tokens, stamps, base, offset, step, b, B, LAST, STAMP)


class BatchShape(NamedTuple):
    """How a kernel is cut: output rows a program, warps, inputs that a warp takes at once.

    `registers` bounds those of a thread, so that the programs of the next kernel find room beside this one's and can
    fetch their weights; None leaves it to the compiler.
    """

    rows: int
    warps: int
    depth: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes of it."""
        return {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})


@dataclass(frozen=True)
class BatchShapes:
    """The shape of every kernel, and rows of the batch a program."""

    mix: BatchShape
    out: BatchShape
    fc1: BatchShape
    fc2: BatchShape
    head: BatchShape
    batch: int
    head_batch: int

    @classmethod
    def fit(cls, batch: int) -> BatchShapes:
        """For a batch of that size. Measured on an H100 at D = 768, each in the whole step: what overlaps matters."""
        if batch > EIGHT:
            return cls(
                mix=BatchShape(8, 4, 64), out=BatchShape(16, 4, 64), fc1=BatchShape(32, 4, 64),
                fc2=BatchShape(16, 8, 64), head=BatchShape(128, 4, 64), batch=16, head_batch=32,
            )  # fmt: skip
        return cls(
            mix=BatchShape(4, 4, 64), out=BatchShape(16, 4, 64), fc1=BatchShape(16, 4, 64, registers=168),
            fc2=BatchShape(16, 8, 64), head=BatchShape(32, 2, 64), batch=8, head_batch=8,
        )  # fmt: skip


@dataclass(frozen=True)
class _Layer(Layer):
    """Here gammas lie as they are, and `wide` tells which matrices tf32 cannot hold."""

    wide: tuple[bool, bool, bool, bool]


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
        self.shapes, self.pdl = shapes or BatchShapes.fit(batch), pdl
        self.inner, self.taps = layers[0].fc1[0].shape[0], layers[0].short[0].shape[0]
        self.layers = [
            _Layer(
                (layer.norm1[0].float(), layer.norm2[0].float()),
                folded(layer.norm1, layer.in_proj), layer.short, layer.out_proj, folded(layer.norm2, layer.fc1),
                layer.fc2, tuple(is_wide(m[0]) for m in (layer.in_proj, layer.out_proj, layer.fc1, layer.fc2)),
            )  # type: ignore[arg-type]
            for layer in layers
        ]  # fmt: skip
        self.programs = int(triton.cdiv(self.vocab, self.shapes.head.rows))
        self._scratch()

    def _scratch(self) -> None:
        B, new = self.batch, self.diagonal.new_empty
        self.x, self.z, self.mixed = (new(B, self.width) for _ in range(3))
        self.hidden, self.centres = new(B, self.inner), new(2, B)
        self.logits, self.best = new(B, self.vocab), new(self.programs, B)
        shares = triton.cdiv(self.width, min(SHARE, self.shapes.out.rows, self.shapes.fc2.rows))
        self.moments = new(2 * shares * B)
        self.token = torch.zeros(B, dtype=torch.long, device=self.diagonal.device)
        self.best_at = torch.zeros(self.programs, B, dtype=torch.int32, device=self.diagonal.device)

    @property
    def share(self) -> int:
        """Channels whose moments the embedding writes together."""
        return SHARE

    def start(self, rows: Tensor) -> None:
        """Puts embeddings [B, D] where the next position reads them."""
        D, rows = self.width, rows.float()
        self.x.copy_(rows)
        self.centres[0] = rows.mean(1)
        self.z.copy_(self.layers[0].gammas[0] * (rows - rows.mean(1, keepdim=True)))
        both = self.moments[: 2 * triton.cdiv(D, SHARE) * self.batch].view(2, -1, self.batch)
        for number, some in enumerate(rows.split(SHARE, dim=1)):
            both[0, number], both[1, number] = some.sum(1), (some - some.mean(1, keepdim=True)).square().sum(1)

    def forward(
        self, history: Tensor, pending: Tensor, clock: Tensor, offset: int,
        after_mixing: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """x -> logits, the mixer rows written, as `Step.forward`."""
        D, F, B, eps, s, pdl = self.width, self.inner, self.batch, self.eps, self.shapes, self.pdl
        C, lanes, tile, kernels = history.shape[1] // B, (self.order - 1) * D, s.batch, self.kernels
        more = {"launch_pdl": True} if pdl else {}
        columns = triton.cdiv(B, tile)

        def settings(shape: BatchShape, wide: bool) -> dict[str, object]:
            fixed = {"B": B, "D": D, "BATCH": tile, "WIDE": wide, "PDL": pdl, **shape.options}
            return {**fixed, "ROWS": shape.rows, "WARPS": shape.warps, "DEPTH": shape.depth}

        def shares(share: int) -> dict[str, int]:
            return {"SHARE": share, "PROGRAMS": int(triton.next_power_of_2(-(-D // share)))}

        after = [layer.gammas[0] for layer in self.layers[1:]] + [self.gamma]
        for number, layer in enumerate(self.layers):
            # The clock moved at the end of the last block: its reader starts after that.
            early = more if number or offset else {}
            kernels.project_and_mix[(triton.cdiv(D, s.mix.rows), columns)](
                self.z, self.moments, self.centres, *layer.mix, *layer.short, pending[number], history, self.near,
                self.diagonal, clock, self.mixed, offset, number * lanes, C, eps, ORDER=self.order,
                GROUPS=triton.next_power_of_2(self.order + 1), TAPS=self.taps, BLOCK=self.block,
                **shares(s.fc2.rows if number else self.share), **settings(s.mix, layer.wide[0]), **early,
            )  # fmt: skip
            if number + 1 == len(self.layers) and after_mixing is not None:
                after_mixing()
            kernels.add_product[(triton.cdiv(D, s.out.rows), columns)](
                self.x, self.mixed, *layer.out, layer.gammas[1], self.z, self.moments, self.centres, N=D,
                WHICH=1, **settings(s.out, layer.wide[1]), **more,
            )  # fmt: skip
            kernels.norm_expand[(triton.cdiv(F, s.fc1.rows), columns)](
                self.z, self.moments, self.centres, *layer.fc1, self.hidden, F, eps, **shares(s.out.rows),
                **settings(s.fc1, layer.wide[2]), **more,
            )  # fmt: skip
            kernels.add_product[(triton.cdiv(D, s.fc2.rows), columns)](
                self.x, self.hidden, *layer.fc2, after[number], self.z, self.moments, self.centres, N=F,
                WHICH=0, **settings(s.fc2, layer.wide[3]), **more,
            )  # fmt: skip
        kernels.head[(self.programs, triton.cdiv(B, s.head_batch))](
            self.z, self.moments, self.centres, *self.head, self.logits, self.best, self.best_at, self.vocab, eps, B=B,
            D=D, BATCH=s.head_batch, ROWS=s.head.rows, DEPTH=s.head.depth, WIDE=is_wide(self.head[0]), PDL=pdl,
            **s.head.options, **shares(s.fc2.rows), **more,
        )  # fmt: skip

    @property
    def _embedded(self) -> tuple[list[Tensor], dict[str, int]]:
        padded = max(SHARE, int(triton.next_power_of_2(self.width)))
        tensors = [self.layers[0].gammas[0], self.x, self.z, self.moments, self.centres]
        return tensors, {"B": self.batch, "K": padded, "SHARE": SHARE}


def is_wide(weight: Tensor) -> bool:
    return weight.dtype == torch.float32
