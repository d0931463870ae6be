"""Checks of GPU kernels that hold wherever they run: on a device, and through the interpreter."""

from __future__ import annotations

import math

import torch

from flash_inference.ops.tile_conv.fft_rows import TileFFT, multiply
from flash_inference.testing import FFT_CONSTANT

EPS = torch.finfo(torch.float32).eps


def check_multiply(channels: int, V: int, batch: int, device: str) -> None:
    """Real sequences of 2 V places as V complex numbers, against their cyclic products in float64."""
    x, r = torch.randn(channels * batch, 2 * V, device=device), torch.randn(channels, 2 * V, device=device)
    z = torch.fft.fft(torch.view_as_complex(x.unflatten(1, (V, 2))))
    fft = TileFFT(V, lambda first, stop, cut: r[:, first:stop])
    multiply(z, fft.spectrum(range(channels)), fft.turns(z.device), batch)
    got = torch.view_as_real(torch.fft.ifft(z, norm="forward")).flatten(1)
    each = r.double().repeat_interleave(batch, dim=0)
    exact = torch.fft.irfft(torch.fft.rfft(x.double()) * torch.fft.rfft(each), n=2 * V)
    bound = FFT_CONSTANT * EPS * math.log2(4 * V) * x.double().norm(dim=1) * each.norm(dim=1)
    assert ((got - exact).abs() <= bound[:, None]).all()
