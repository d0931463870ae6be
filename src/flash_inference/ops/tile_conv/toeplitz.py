"""A tile of a batch as products with Toeplitz blocks on the tensor cores: time-major state, one launch for all."""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

SMALLEST, LARGEST = 32, 256
"""Sides for which they win: below, a tile is all overhead; above, transforms do less."""


def tile_toeplitz(history: Tensor, rho: Tensor, side: int, source: int, clock: Tensor, batch: int) -> None:
    """history[source + side + t] += sum over s of rho[side + t - s] history[source + s], for s and t < side.

    As `triton.tile_rows` for a square whose targets follow its sources, with `rho` [C, taps] channel-major: `source`
    counts from the position that `clock` [1] holds, history is [rows, C batch]. Taps beyond the last are zero. A
    program owns a channel and up to 128 targets of all rows: it multiplies blocks of the filter's Toeplitz matrix,
    gathered from the taps, with the sources. Products are tf32x3: error about 2^-21 sum |y| |rho| per element.
    """
    channels, taps = rho.shape
    targets, sources = min(side, 128), 64 if side == 64 else 32
    _tile_toeplitz[(channels, triton.cdiv(side, targets))](
        history, rho, clock, source, taps, channels, SIDE=side, TARGETS=targets, SOURCES=sources, B=batch,
        BATCH=max(16, triton.next_power_of_2(batch)), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["source"])
def _tile_toeplitz(
    history, rho, clock, source, taps, C, SIDE: tl.constexpr, TARGETS: tl.constexpr, SOURCES: tl.constexpr,
    B: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    channel, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TARGETS
    s, t, row = tl.arange(0, SOURCES), first + tl.arange(0, TARGETS), tl.arange(0, BATCH)
    known = (row < B)[None, :]
    column = history + channel * B + row[None, :]
    start = tl.load(clock) + source
    sums = tl.zeros([TARGETS, BATCH], tl.float32)
    for done in range(0, SIDE, SOURCES):
        given = tl.load(column + (start + done + s)[:, None] * C * B, known, 0.0).to(tl.float32)
        lag = SIDE - done + t[:, None] - s[None, :]
        weights = tl.load(rho + channel * taps + lag, lag < taps, 0.0)
        sums = tl.dot(weights, given, sums, input_precision="tf32x3")
    to = column + (start + SIDE + t)[:, None] * C * B
    inside = known & (t < SIDE)[:, None]
    tl.store(to, (tl.load(to, inside, 0.0).to(tl.float32) + sums).to(history.dtype.element_ty), inside)
