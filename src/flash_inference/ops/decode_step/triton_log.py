"""What a position on a GPU leaves behind when its tokens are chosen: the logs, and the clock."""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer


def log_tokens(
    token: Tensor, clock: Tensor, tokens: Tensor, host_tokens: Tensor, stamps: Tensor, offset: int, step: int
) -> None:
    """Writes the chosen tokens [B] to the logs [rows, B], on the device and in the host's pinned memory.

    The row is that of position clock + offset. A token below 0 tells the host that its row has ended; 0 goes on in its
    place. The clock moves on by `step`, while its second number still says where the block began; `stamps` takes the
    device's own time in nanoseconds.
    """
    (batch,) = token.shape
    # One warp: all of it has read the clock before any of it moves the clock on.
    _log_tokens[(1,)](
        token, clock, tokens, host_tokens, stamps, offset, step, batch, PLACES=triton.next_power_of_2(batch),
        STAMP=token.is_cuda, num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["offset", "step"])
def _log_tokens(
    token, clock, tokens, host_tokens, stamps, offset, step, batch, PLACES: tl.constexpr, STAMP: tl.constexpr
):  # fmt: skip
    row = tl.arange(0, PLACES)
    inside = row < batch
    base = tl.load(clock)
    chosen = tl.load(token + row, inside, 0)
    place = (base + offset) * batch + row
    tl.store(token + row, tl.maximum(chosen, 0), inside)
    tl.store(tokens + place, chosen, inside)
    tl.store(host_tokens + place, chosen, inside)
    if STAMP:
        tl.store(stamps + base + offset, globaltimer())
    tl.store(clock, base + step)
    tl.store(clock + 1, base)


@triton.jit
def leave_token(
    token, row, chosen, clock, tokens, host_tokens, stamps, base, offset, step, b, B: tl.constexpr, LAST: tl.constexpr,
    STAMP: tl.constexpr,
):  # fmt: skip
    """As `log_tokens`, for row b of B in a program of its own, where `row` goes on in the place of what was `chosen`.

    `clock` [2 + B] holds a clock for every row behind the common pair: programs must not read what another moves on,
    which LAST does.
    """
    tl.store(token + b, row)
    tl.store(tokens + (base + offset) * B + b, chosen)
    tl.store(host_tokens + (base + offset) * B + b, chosen)
    if LAST:
        tl.store(clock + 2 + b, base + step)
    if b == 0:
        tl.store(clock + 1, base)
        if STAMP:
            tl.store(stamps + base + offset, globaltimer())
        if LAST:
            tl.store(clock, base + step)
