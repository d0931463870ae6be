"""The mixers' kernels on a GPU against float64, in memory that is NaN where they must write or must not read."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("gpu: no CUDA device here, or Triton's interpreter is on", allow_module_level=True)
pytest.importorskip("triton")

from flash_inference.ops.tile_conv.fft_rows import TileFFT
from flash_inference.ops.tile_conv.toeplitz import tile_toeplitz
from flash_inference.ops.tile_conv.triton import tile_rows
from flash_inference.testing import storage_bound
from flash_inference.testing.bounds import FFT_CONSTANT

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_memory")]

CUDA = torch.device("cuda")
EPS = torch.finfo(torch.float32).eps
NAN = float("nan")
FAR = 2**31

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, and NaN at the same places."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def owed(y: Tensor, rho: Tensor, lag: int, targets: int) -> Tensor:
    """What y [S, C] owes `targets` rows [T, C] under taps rho [taps, C], the nearest pair `lag` apart: float64."""
    S, C = y.shape
    out = torch.zeros(targets, C, dtype=torch.float64, device=y.device)
    taps = torch.nn.functional.pad(rho.double(), (0, 0, 0, max(0, lag + S + targets - len(rho))))
    for j in range(targets):
        window = taps[lag + j : lag + j + S].flip(0)
        out[j] = (y.double() * window).sum(0)
    return out


def test_fresh_memory_is_nan() -> None:
    assert torch.empty(1000, device=CUDA).isnan().all()


# --------------------------------------------------------------------------------------------------------------- tiles


def check_rows(history: Tensor, at: int, sources: range, targets: range, taps: int) -> None:
    """Fills sources and targets of a history that is NaN elsewhere, pays, and compares with float64."""
    C, dtype = history.shape[1], history.dtype
    given, paid = history[at + sources.start : at + sources.stop], history[at + targets.start : at + targets.stop]
    given.copy_(torch.randn(given.shape, device=CUDA))
    paid.copy_(torch.randn(paid.shape, device=CUDA))
    y, before = given.clone(), paid.clone()
    margin = torch.full((taps + 64, C), NAN, device=CUDA)
    rho = margin[32 : 32 + taps]
    rho.copy_(torch.randn(rho.shape, device=CUDA))
    around = history[max(0, at + sources.start - 64) : at + targets.stop + 64].clone()
    tile_rows(history, rho, sources, targets, torch.tensor([at], device=CUDA))
    lag = targets.start - sources.stop + 1
    exact = owed(y, rho, lag, len(targets))
    bound = len(sources) * EPS * owed(y.abs(), rho.abs(), lag, len(targets))
    bound += storage_bound(before, exact, torch.finfo(dtype).eps)
    assert ((paid.double() - before.double() - exact).abs() <= bound).all()
    paid.copy_(before)
    assert same(history[max(0, at + sources.start - 64) : at + targets.stop + 64], around)


@dtypes
@pytest.mark.parametrize("side", [1, 5, 16, 32, 64, 100, 128, 256])
@pytest.mark.parametrize("channels", [1, 7, 64, 771])
def test_tile_is_its_direct_sum(side: int, channels: int, dtype: torch.dtype) -> None:
    history = torch.full((2 * side + 100, channels), NAN, dtype=dtype, device=CUDA)
    check_rows(history, 48, range(16 - side, 16) if side <= 64 else range(side), span_after(side), 2 * side + 1)


def span_after(side: int) -> range:
    return range(16, 16 + side) if side <= 64 else range(side, 2 * side)


@pytest.mark.parametrize(("sources", "targets", "gap", "taps"), [(3, 200, 0, 90), (200, 3, 5, 300), (64, 64, 64, 100)])
def test_tile_of_other_shapes(sources: int, targets: int, gap: int, taps: int) -> None:
    history = torch.full((600, 33), NAN, device=CUDA)
    check_rows(history, 16, range(sources), range(sources + gap, sources + gap + targets), taps)


def far_history(channels: int, rows: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """More than 2^31 elements; only the last rows will be looked at."""
    rows = rows or FAR // channels + 2000
    assert rows * channels > FAR
    if torch.cuda.mem_get_info()[0] < rows * channels * dtype.itemsize + (2 << 30):
        pytest.skip("less free memory than this test needs")
    return torch.full((rows, channels), NAN, dtype=dtype, device=CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("channels", [1024, 18433])
def test_tile_beyond_32_bit_offsets(channels: int, dtype: torch.dtype) -> None:
    history = far_history(channels, dtype=dtype)
    at = len(history) - 600
    check_rows(history, at, range(0, 256), range(256, 512), 513)
    assert history[: at // 2 : 997].isnan().all()


# --------------------------------------------------------------------------------------------------------- tensor cores


@pytest.mark.parametrize("batch", [16, 17, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("side", "taps"), [(32, 65), (64, 129), (128, 200), (256, 513)])
def test_a_square_on_tensor_cores(side: int, taps: int, dtype: torch.dtype, batch: int) -> None:
    """All other rows are NaN and stay so; lags from `taps` on pay nothing."""
    C, first = 13, 5
    history = torch.full((first + 2 * side + 4, C * batch), NAN, dtype=dtype, device=CUDA)
    history[first : first + 2 * side] = torch.randn(2 * side, C * batch, device=CUDA).to(dtype)
    rho, whole = torch.randn(C, taps, device=CUDA), history.clone()
    tile_toeplitz(history, rho, side, -16, torch.tensor([first + 16], device=CUDA), batch)
    near = torch.nn.functional.pad(rho, (0, max(0, 2 * side - taps))).T.repeat_interleave(batch, dim=1)
    y, before = whole[first : first + side], whole[first + side : first + 2 * side]
    exact, size = owed(y, near, 1, side), owed(y.abs(), near.abs(), 1, side)
    # Three tf32 products leave 2^-21 of each term; sums of blocks are float32.
    bound = storage_bound(before, exact, torch.finfo(dtype).eps) + (2.0**-20 + side * EPS / 4) * size
    got = history[first + side : first + 2 * side].double()
    assert ((got - before.double() - exact).abs() <= bound).all()
    history[first + side : first + 2 * side] = before
    assert same(history, whole)


# ---------------------------------------------------------------------------------------------------------- large tiles


@pytest.mark.parametrize("kept", [False, True], ids=["made", "kept"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("sources", "targets", "lag"), [(1, 1, 0), (1, 1, 256), (0.3, 1.6, 256), (1.7, 0.3, 256)])
@pytest.mark.parametrize("size", [64, 256, 512, 2048, 8192, 65536, 131_072, 524_288])
def test_tile_by_fft(
    size: int, sources: float, targets: float, lag: int, dtype: torch.dtype, kept: bool
) -> None:  # fmt: skip
    """Some of 13 channels, odd numbers of sources and targets; the sums in float64, by FFT in float64."""
    C, channels = 13, range(2, 9)
    S, T = int(sources * size) - 5, int(targets * size) - size // 7
    row, inside = S + 5, slice(2, 9)
    start = row + lag
    padded = torch.nn.functional.pad(torch.randn(C, 2 * size - size // 3 + lag, device=CUDA), (0, 2 * size))
    fft = TileFFT(size, lambda first, stop, cut: padded[cut.start : cut.stop, first:stop], lag)
    if kept:
        fft.prepare(C, 5)
    history = torch.full((start + T + 100, C), NAN, dtype=dtype, device=CUDA)
    history[5:row, inside] = torch.randn(S, len(channels), device=CUDA).to(dtype)
    history[start : start + T, inside] = torch.randn(T, len(channels), device=CUDA).to(dtype)
    whole = history.clone()
    fft.pay(history, range(5, row), range(start, start + T), channels)
    y, before = whole[5:row, inside], whole[start : start + T, inside]
    n = 8 * size + 2 * lag
    wide = torch.fft.rfft(y.T.double(), n=n) * torch.fft.rfft(padded[inside].double(), n=n)
    exact = torch.fft.irfft(wide, n=n)[:, S + lag : S + lag + T].T
    window = padded[inside, lag : lag + 2 * size].double()
    bound = storage_bound(before, exact, torch.finfo(dtype).eps)
    depth = torch.tensor(2.0 * size).log2()
    bound = bound + FFT_CONSTANT * EPS * depth * y.double().norm(dim=0) * window.norm(dim=1)
    got = history[start : start + T, inside].double()
    assert ((got - before.double() - exact).abs() <= bound).all()
    history[start : start + T, inside] = before
    assert same(history, whole)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256, 512, 1024, 4096, 16_384, 32_768])
@pytest.mark.parametrize("channels", [1, 40])
def test_batches_by_fft_are_their_rows_by_fft(size: int, channels: int) -> None:
    """Every shape of a circle, on a ring, for rows that began at different times; each alone is held to float64."""
    batch, ring = 3, 2 * size + 64
    padded = torch.randn(channels, 3 * size, device=CUDA)
    fft = TileFFT(size, lambda first, stop, cut: padded[cut.start : cut.stop, first:stop], 16)
    fft.prepare(channels, 7)
    history = torch.full((ring, channels * batch), NAN, device=CUDA)
    sources, targets = range(ring - 9, ring - 9 + size), range(ring + 7 + size, ring + 7 + 2 * size)
    since = torch.tensor([0, ring - 9 + size // 3, ring + size], device=CUDA)
    places = torch.arange(sources.start, targets.stop, device=CUDA) % ring
    read, write = places[:size], places[-size:]
    given, before = (torch.randn(size, channels * batch, device=CUDA) for _ in range(2))
    alive = torch.arange(sources.start, sources.stop, device=CUDA)[:, None] >= since.repeat(channels)
    history[read], history[write] = torch.where(alive, given, NAN), before
    fft.pay(history, sources, targets, range(channels), batch, ring, since)
    y, rho = torch.where(alive, given, 0).double(), padded.double().repeat_interleave(batch, dim=0)
    n = 8 * size
    exact = torch.fft.irfft(torch.fft.rfft(y.T, n=n) * torch.fft.rfft(rho, n=n), n=n)[:, size + 16 : 2 * size + 16].T
    bound = storage_bound(before, exact, EPS)
    bound = bound + FFT_CONSTANT * EPS * math.log2(2 * size) * y.norm(dim=0) * rho[:, 16 : 16 + 2 * size].norm(dim=1)
    assert ((history[write].double() - before.double() - exact).abs() <= bound).all()
    assert same(history[read], torch.where(alive, given, NAN))
    assert history[places[size : size + 16]].isnan().all()


def test_scratch_beyond_32_bit_offsets() -> None:
    """Channels times places past 2^31: the first and the last channels are what they are alone, bit for bit."""
    size, some = 4096, 266_240
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("less free memory than this test needs")
    history = torch.zeros(2 * size, some, device=CUDA, dtype=torch.bfloat16)
    history[:, :32] = torch.randn(2 * size, 32, device=CUDA).to(history.dtype)
    history[:, -32:] = history[:, :32]
    taps = torch.randn(1, 2 * size, device=CUDA)
    fft = TileFFT(size, lambda first, stop, cut: taps[:, first:stop].expand(len(cut), -1))
    fft.prepare(1, 1)
    alone = history[:, :32].clone()
    # Every sequence has the same filter: one channel, `some` rows. Few of them are held to float64 above.
    fft.pay(history, range(size), range(size, 2 * size), range(1), some)
    fft.pay(alone, range(size), range(size, 2 * size), range(1), 32)
    assert torch.equal(history[:, :32], alone)
    assert torch.equal(history[:, -32:], alone)
    assert not history[:, 32:-32:997].any()


@pytest.mark.parametrize("size", [256, 512])
def test_tile_by_fft_beyond_32_bit_offsets(size: int) -> None:
    C = 1024
    history, padded = far_history(C), torch.randn(C, 4 * size, device=CUDA)
    row = len(history) - 4 * size
    history[row - size :] = torch.randn(5 * size, C, device=CUDA)
    whole = history[row - size :].clone()
    fft = TileFFT(size, lambda first, stop, cut: padded[cut.start : cut.stop, first:stop], size)
    fft.pay(history, range(row - size, row), range(row + size, row + 2 * size), range(C - 33, C))
    y, rho = whole[:size, C - 33 :], padded[C - 33 :].T
    exact = owed(y, rho, size + 1, size)
    bound = storage_bound(whole[2 * size : 3 * size, C - 33 :], exact, EPS)
    bound = bound + FFT_CONSTANT * EPS * math.log2(2 * size) * y.double().norm(dim=0) * rho[
        size : 3 * size
    ].double().norm(dim=0)
    got = history[row + size : row + 2 * size, C - 33 :]
    assert ((got.double() - whole[2 * size : 3 * size, C - 33 :].double() - exact).abs() <= bound).all()
    got.copy_(whole[2 * size : 3 * size, C - 33 :])
    assert same(history[row - size :], whole)
