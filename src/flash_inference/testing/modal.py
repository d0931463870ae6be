"""Sums of modes another way: powers by repeated multiplication in extended precision; and how far a recurrence errs."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flash_inference.testing.bounds import FFT_CONSTANT
from flash_inference.testing.oracles import causal_conv_oracle


def modal_filter_oracle(poles: Tensor, residues: Tensor, n: int) -> Tensor:
    """Taps [C, n] float64: Re sum over s of residues[c, s] poles[c, s]^t, for poles and residues [C, S]."""
    p, power = (x.detach().cpu().numpy().astype(np.clongdouble) for x in (poles, residues))
    taps = np.zeros((len(p), n), dtype=np.longdouble)
    for t in range(n):
        taps[:, t] = power.sum(1).real
        power = power * p
    return torch.from_numpy(taps.astype(np.float64))


def recurrence_bound(
    y: Tensor,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None = None,
    *,
    eps: float,
    storage_eps: float | None = None,
) -> Tensor:
    """[B, L, C]: error of z = h * y + skip y for y [B, L, C] through modes, by steps, chunks and FFTs in any mix.

    With A[t] = sum over i and s of |R_s| |p_s|^(t - i) |y_i|, in units of u = eps / 2 relative to A: a step rounds the
    pole (1), multiplies complex numbers (sqrt 5, Brent, Percival and Zimmermann 2007) and adds (1), once a position.
    A power p^t by doubling errs by no more, and by 2 |log p| for the logarithm. Sums within a chunk of N add N + 4, the
    sum over modes 2 S + 1, the skip term 2. So eps (t (3 + |log p|) + S + 4) A in all, plus one FFT of
    C eps log2(n) ||y|| ||h||, and the output rounded to storage_eps.
    """
    _, L, C = y.shape
    skip = torch.zeros(C, dtype=torch.float64) if skip is None else skip.detach().double()
    weights = modal_filter_oracle(poles.abs(), residues.abs(), L)
    magnitude = causal_conv_oracle(y.abs(), weights) + skip.abs() * y.double().abs()
    turn = poles.to(torch.complex128).log().abs().amax(1)
    terms = torch.arange(L, dtype=torch.float64)[:, None] * (3 + turn) + poles.shape[1] + 4
    transforms = FFT_CONSTANT * eps * math.log2(4 * L) * y.double().norm(dim=1, keepdim=True) * weights.norm(dim=1)
    return eps * terms * magnitude + transforms + (eps if storage_eps is None else storage_eps) * magnitude
