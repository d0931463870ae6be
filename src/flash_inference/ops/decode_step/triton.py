"""The decode step of order-N Hyena blocks on a GPU: four kernels a layer, a head, a choice.

A one-token pass reads every weight once and does little else. Each kernel is a matrix-vector product whose programs own
a few output rows; what stands before it (norm) is repeated by every program, what stands after it (short convolution,
gates, mixer row, activation, residual) is done on the rows owned. With programmatic dependent launch (`PDL`) a kernel
fetches its weights while the one before it still runs, and waits only then: what counts is how little it does between
the wait and its last store.

- A lane holds eight neighbours of a matrix row, and the vector elements that belong to them; a vector is loaded once
  for all rows of a program. Its loads are dense, since vectors between kernels are kept even elements first (`place`).
- Most programs are one warp: sums need no barrier.
- LayerNorm costs one round of sums, together with the product: W norm(x) = (W z - (mean - c) W gamma) / deviation +
  W beta with z = gamma (x - c), where c is the mean that x had at the last LayerNorm, so that nothing cancels. W gamma
  and W beta are prepared. `centres` [2] holds c in turns: for the LayerNorms before mixers and head, and before MLPs.
- Weights are loaded as first to be evicted from the L2 cache: a part of them, and all else, is found there again.

x [D] float32 is the residual stream; weights [out, in] float32, bfloat16 or float16, sums in float32. `history` is the
one buffer of the mixers, time-major [rows, M D]: a row holds partial sums until its position is read and inputs
afterwards. `near` [BLOCK, M D] are the first taps: pairs inside an aligned block of BLOCK positions are paid inline.
"""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

from flash_inference.ops.decode_step.numpy import LayerWeights

EVICTION = tl.constexpr("evict_first")
"""What the L2 cache does with weights: "" would treat them as all else. 9 us of a step of 180 without tiles (H100)."""


@triton.jit
def place(k):
    """Where the vectors between kernels keep element k: of 256 neighbours the even ones first, then the odd ones."""
    return k // 256 * 256 + k % 2 * 128 + k % 256 // 2


@triton.jit
def stream(w, row, wanted, N: tl.constexpr, WARPS: tl.constexpr):
    """Rows of a matrix [.., N] in pieces [ROWS, 256 WARPS], of which a lane holds eight neighbours a row.

    Those of bfloat16 are pairs in 32 bits, [ROWS, 128 WARPS].
    """
    HALF: tl.constexpr = 128 * WARPS
    k = tl.arange(0, HALF)
    pieces = ()
    for c in tl.static_range((N + 2 * HALF - 1) // (2 * HALF)):
        if w.dtype.element_ty == tl.bfloat16 and N % 2 == 0:
            pairs = w.to(tl.pointer_type(tl.int32), bitcast=True)
            j = c * HALF + k
            at = pairs + row[:, None].to(tl.int64) * (N // 2) + j[None, :]
            known = wanted[:, None] & (j < N // 2)[None, :]
            piece = tl.load(at, known, 0, eviction_policy=EVICTION)
        else:
            j = 2 * HALF * c + k // 4 * 8 + k % 4
            at = w + row[:, None].to(tl.int64) * N + j[None, :]
            low = tl.load(at, wanted[:, None] & (j < N)[None, :], 0.0, eviction_policy=EVICTION)
            high = tl.load(at + 4, wanted[:, None] & (j + 4 < N)[None, :], 0.0, eviction_policy=EVICTION)
            eight = tl.reshape(tl.join(low, high), (row.shape[0], HALF // 4, 4, 2))
            piece = tl.reshape(tl.permute(eight, (0, 1, 3, 2)), (row.shape[0], 2 * HALF))
        pieces = pieces + (piece,)
    return pieces


@triton.jit
def spread(v, N: tl.constexpr, WARPS: tl.constexpr):
    """A vector [N] in pieces [1, 128 WARPS], those of even elements and of odd ones in turns."""
    HALF: tl.constexpr = 128 * WARPS
    KEPT: tl.constexpr = (N + 255) // 256 * 256
    k = tl.arange(0, HALF)
    pieces = ()
    for c in tl.static_range((N + 2 * HALF - 1) // (2 * HALF)):
        at = (2 * HALF * c + k // 128 * 256 + k % 128)[None, :]
        if (c + 1) * 2 * HALF > KEPT:
            pieces = pieces + (tl.load(v + at, at < KEPT, 0.0), tl.load(v + at + 128, at < KEPT, 0.0))
        else:
            pieces = pieces + (tl.load(v + at), tl.load(v + at + 128))
    return pieces


@triton.jit
def weighted(w, v):
    """The product of rows in pieces with a vector in pieces, a lane's part at a time."""
    sums = tl.zeros([1, 1], tl.float32)
    for c in tl.static_range(len(w)):
        if w[c].dtype == tl.int32:
            low = (w[c] << 16).to(tl.float32, bitcast=True)
            high = (w[c] & -65536).to(tl.float32, bitcast=True)
            sums += low * v[2 * c]
            sums += high * v[2 * c + 1]
        else:
            both = tl.reshape(tl.join(v[2 * c], v[2 * c + 1]), (1, 2 * v[2 * c].shape[1]))
            sums += w[c].to(tl.float32) * both
    return sums


@triton.jit
def _times(w, v):
    """The product of rows in pieces with a vector in pieces: [ROWS]."""
    return tl.sum(weighted(w, v), 1)


@triton.jit
def scaled(x, gamma, centres, WHICH: tl.constexpr, D: tl.constexpr, WARPS: tl.constexpr):
    """gamma (x - c) in pieces, c, and the sums of x - c and of its squares, a lane at a time."""
    HALF: tl.constexpr = 128 * WARPS
    k = tl.arange(0, HALF)[None, :]
    c = tl.load(centres + WHICH)
    v = spread(x, D, WARPS)
    z = ()
    sums = tl.zeros([1, HALF], tl.float32)
    squares = tl.zeros([1, HALF], tl.float32)
    for i in tl.static_range(len(v)):
        apart = v[i] - c
        if (i // 2 + 1) * 2 * HALF > D:
            apart = tl.where(HALF * (i // 2 * 2) + k * 2 + i % 2 < D, apart, 0.0)
        sums += apart
        squares += apart * apart
        z = z + (apart * gamma[i],)
    return z, c, sums, squares


@triton.jit
def _deviation(c, sums, squares, centres, eps, WHICH: tl.constexpr, D: tl.constexpr):
    """The mean [1] of x - c and 1 / deviation [1]; the first program tells the mean to the next LayerNorm."""
    mean = tl.sum(sums, 1) / D
    inverse = tl.rsqrt(tl.sum(squares, 1) / D - mean * mean + eps)
    if tl.program_id(0) == 0:
        tl.store(centres + 1 - WHICH + tl.arange(0, 1), c + mean)
    return mean, inverse


@triton.jit(do_not_specialize=["offset", "lane"])
def project_and_mix(
    x, gamma, centres, w, b, slope, short_w, short_b, pending, history, near, diagonal, clock, out, offset, lane, C,
    eps, D: tl.constexpr, ORDER: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [D] = x_0 z_last: norm, input projection, short convolution, gates and mixer rows of one layer.

    `clock` holds the position of the block's first row, `offset` the position in it; `lane` is the layer's first column
    of `history`. `pending` [TAPS - 1, (N + 1) D] is what past inputs of the short convolution owe the next positions.
    Mixer rows of earlier positions may be read before the wait: `head` lets nothing of a position start before the last
    position's layers are over.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = row < D
    W: tl.constexpr = (ORDER + 1) * D
    weights = ()
    biases = ()
    slopes = ()
    for g in tl.static_range(ORDER + 1):
        weights = weights + (stream(w, g * D + row, wanted, D, WARPS),)
        biases = biases + (tl.load(b + g * D + row, wanted, 0.0),)
        slopes = slopes + (tl.load(slope + g * D + row, wanted, 0.0),)
    scale = spread(gamma, D, WARPS)
    base = tl.load(clock)
    now = history + (base + offset) * C + lane + row
    past = tl.arange(0, BLOCK)
    earlier = wanted[:, None] & (past < offset)[None, :]
    sums = ()
    own = ()
    for o in tl.static_range(ORDER - 1):
        column = lane + o * D + row
        y = tl.load(history + (base + past)[None, :] * C + column[:, None], earlier, 0.0).to(tl.float32)
        rho = tl.load(near + (offset - past)[None, :] * C + column[:, None], earlier, 0.0)
        sums = sums + (tl.sum(y * rho, 1) + tl.load(now + o * D, wanted, 0.0).to(tl.float32),)
        own = own + (tl.load(diagonal + column, wanted, 0.0),)
    owed = ()
    taps = ()
    for g in tl.static_range(ORDER + 1):
        channel = g * D + row
        for j in tl.static_range(TAPS):
            taps = taps + (tl.load(short_w + (TAPS - 1 - j) * W + channel, wanted, 0.0),)
            if j + 1 < TAPS:
                owed = owed + (tl.load(pending + j * W + channel, wanted, 0.0),)
            else:
                owed = owed + (tl.load(short_b + channel, wanted, 0.0),)
    if PDL:
        gdc_wait()
    z, c, first, second = scaled(x, scale, centres, 0, D, WARPS)
    products = ()
    for g in tl.static_range(ORDER + 1):
        products = products + (_times(weights[g], z),)
    mean, inverse = _deviation(c, first, second, centres, eps, 0, D)
    gates = ()
    for g in tl.static_range(ORDER + 1):
        u = (products[g] - mean * slopes[g]) * inverse + biases[g]
        gates = gates + (u * taps[g * TAPS] + owed[g * TAPS],)
        for j in tl.static_range(TAPS - 1):
            later = owed[g * TAPS + j + 1] + u * taps[g * TAPS + j + 1]
            tl.store(pending + j * W + g * D + row, later, wanted)
    v = gates[ORDER]
    for o in tl.static_range(ORDER - 1):
        y = gates[ORDER - 1 - o] * v
        v = sums[o] + own[o] * y
        tl.store(now + o * D, y.to(history.dtype.element_ty), wanted)
    tl.store(out + place(row), gates[0] * v, wanted)


@triton.jit
def add_product(
    x, v, w, b, D, N: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """x [D] += w [D, N] v [N] + b."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = row < D
    weights = stream(w, row, wanted, N, WARPS)
    bias = tl.load(b + row, wanted, 0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    stands = tl.load(x + place(row), wanted, 0.0) + bias
    tl.store(x + place(row), stands + _times(weights, spread(v, N, WARPS)), wanted)


@triton.jit
def gelu(u):
    """The tanh form: 0.5 u (1 + tanh(a)) = u sigmoid(2 a)."""
    return u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))


@triton.jit
def norm_expand(
    x, gamma, centres, w, b, slope, out, N, eps, D: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, PDL:
    tl.constexpr
):  # fmt: skip
    """out [N] = gelu(w [N, D] norm(x) + b), the tanh form of GELU."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = row < N
    weights = stream(w, row, wanted, D, WARPS)
    bias = tl.load(b + row, wanted, 0.0)
    slopes = tl.load(slope + row, wanted, 0.0)
    scale = spread(gamma, D, WARPS)
    if PDL:
        gdc_wait()
    z, c, first, second = scaled(x, scale, centres, 1, D, WARPS)
    products = _times(weights, z)
    mean, inverse = _deviation(c, first, second, centres, eps, 1, D)
    u = (products - mean * slopes) * inverse + bias
    tl.store(out + place(row), gelu(u), wanted)


@triton.jit
def head(
    x, gamma, centres, w, b, slope, logits, best, best_at, V, eps, D: tl.constexpr, ROWS: tl.constexpr, WARPS:
    tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """logits [V] = w [V, D] norm(x); each program also keeps its largest logit and the lowest token that has it.

    A program with a NaN among its logits keeps NaN. The next kernel starts when all programs are past the wait: behind
    it, others may fetch before they wait what earlier kernels of this position wrote.
    """
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    wanted = row < V
    weights = stream(w, row, wanted, D, WARPS)
    bias = tl.load(b + row, wanted, 0.0)
    slopes = tl.load(slope + row, wanted, 0.0)
    scale = spread(gamma, D, WARPS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    z, c, first, second = scaled(x, scale, centres, 0, D, WARPS)
    products = _times(weights, z)
    mean, inverse = _deviation(c, first, second, centres, eps, 0, D)
    u = (products - mean * slopes) * inverse + bias
    tl.store(logits + row, u, wanted)
    worst = tl.sum(((u != u) & wanted).to(tl.int32), 0) > 0
    u = tl.where(wanted & (u == u), u, -float("inf"))
    top = tl.max(u, 0)
    tl.store(best + program, tl.where(worst, float("nan"), top))
    tl.store(best_at + program, tl.min(tl.where(u == top, row, V), 0))


@triton.jit
def largest(best, best_at, b, B: tl.constexpr, programs, V, PIECES: tl.constexpr):
    """The lowest token of row b's largest logit, from what a head for B rows kept; -2 if one is not finite."""
    p = tl.arange(0, PIECES)
    known = p < programs
    u = tl.load(best + p * B + b, known, -float("inf"))
    top = tl.max(u, 0)
    chosen = tl.min(tl.where(known & (u == top), tl.load(best_at + p * B + b, known, V), V), 0).to(tl.int64)
    bad = (tl.sum((u != u).to(tl.int32), 0) > 0) | (top == float("inf")) | (top == -float("inf"))
    return tl.where(bad, -2, chosen)


@triton.jit(do_not_specialize=["offset"])
def choose_and_embed(
    best, best_at, token, embedding, x, centres, clock, tokens, host_tokens, stamps, offset, programs, V, step,
    D: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, GREEDY: tl.constexpr, LAST: tl.constexpr, PDL: tl.constexpr,
    STAMP: tl.constexpr,
):  # fmt: skip
    """x = embedding[token], which goes to the log on the device and to the host's pinned memory; its mean is a centre.

    GREEDY takes the lowest id of the largest logit, from what the head's programs kept; otherwise `token` has been
    drawn. A logit that is not finite ends the row: -2 is told to the host, and token 0 goes on. The token at `offset`
    of the block whose first position is `clock` stands behind position clock + offset. LAST moves the clock on, while
    its second number still says where the block began. STAMP notes the device's own time in nanoseconds.
    """
    k = tl.arange(0, K)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    base = tl.load(clock)
    chosen = largest(best, best_at, 0, 1, programs, V, PIECES) if GREEDY else tl.load(token)
    row = tl.where(chosen < 0, 0, chosen)
    new = tl.load(embedding + row * D + k, k < D, 0.0).to(tl.float32)
    tl.store(x + place(k), new, k < D)
    tl.store(centres, tl.sum(new, 0) / D)
    tl.store(token, row)
    tl.store(tokens + base + offset, chosen)
    tl.store(host_tokens + base + offset, chosen)
    tl.store(clock + 1, base)
    if STAMP:
        tl.store(stamps + base + offset, globaltimer())
    if LAST:
        tl.store(clock, base + step)


REGISTERS = 200
"""What a thread may hold of the weights, of the 255 that it has."""


def rows_held(most: int, bytes_a_row: int, warps: int) -> int:
    """How many rows, a power of two up to `most`, so many warps can hold in their registers; at least one."""
    rows = most
    while rows > 1 and rows * bytes_a_row > 4 * REGISTERS * 32 * warps:
        rows //= 2
    return rows


def widest(layers: list[LayerWeights], head: Tensor) -> int:
    """Bytes of an element of the widest matrix that a step streams."""
    matrices = [m[0] for layer in layers for m in (layer.in_proj, layer.out_proj, layer.fc1, layer.fc2)]
    return max(m.element_size() for m in [*matrices, head])


def cut(shape: tuple[int, int]) -> dict[str, int]:
    """What a launch takes of rows a program and its warps."""
    return {"ROWS": shape[0], "WARPS": shape[1], "num_warps": shape[1]}


@dataclass(frozen=True)
class Shapes:
    """Output rows a program and its warps, of every kernel. Measured on an H100 at D = 768, each in the whole step."""

    mix: tuple[int, int] = (1, 1)
    out: tuple[int, int] = (4, 4)
    fc1: tuple[int, int] = (4, 1)
    fc2: tuple[int, int] = (4, 2)
    head: tuple[int, int] = (16, 1)

    @classmethod
    def fit(cls, width: int, inner: int, itemsize: int = 2) -> Shapes:
        """For a model of that width, of its MLPs too, whose widest weights have `itemsize` bytes.

        Narrow models take fewer rows a program, so that enough programs run; wide ones more warps, and wide weights
        fewer rows, so that the weights of a program stay in registers.
        """
        if width < 512:
            return cls(out=(1, 1), fc1=(2, 1), fc2=(1, 1), head=(rows_held(16, width * itemsize, 1), 1))
        more = min(triton.next_power_of_2(triton.cdiv(width, 1024)), 8)
        fc2 = rows_held(4, inner * itemsize, 2 * more), 2 * more
        head = rows_held(16, width * itemsize, more), more
        return cls((1, more), (4, max(4, more)), (rows_held(4, width * itemsize, more), more), fc2, head)


@dataclass(frozen=True)
class Layer:
    """The tensors of one block as these kernels take them: a LayerNorm and W as (W, bias + W beta, W gamma)."""

    gammas: tuple[Tensor, Tensor]
    mix: tuple[Tensor, ...]
    short: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, ...]
    fc2: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, layer: LayerWeights) -> Layer:
        """That of a block's weights."""
        gammas = placed(layer.norm1[0].float()), placed(layer.norm2[0].float())
        mix, fc1 = folded(layer.norm1, layer.in_proj), folded(layer.norm2, layer.fc1)
        return cls(gammas, mix, layer.short, layer.out_proj, fc1, layer.fc2)


def placed(vector: Tensor) -> Tensor:
    """A vector [N] as the kernels keep it: padded with zeros to whole blocks of 256, each as `place` says."""
    blocks = torch.nn.functional.pad(vector, (0, -len(vector) % 256)).view(-1, 128, 2)
    return blocks.transpose(1, 2).flatten()


def folded(norm: tuple[Tensor, Tensor], linear: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """(W, W beta + b, W gamma) of W norm(x) + b = (W gamma x - mean W gamma) / deviation + W beta + b."""
    both = torch.stack([t.double() for t in norm], dim=1)
    weight, bias = linear
    slope, offset = torch.cat([some.double() @ both for some in weight.split(4096)]).unbind(1)
    return weight, (bias.double() + offset).float(), slope.float()


class Step:
    """What every fused step on a GPU does: forks, and a position as forward, draw and embed."""

    kernels: ModuleType
    batch = 1
    width: int
    vocab: int
    block: int
    programs: int
    pdl: bool
    embedding: Tensor
    best: Tensor
    best_at: Tensor
    logits: Tensor
    token: Tensor

    def fork(self) -> Self:
        """The same weights with scratch of its own, for other sequences."""
        other = copy.copy(self)
        other._scratch()
        return other

    def _scratch(self) -> None:
        raise NotImplementedError

    def forward(self, history: Tensor, pending: Tensor, clock: Tensor, offset: int) -> None:
        """x -> logits, the mixer rows written. history [rows, M D B], pending [layers, taps - 1, B, (N + 1) D]."""
        raise NotImplementedError

    def embed(
        self, clock: Tensor, tokens: Tensor, host_tokens: Tensor, stamps: Tensor, offset: int, *, last: bool,
        greedy: bool, pdl: bool,
    ) -> None:  # fmt: skip
        """Chooses every row's token, or takes those drawn, and embeds them."""
        tensors, constants = self._embedded
        self.kernels.choose_and_embed[(self.batch,)](
            self.best, self.best_at, self.token, self.embedding, *tensors, clock, tokens, host_tokens, stamps, offset,
            self.programs, self.vocab, self.block, D=self.width, PIECES=triton.next_power_of_2(self.programs),
            GREEDY=greedy, LAST=last, PDL=pdl, STAMP=self.token.is_cuda, num_warps=4, **constants,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip

    @property
    def _embedded(self) -> tuple[list[Tensor], dict[str, int]]:
        """What the kernel that embeds reads and writes for the next position, and its own constants."""
        raise NotImplementedError

    def launch(
        self, history: Tensor, pending: Tensor, clock: Tensor, tokens: Tensor, host_tokens: Tensor, stamps: Tensor,
        offset: int, *, last: bool, draw: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """One position: x -> logits -> tokens -> x.

        `draw` makes the tokens from the logits instead of the largest; below 0 one tells that they are not finite.
        """
        self.forward(history, pending, clock, offset)
        if draw is not None:
            self.token.copy_(draw(self.logits))
        self.embed(
            clock, tokens, host_tokens, stamps, offset, last=last, greedy=draw is None, pdl=self.pdl and draw is None
        )


class GpuStep(Step):
    """Launches one position of one sequence through all layers, head and choice, on the current stream.

    Short filters are [taps, W], and all but the matrices float32. Everything it reads and writes is allocated here or
    given here, so that the launches can be captured in a graph.
    """

    kernels: ModuleType = sys.modules[__name__]
    fit: Callable[[int, int, int], Any] = Shapes.fit

    def __init__(
        self,
        layers: list[LayerWeights],
        norm: tuple[Tensor, Tensor],
        embedding: Tensor,
        head_weight: Tensor,
        diagonal: Tensor,
        near: Tensor,
        *,
        order: int,
        eps: float,
        block: int,
        shapes: Shapes | None = None,
        pdl: bool = True,
    ) -> None:
        self.embedding = embedding
        self.layers = [Layer.of(layer) for layer in layers]
        self.gamma = placed(norm[0].float())
        self.head = folded(norm, (head_weight, head_weight.new_zeros(head_weight.shape[0])))
        self.diagonal, self.near, self.order, self.eps, self.block = diagonal, near, order, eps, block
        self.width, self.vocab = embedding.shape[1], head_weight.shape[0]
        self.inner, self.pdl = layers[0].fc1[0].shape[0], pdl
        self.shapes: Any = shapes or self.fit(self.width, self.inner, widest(layers, head_weight))
        self.taps = layers[0].short[0].shape[0]
        self.programs = int(triton.cdiv(self.vocab, self.shapes.head[0]))
        self._scratch()

    def _scratch(self) -> None:
        diagonal, new = self.diagonal, self.diagonal.new_empty
        self.x, self.mixed, self.hidden = (
            diagonal.new_zeros(triton.cdiv(n, 256) * 256) for n in (self.width, self.width, self.inner)
        )
        self.logits = new(self.vocab)
        self.centres = new(2)
        self.best, self.token = new(self.programs), torch.zeros(1, dtype=torch.long, device=diagonal.device)
        self.best_at = torch.zeros(self.programs, dtype=torch.int32, device=diagonal.device)

    def start(self, rows: Tensor) -> None:
        """Puts an embedding [1, D] where the next position reads it."""
        self.x.copy_(placed(rows[0].float()))
        self.centres[0] = rows[0].float().mean()

    def forward(self, history: Tensor, pending: Tensor, clock: Tensor, offset: int) -> None:
        """x -> logits, the mixer rows written, as `Step.forward`."""
        D, F, eps, s, pdl = self.width, self.inner, self.eps, self.shapes, self.pdl
        C, lanes, kernels = history.shape[1] // self.batch, (self.order - 1) * D, self.kernels
        more = {"launch_pdl": True} if pdl else {}
        common = {"D": D, "PDL": pdl, **self._rows}

        for number, layer in enumerate(self.layers):
            # The clock moved at the end of the last block: its reader starts after that.
            early = more if number or offset else {}
            kernels.project_and_mix[(triton.cdiv(D, s.mix[0]),)](
                self.x, layer.gammas[0], self.centres, *layer.mix, *layer.short, pending[number], history, self.near,
                self.diagonal, clock, self.mixed, offset, number * lanes, C, eps, ORDER=self.order, TAPS=self.taps,
                BLOCK=self.block, **common, **cut(s.mix), **early,
            )  # fmt: skip
            kernels.add_product[(triton.cdiv(D, s.out[0]),)](
                self.x, self.mixed, *layer.out, N=D, **common, **cut(s.out), **more
            )
            kernels.norm_expand[(triton.cdiv(F, s.fc1[0]),)](
                self.x, layer.gammas[1], self.centres, *layer.fc1, self.hidden, N=F, eps=eps, **common, **cut(s.fc1),
                **more,
            )  # fmt: skip
            kernels.add_product[(triton.cdiv(D, s.fc2[0]),)](
                self.x, self.hidden, *layer.fc2, N=F, **common, **cut(s.fc2), **more
            )
        kernels.head[(self.programs,)](
            self.x, self.gamma, self.centres, *self.head, self.logits, self.best, self.best_at, self.vocab, eps,
            **common, **cut(s.head), **more,
        )  # fmt: skip

    @property
    def _rows(self) -> dict[str, int]:
        """What kernels for several rows are told of them."""
        return {}

    @property
    def _embedded(self) -> tuple[list[Tensor], dict[str, int]]:
        return [self.x, self.centres], {"K": int(triton.next_power_of_2(self.width))}
