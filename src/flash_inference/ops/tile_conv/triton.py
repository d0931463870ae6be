"""Direct sums on a GPU, on time-major state: tiles of all layers in one launch, and the rows of a single position."""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ONCE = tl.constexpr("evict_first")
"""What the L2 cache does with a tile's state, taps and spectra, which are far more than it holds: the weights that a
step finds there again would never come back once something of the usual policy stands in their place."""


def tile_rows(
    history: Tensor, rho: Tensor, sources: range, targets: range, clock: Tensor, batch: int = 1
) -> None:  # fmt: skip
    """history[j] += sum over i of history[i] rho[j - i] for rows i of `sources`, j of `targets`; channels all.

    Both ranges count from the position that `clock` [1] holds on the device, so that one captured launch serves every
    position. history [rows, C batch] and rho [taps, C], time-major and contiguous: `batch` neighbours share a filter.
    Lags at or above taps pay nothing. Sums in float32. One launch, O(S T) per channel: for sides up to about 256. Every
    thread owns a channel, holds a few targets and slides a window of taps over the sources. Error at most
    S eps sum |y| |rho| per element.
    """
    S, T, C = len(sources), len(targets), history.shape[1]
    outs, ins, lanes = shape_for(T)
    grid = (triton.cdiv(C, lanes), triton.cdiv(T, outs))
    _tile_rows[grid](
        history, rho, clock, sources.start, targets.start, S, T, rho.shape[0], C, OUTS=outs, INS=ins, LANES=lanes,
        TURNS=triton.cdiv(S, ins), BATCH=batch, num_warps=max(1, lanes // 32),
    )  # fmt: skip


def shape_for(targets: int) -> tuple[int, int, int]:
    """(targets a thread, sources a turn, channels a program): the largest window that stays in registers."""
    if targets >= 64:
        return 32, 16, 64
    return (8, 16, 64) if targets >= 32 else (4, 16, 64)


@triton.jit(do_not_specialize=["source", "target"])
def _tile_rows(
    history,
    rho,
    clock,
    source,
    target,
    S,
    T,
    taps,
    C,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
    LANES: tl.constexpr,
    TURNS: tl.constexpr,
    BATCH: tl.constexpr,
):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < C
    first = tl.program_id(1) * OUTS
    now = tl.load(clock)
    y = history + (now + source) * C + lane
    lag = target - source + first
    sums = ()
    for _ in tl.static_range(OUTS):
        sums = sums + (tl.zeros([LANES], tl.float32),)
    for turn in range(TURNS):
        start = turn * INS
        low = lag - start - INS + 1
        window = ()
        for w in tl.static_range(OUTS + INS - 1):
            known = inside & (low + w >= 1) & (low + w < taps)
            window = window + (
                tl.load(
                    rho + tl.cast(low + w, tl.int64) * (C // BATCH) + lane // BATCH, known, 0.0, eviction_policy=ONCE
                ).to(tl.float32),
            )  # fmt: skip
        for i in tl.static_range(INS):
            at = y + tl.cast(start + i, tl.int64) * C
            given = tl.load(at, inside & (start + i < S), 0.0, eviction_policy=ONCE).to(tl.float32)
            more = ()
            for o in tl.static_range(OUTS):
                more = more + (sums[o] + given * window[o - i + INS - 1],)
            sums = more
    z = history + (now + target + first) * C + lane
    for o in tl.static_range(OUTS):
        wanted = inside & (first + o < T)
        at = z + tl.cast(o, tl.int64) * C
        stands = tl.load(at, wanted, 0.0, eviction_policy=ONCE).to(tl.float32)
        tl.store(at, (stands + sums[o]).to(history.dtype.element_ty), wanted, eviction_policy=ONCE)


def mix_rows(
    history: Tensor, near: Tensor, diagonal: Tensor, y: Tensor, clock: Tensor, offset: int, lane: int, block: int
) -> Tensor:
    """The next outputs z [B, D] of the convolutions whose channels begin at `lane`, for inputs y [B, D].

    z = history[t] + sum over the block's earlier positions i of history[i] near[t - i] + diagonal y at the position
    t = clock + offset, `clock` [1] on the device being the first of a block of `block` positions; then history[t] = y.
    history [rows, C B], near [taps, C] with taps > block, diagonal [C]. Sums in float32; z has the dtype of y.
    """
    (batch, width), C, y = y.shape, history.shape[1], y.contiguous()
    z = torch.empty_like(y)
    _mix_rows[(triton.cdiv(batch * width, 64),)](
        history, near, diagonal, y, z, clock, offset, lane, width, C, BLOCK=block, BATCH=batch, LANES=64, num_warps=2
    )
    return z


@triton.jit(do_not_specialize=["offset", "lane"])
def _mix_rows(
    history, near, diagonal, y, z, clock, offset, lane, width, C, BLOCK: tl.constexpr, BATCH: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = at < width * BATCH
    channel = lane + at // BATCH
    column = tl.cast(lane, tl.int64) * BATCH + at
    given = at % BATCH * width + at // BATCH
    past = tl.arange(0, BLOCK)
    earlier = inside[:, None] & (past < offset)[None, :]
    block = history + tl.load(clock) * C
    inputs = tl.load(block + tl.cast(past, tl.int64)[None, :] * C + column[:, None], earlier, 0.0).to(tl.float32)
    taps = tl.cast(offset - past, tl.int64)[None, :] * (C // BATCH) + channel[:, None]
    sums = tl.sum(inputs * tl.load(near + taps, earlier, 0.0), 1)
    now = block + tl.cast(offset, tl.int64) * C + column
    new = tl.load(y + given, inside, 0.0).to(tl.float32)
    sums += tl.load(now, inside, 0.0).to(tl.float32) + tl.load(diagonal + channel, inside, 0.0) * new
    tl.store(now, new.to(history.dtype.element_ty), inside)
    tl.store(z + given, sums.to(z.dtype.element_ty), inside)
