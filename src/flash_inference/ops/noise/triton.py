"""Exponential noise in one launch."""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_inference.ops.noise import FIRST, GAMMA, SECOND

SIZE = 1024


def exponential_rows(streams: Tensor, drawn: Tensor, count: int) -> Tensor:
    """As `exponential`, but for the last bits of the logarithm."""
    out = torch.empty(len(streams), count, device=streams.device)
    _exponential[(triton.cdiv(count, SIZE), len(streams))](
        streams, drawn, out, count, streams.stride(0), drawn.stride(0), GAMMA, FIRST, SECOND, SIZE=SIZE, num_warps=4
    )
    return out


@triton.jit
def _exponential(
    streams, drawn, out, count, apart, drawn_apart, gamma, first, second, SIZE: tl.constexpr
):  # fmt: skip
    row, at = tl.program_id(1), tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    number = tl.load(drawn + row * drawn_apart) * count + at + 1
    x = tl.load(streams + row * apart) + number * gamma
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * first
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * second
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    w = (((x >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float32) + 0.5) * 1.1102230246251565e-16
    # 1 - w loses what is small.
    small = w * (1 + w * (0.5 + w * (0.3333333333333333 + w * 0.25)))
    e = tl.where(w < 0.01, small, -tl.log(tl.maximum(1 - w, 1e-30)))
    tl.store(out + row.to(tl.int64) * count + at, e, at < count)
