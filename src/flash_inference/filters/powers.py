"""The powers of a set of poles, in two factors, and the two sums that use them."""

from __future__ import annotations

import torch
from torch import Tensor


class Powers:
    """p[c, s]^t for t < n, kept as p^(aK + b) = p^(aK) p^b with K near sqrt(n): O(sqrt(n)) numbers a pole.

    `log_poles` [C, S] is complex128, or float64 for real positive poles. Powers are formed in float64 by repeated
    doubling, so that p^t is off by about t |log p| 2^-53, and are rounded to `dtype` at the end.
    """

    def __init__(self, log_poles: Tensor, n: int, dtype: torch.dtype) -> None:
        self.n, self.side = n, 1 << (n.bit_length() + 1) // 2
        self.fine = doubled(log_poles, 1, self.side).to(dtype)
        self.coarse = doubled(log_poles, self.side, -(-n // self.side)).to(dtype)

    def weigh(self, weights: Tensor, n: int) -> Tensor:
        """Re sum over s of weights[.., c, s] p[c, s]^t for t < n: [.., C, S] -> [.., C, n], real. Cost O(n S)."""
        rows = weights[..., None, :] * self.coarse[:, : -(-n // self.side)]
        return (parts(rows) @ parts(self.fine.conj()).mT).flatten(-2)[..., :n]

    def gather(self, y: Tensor) -> Tensor:
        """Sum over i < N of p[c, s]^(N - 1 - i) y[.., c, i]: real [.., C, N] -> [.., C, S]. Cost O(N S)."""
        rows = -(-y.shape[-1] // self.side)
        newest_first = torch.nn.functional.pad(y.flip(-1), (0, rows * self.side - y.shape[-1]))
        sums = newest_first.unflatten(-1, (rows, self.side)) @ parts(self.fine)
        sums = torch.view_as_complex(sums.unflatten(-1, (-1, 2))) if self.fine.is_complex() else sums
        return (sums * self.coarse[:, :rows]).sum(-2)


def doubled(log_poles: Tensor, stride: int, count: int) -> Tensor:
    """p^0, p^stride, .., p^((count - 1) stride) as [C, count, S]: products of two known powers, but for p^stride."""
    powers = torch.ones_like(log_poles)[:, None]
    if count > 1:
        factor = torch.exp(stride * log_poles)[:, None]
        powers = torch.cat([powers, factor], dim=1)
        while (known := powers.shape[1]) < count:
            factor = factor.square()
            powers = torch.cat([powers, powers[:, : count - known] * factor], dim=1)
    return powers[:, :count]


def parts(x: Tensor) -> Tensor:
    """Complex [.., S] as real [.., 2 S], so that parts(x) . parts(y) is the real part of x . conj(y); real as it is."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x
