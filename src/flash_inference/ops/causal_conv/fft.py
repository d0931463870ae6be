"""Causal convolution by FFT, differentiable: O(L log L) per channel."""

from __future__ import annotations

import torch
from torch import Tensor


def good_size(n: int) -> int:
    """The smallest 2^a, 3 * 2^a or 5 * 2^a that is at least n: sizes that FFT libraries do fast."""
    power = 1 << max(n - 1, 0).bit_length()
    return min(size for size in (power, power * 3 // 4, power * 5 // 8) if size >= n)


def causal_conv(y: Tensor, rho: Tensor, stride: int = 1) -> Tensor:
    """z[.., t] = sum over i <= t of y[.., i] rho[.., t - i]. Time is the last axis; leading axes broadcast.

    Computed in float32, or in float64 if either input is float64, whatever the storage dtype; returned in y's dtype.
    Error: about eps log2(L) ||y|| ||rho|| in the largest element. With a `stride` s, only lags that s divides are
    looked at: s convolutions of 1 / s the length.
    """
    length = y.shape[-1]
    if stride > 1:
        lanes = torch.nn.functional.pad(y, (0, -length % stride)).unflatten(-1, (-1, stride)).mT
        return causal_conv(lanes, rho[..., None, ::stride]).mT.flatten(-2)[..., :length]
    rho = rho[..., :length]
    size = good_size(length + rho.shape[-1] - 1)
    dtype = torch.float64 if torch.float64 in (y.dtype, rho.dtype) else torch.float32
    spectrum = torch.fft.rfft(y.to(dtype), n=size) * torch.fft.rfft(rho.to(dtype), n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :length].to(y.dtype)
