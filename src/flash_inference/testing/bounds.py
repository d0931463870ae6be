"""How far two correct computations may lie apart: error bounds derived from the data they work on.

Notation: eps is the spacing of the accumulating precision at 1 (2^-23 for float32), u = eps / 2 its unit roundoff,
A[t] = sum over i of |y[i]| |rho[t - i]|, ||.|| the 2-norm over time, per channel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_inference.testing.oracles import causal_conv_oracle, tile_conv_oracle

FFT_CONSTANT = 3 * (1 + 4 * math.sqrt(2)) / 2
"""C in the FFT bound C eps log2(n) ||y|| ||rho||: what three transforms may add, about 10.

A radix-2 level with twiddles rounded to u loses at most (1 + 4 sqrt 2) u relative in the 2-norm (Higham, Accuracy and
Stability of Numerical Algorithms, theorem 24.2), so a transform of n points at most (1 + 4 sqrt 2) / 2 eps log2(n).
By Cauchy-Schwarz and Parseval the error of either forward transform reaches an output by at most that times
||y|| ||rho||. The inverse's error is bounded in the 2-norm over the circle, by sqrt(n) ||y|| ||rho||, and taken as
spread evenly over its n places. The products' roundings are of lower order in log2(n).
"""


def direct_bound(y: Tensor, rho: Tensor, first: int, targets: int, eps: float) -> Tensor:
    """[T, B, C]: S eps sum |y| |rho|, for a tile of S sources summed directly: S products, S additions, S u each."""
    return y.shape[0] * eps * tile_conv_oracle(y.abs(), rho.abs(), first, targets)


def fft_bound(y: Tensor, rho: Tensor, first: int, targets: int, eps: float) -> Tensor:
    """[B, C]: C eps log2(n) ||y|| ||rho|| for a tile by FFT on n points, rho the taps on the circle."""
    S = y.shape[0]
    n = max(circle(S + targets - 1), 2)
    window = rho[:, first : first + n].double()
    return FFT_CONSTANT * eps * math.log2(n) * y.double().norm(dim=0) * window.norm(dim=1)


def storage_bound(before: Tensor, owed: Tensor, eps: float) -> Tensor:
    """What storing costs: `before + owed` is formed and rounded, `owed` perhaps rounded first. eps is the storage's.

    At most u |owed| + u (|before| + |owed|) <= eps (|before| + |owed|).
    """
    return eps * (before.double().abs() + owed.double().abs())


def causal_bound(
    y: Tensor,
    rho: Tensor,
    skip: Tensor | None = None,
    *,
    eps: float,
    storage_eps: float | None = None,
    payments: Tensor | int = 1,
) -> Tensor:
    """[B, L, C] for a causal convolution of y [B, L, C] with rho [C, n], paid in tiles, direct or by FFT, in any mix.

    payments [L]: how many tiles reached a target at most. Direct parts err by at most (t + 2) eps A[t]. The tiles of
    one target have disjoint sources, so their FFT errors add up to at most C eps log2(n) ||y|| ||rho|| sqrt(payments).
    Each payment may round the stored partial sum, each of at most A[t], and storing rounds the inputs once.
    """
    _, L, C = y.shape
    skip = torch.zeros(C, dtype=torch.float64) if skip is None else skip.double()
    magnitude = causal_conv_oracle(y.abs(), rho.abs()) + skip.abs() * y.double().abs()
    count = torch.as_tensor(payments, dtype=torch.float64).expand(L)[:, None]
    terms = torch.arange(L, dtype=torch.float64)[:, None] + 2
    norms = y.double().norm(dim=1, keepdim=True) * rho.double().norm(dim=1)
    transforms = FFT_CONSTANT * eps * math.log2(4 * L) * norms * count.clamp(min=1).sqrt()
    storage = (eps if storage_eps is None else storage_eps) * (count + 1) * magnitude
    return eps * terms * magnitude + transforms + storage


def circle(n: int) -> int:
    """The most points that an FFT of at least n points may take here: the next power of two."""
    return 1 << max(n - 1, 0).bit_length()
