"""The decode step of order-N Hyena blocks on a GPU: four kernels a layer, a head, a choice.

A one-token pass reads every weight once and does little else. Each kernel is a matrix-vector product whose programs own
a few output rows; what stands before it (norm) is repeated by every program, what stands after it (short convolution,
gates, mixer row, activation, residual) is done on the rows owned. With programmatic dependent launch (`PDL`) a kernel
fetches its weights while the one before it still runs, and waits only then.

x [D] float32 is the residual stream; weights [out, in] float32, bfloat16 or float16, sums in float32. `history` is the
one buffer of the mixers, time-major [rows, M D]: a row holds partial sums until its position is read and inputs
afterwards. `near` [BLOCK, M D] are the first taps: pairs inside an aligned block of BLOCK positions are paid inline.
"""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

from flash_inference.ops.decode_step.numpy import LayerWeights


@triton.jit
def _stream(w, row, wanted, N: tl.constexpr):
    """Rows of a matrix [.., N] in pieces [ROWS, 256]: a warp holds whole rows, so that sums need no barrier."""
    k = tl.arange(0, 256)
    pieces = ()
    for c in tl.static_range((N + 255) // 256):
        known = wanted[:, None] & (c * 256 + k < N)[None, :]
        pieces = pieces + (tl.load(w + row[:, None].to(tl.int64) * N + (c * 256 + k)[None, :], known, 0.0),)
    return pieces


@triton.jit
def _spread(v, N: tl.constexpr, ROWS: tl.constexpr):
    """A vector [N] in pieces [ROWS, 256], the same in every row: each warp reads it by itself, without a barrier."""
    k = tl.arange(0, 256)
    pieces = ()
    for c in tl.static_range((N + 255) // 256):
        at = tl.broadcast_to((c * 256 + k)[None, :], (ROWS, 256))
        pieces = pieces + (tl.load(v + at, at < N, 0.0),)
    return pieces


@triton.jit
def _times(w, v):
    """The product of rows in pieces with a vector in pieces: [ROWS]."""
    sums = w[0].to(tl.float32) * v[0]
    for c in tl.static_range(1, len(v)):
        sums += w[c].to(tl.float32) * v[c]
    return tl.sum(sums, 1)


@triton.jit
def _normed(x, gamma, beta, eps, D: tl.constexpr, ROWS: tl.constexpr):
    """LayerNorm of x [D] in pieces."""
    k = tl.arange(0, 256)[None, :]
    v = _spread(x, D, ROWS)
    scale = _spread(gamma, D, ROWS)
    shift = _spread(beta, D, ROWS)
    total = v[0]
    for c in tl.static_range(1, len(v)):
        total += v[c]
    mean = (tl.sum(total, 1) / D)[:, None]
    centred = ()
    squares = tl.zeros([ROWS, 256], tl.float32)
    for c in tl.static_range(len(v)):
        piece = tl.where(c * 256 + k < D, v[c] - mean, 0.0)
        squares += piece * piece
        centred = centred + (piece,)
    inverse = tl.rsqrt(tl.sum(squares, 1) / D + eps)[:, None]
    normed = ()
    for c in tl.static_range(len(v)):
        normed = normed + (centred[c] * inverse * scale[c] + shift[c],)
    return normed


@triton.jit(do_not_specialize=["offset", "lane"])
def project_and_mix(
    x, gamma, beta, w, b, short_w, short_b, pending, history, near, diagonal, clock, out, offset, lane, C, eps,
    D: tl.constexpr, ORDER: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [D] = x_0 z_last: norm, input projection, short convolution, gates and mixer rows of one layer.

    `clock` holds the position of the block's first row, `offset` the position in it; `lane` is the layer's first column
    of `history`. `pending` [TAPS - 1, (N + 1) D] is what past inputs of the short convolution owe the next positions.
    Mixer rows of earlier positions may be read before the wait: `choose_and_embed` lets nothing of a position start
    before the last position's kernels are over.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = row < D
    W: tl.constexpr = (ORDER + 1) * D
    weights = ()
    biases = ()
    for g in tl.static_range(ORDER + 1):
        weights = weights + (_stream(w, g * D + row, wanted, D),)
        biases = biases + (tl.load(b + g * D + row, wanted, 0.0).to(tl.float32),)
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
    h = _normed(x, gamma, beta, eps, D, ROWS)
    gates = ()
    for g in tl.static_range(ORDER + 1):
        u = _times(weights[g], h) + biases[g]
        gates = gates + (u * taps[g * TAPS] + owed[g * TAPS],)
        for j in tl.static_range(TAPS - 1):
            later = owed[g * TAPS + j + 1] + u * taps[g * TAPS + j + 1]
            tl.store(pending + j * W + g * D + row, later, wanted)
    v = gates[ORDER]
    for o in tl.static_range(ORDER - 1):
        y = gates[ORDER - 1 - o] * v
        v = sums[o] + own[o] * y
        tl.store(now + o * D, y.to(history.dtype.element_ty), wanted)
    tl.store(out + row, gates[0] * v, wanted)


@triton.jit
def add_product(x, v, w, b, D, N: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):
    """x [D] += w [D, N] v [N] + b."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = row < D
    weights = _stream(w, row, wanted, N)
    bias = tl.load(b + row, wanted, 0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    stands = tl.load(x + row, wanted, 0.0) + bias
    tl.store(x + row, stands + _times(weights, _spread(v, N, ROWS)), wanted)


@triton.jit
def norm_expand(x, gamma, beta, w, b, out, N, eps, D: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):
    """out [N] = gelu(w [N, D] norm(x) + b), the tanh form of GELU."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = row < N
    weights = _stream(w, row, wanted, D)
    bias = tl.load(b + row, wanted, 0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    u = _times(weights, _normed(x, gamma, beta, eps, D, ROWS)) + bias
    # 0.5 u (1 + tanh(a)) = u sigmoid(2 a)
    tl.store(out + row, u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u)), wanted)


@triton.jit
def head(
    x, gamma, beta, w, logits, best, best_at, V, eps, D: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """logits [V] = w [V, D] norm(x); each program also keeps its largest logit and the lowest token that has it.

    A program with a NaN among its logits keeps NaN.
    """
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    wanted = row < V
    weights = _stream(w, row, wanted, D)
    if PDL:
        gdc_wait()
    u = _times(weights, _normed(x, gamma, beta, eps, D, ROWS))
    tl.store(logits + row, u, wanted)
    worst = tl.sum(((u != u) & wanted).to(tl.int32), 0) > 0
    u = tl.where(wanted & (u == u), u, -float("inf"))
    top = tl.max(u, 0)
    tl.store(best + program, tl.where(worst, float("nan"), top))
    tl.store(best_at + program, tl.min(tl.where(u == top, row, V), 0))


@triton.jit(do_not_specialize=["offset"])
def choose_and_embed(
    best, best_at, token, embedding, x, clock, tokens, host_tokens, stamps, offset, programs, V, step,
    D: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, GREEDY: tl.constexpr, LAST: tl.constexpr, PDL: tl.constexpr,
    STAMP: tl.constexpr,
):  # fmt: skip
    """x = embedding[token], which goes to the log on the device and to the host's pinned memory.

    GREEDY takes the lowest id of the largest logit, from what the head's programs kept; otherwise `token` has been
    drawn. A logit that is not finite ends the row: -2 is told to the host, and token 0 goes on. The token at `offset`
    of the block whose first position is `clock` stands behind position clock + offset. LAST moves the clock on, while
    its second number still says where the block began. STAMP notes the device's own time in nanoseconds.
    """
    k = tl.arange(0, K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    base = tl.load(clock)
    if GREEDY:
        p = tl.arange(0, PIECES)
        known = p < programs
        u = tl.load(best + p, known, -float("inf"))
        top = tl.max(u, 0)
        chosen = tl.min(tl.where(known & (u == top), tl.load(best_at + p, known, V), V), 0).to(tl.int64)
        bad = (tl.sum((u != u).to(tl.int32), 0) > 0) | (top == float("inf")) | (top == -float("inf"))
        chosen = tl.where(bad, -2, chosen)
    else:
        chosen = tl.load(token)
    row = tl.where(chosen < 0, 0, chosen)
    tl.store(x + k, tl.load(embedding + row * D + k, k < D, 0.0).to(tl.float32), k < D)
    tl.store(token, row)
    tl.store(tokens + base + offset, chosen)
    tl.store(host_tokens + base + offset, chosen)
    tl.store(clock + 1, base)
    if STAMP:
        tl.store(stamps + base + offset, globaltimer())
    if LAST:
        tl.store(clock, base + step)


@dataclass(frozen=True)
class Shapes:
    """Output rows a program and warps of every kernel. Measured on an H100 at D = 768."""

    mix: tuple[int, int] = (2, 1)
    out: tuple[int, int] = (8, 4)
    fc1: tuple[int, int] = (32, 8)
    fc2: tuple[int, int] = (4, 2)
    head: tuple[int, int] = (32, 4)

    @classmethod
    def fit(cls, width: int) -> Shapes:
        """For a model of that width: narrow ones take fewer rows a program, so that enough programs run."""
        return cls() if width >= 512 else cls(out=(2, 1), fc1=(8, 4), fc2=(2, 1), head=(16, 4))


class Step:
    """What every fused step on a GPU does: forks, and a position as forward, draw and embed."""

    pdl: bool
    logits: Tensor
    token: Tensor

    def fork(self) -> Self:
        """The same weights with scratch of its own, for other sequences."""
        other = copy.copy(self)
        other._scratch()
        return other

    def _scratch(self) -> None:
        raise NotImplementedError

    def forward(
        self, history: Tensor, pending: Tensor, clock: Tensor, offset: int,
        after_mixing: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """x -> logits, the mixer rows written. history [rows, M D B], pending [layers, taps - 1, B, (N + 1) D].

        `after_mixing` is called behind the last layer's mixer row, when all inputs of the position are known.
        """
        raise NotImplementedError

    def embed(
        self, clock: Tensor, tokens: Tensor, host_tokens: Tensor, stamps: Tensor, offset: int, *, last: bool,
        greedy: bool, pdl: bool,
    ) -> None:  # fmt: skip
        """Chooses every row's token, or takes those drawn, and embeds them."""
        raise NotImplementedError

    def launch(
        self, history: Tensor, pending: Tensor, clock: Tensor, tokens: Tensor, host_tokens: Tensor, stamps: Tensor,
        offset: int, *, last: bool, after_mixing: Callable[[], None] | None = None,
        draw: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """One position: x -> logits -> tokens -> x.

        `draw` makes the tokens from the logits instead of the largest; below 0 one tells that they are not finite.
        """
        self.forward(history, pending, clock, offset, after_mixing)
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
        self.layers, self.norm, self.embedding, self.head_weight = layers, norm, embedding, head_weight
        self.diagonal, self.near, self.order, self.eps, self.block = diagonal, near, order, eps, block
        self.width, self.vocab = embedding.shape[1], head_weight.shape[0]
        self.shapes, self.pdl = shapes or Shapes.fit(self.width), pdl
        self.inner = layers[0].fc1[0].shape[0]
        self.taps = layers[0].short[0].shape[0]
        self.programs = triton.cdiv(self.vocab, self.shapes.head[0])
        self._scratch()

    def _scratch(self) -> None:
        diagonal, new = self.diagonal, self.diagonal.new_empty
        self.x, self.mixed, self.hidden, self.logits = (
            new(self.width),
            new(self.width),
            new(self.inner),
            new(self.vocab),
        )
        self.best, self.token = new(self.programs), torch.zeros(1, dtype=torch.long, device=diagonal.device)
        self.best_at = torch.zeros(self.programs, dtype=torch.int32, device=diagonal.device)

    def start(self, rows: Tensor) -> None:
        """Puts an embedding [1, D] where the next position reads it."""
        self.x.copy_(rows[0])

    def forward(
        self, history: Tensor, pending: Tensor, clock: Tensor, offset: int,
        after_mixing: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """x -> logits, the mixer rows written. history [rows, M D], pending [layers, taps - 1, (N + 1) D].

        `after_mixing` is called behind the last layer's mixer row, when all inputs of the position are known.
        """
        D, eps, C = self.width, self.eps, history.shape[1]
        F, s, pdl = self.inner, self.shapes, self.pdl
        more = {"launch_pdl": True} if pdl else {}
        lanes = (self.order - 1) * D
        for number, layer in enumerate(self.layers):
            rows, warps = s.mix
            # The clock moved at the end of the last block: its reader starts after that.
            early = more if number or offset else {}
            project_and_mix[(triton.cdiv(D, rows),)](
                self.x, *layer.norm1, *layer.in_proj, *layer.short, pending[number], history, self.near, self.diagonal,
                clock, self.mixed, offset, number * lanes, C, eps, D=D, ORDER=self.order, TAPS=self.taps,
                BLOCK=self.block, ROWS=rows, PDL=pdl, num_warps=warps, **early,
            )  # fmt: skip
            if number + 1 == len(self.layers) and after_mixing is not None:
                after_mixing()
            rows, warps = s.out
            add_product[(triton.cdiv(D, rows),)](
                self.x, self.mixed, *layer.out_proj, D, N=D, ROWS=rows, PDL=pdl, num_warps=warps, **more
            )
            rows, warps = s.fc1
            norm_expand[(triton.cdiv(F, rows),)](
                self.x, *layer.norm2, *layer.fc1, self.hidden, F, eps, D=D, ROWS=rows, PDL=pdl, num_warps=warps,
                **more,
            )  # fmt: skip
            rows, warps = s.fc2
            add_product[(triton.cdiv(D, rows),)](
                self.x, self.hidden, *layer.fc2, D, N=F, ROWS=rows, PDL=pdl, num_warps=warps, **more
            )
        rows, warps = s.head
        head[(self.programs,)](
            self.x, *self.norm, self.head_weight, self.logits, self.best, self.best_at, self.vocab, eps, D=D,
            ROWS=rows, PDL=pdl, num_warps=warps, **more,
        )  # fmt: skip

    def embed(
        self, clock: Tensor, tokens: Tensor, host_tokens: Tensor, stamps: Tensor, offset: int, *, last: bool,
        greedy: bool, pdl: bool,
    ) -> None:  # fmt: skip
        """Chooses the token, or takes the one drawn, and embeds it."""
        D = self.width
        choose_and_embed[(1,)](
            self.best, self.best_at, self.token, self.embedding, self.x, clock, tokens, host_tokens, stamps, offset,
            self.programs, self.vocab, self.block, D=D, K=triton.next_power_of_2(D),
            PIECES=triton.next_power_of_2(self.programs), GREEDY=greedy, LAST=last, PDL=pdl, STAMP=self.x.is_cuda,
            num_warps=4,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
