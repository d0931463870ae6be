"""Filters that are zero but at every s-th lag: tiles of every s-th source and target equal the float64 direct sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_inference.errors import FilterError
from flash_inference.mixers import Stack
from flash_inference.ops.causal_conv import causal_conv
from flash_inference.ops.tile_conv import NEAR, TILE_CONV_IMPLS, Impl, PreparedFilter, tile_conv, triangle_conv
from flash_inference.testing import (
    causal_bound,
    causal_conv_oracle,
    direct_bound,
    fft_bound,
    storage_bound,
    tile_conv_oracle,
)
from flash_inference.testing.strategies import KINDS, chunks, lengths, tilings
from flash_inference.tiling import Blocked, Prompted, Separated, Spread

IMPLS = [*TILE_CONV_IMPLS, Impl.MEASURED]
impls = pytest.mark.parametrize("impl", IMPLS, ids=str)
strides = pytest.mark.parametrize("stride", [2, 3])
EPS = torch.finfo(torch.float64).eps


def sparse(channels: int, taps: int, stride: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rho = torch.randn(channels, taps, dtype=dtype)
    return rho * (torch.arange(taps) % stride == 0)


def check_tile(S: int, T: int, first: int, taps: int, stride: int, impl: Impl) -> None:
    rho, y = sparse(3, taps, stride), torch.randn(S, 2, 3, dtype=torch.float64)
    before = torch.randn(T, 2, 3, dtype=torch.float64)
    buffer = torch.full((T + 2, 2, 3), float("nan"), dtype=torch.float64)
    out = buffer[1 : T + 1]
    out.copy_(before)
    tile_conv(y, PreparedFilter(rho, stride=stride), first, out=out, impl=impl)
    owed = tile_conv_oracle(y, rho, first, T)
    # A part has fewer sources, a shorter circle and some of the taps; a complex pair has the norm of all sources: the
    # bounds of the whole tile hold for either.
    bound = torch.maximum(direct_bound(y, rho, first, T, EPS), fft_bound(y, rho, first, T, EPS).expand_as(owed))
    assert ((out - before - owed).abs() <= bound + storage_bound(before, owed, EPS)).all(), (S, T, first, taps)
    assert int(buffer.isnan().sum()) == 2 * 2 * 3


@impls
@strides
def test_every_small_tile_is_its_direct_sum(impl: Impl, stride: int) -> None:
    for S in (1, 2, 3, 4, 5, 7):
        for T in (1, 2, 3, 4, 6):
            for first in (0, 1, 2, 3, 5):
                for taps in (1, 4, 9, 30):
                    check_tile(S, T, first, taps, stride, impl)


@impls
@strides
@pytest.mark.parametrize(
    ("S", "T", "first", "taps"),
    [(64, 64, 1, 128), (65, 31, 0, 90), (1, 40, 2 * NEAR - 30, 700), (33, 97, 129, 257), (40, 1, 3, 44), (20, 1, 4, 9)],
)
def test_large_tiles(S: int, T: int, first: int, taps: int, stride: int, impl: Impl) -> None:
    check_tile(S, T, first, taps, stride, impl)


@impls
@strides
def test_tile_of_some_channels(impl: Impl, stride: int) -> None:
    rho, y = sparse(5, 80, stride), torch.randn(33, 1, 2, dtype=torch.float64)
    out = torch.zeros(31, 1, 2, dtype=torch.float64)
    tile_conv(y, PreparedFilter(rho, stride=stride), 1, out=out, channels=slice(2, 4), impl=impl)
    expected = tile_conv_oracle(y, rho[2:4], 1, 31)
    bound = torch.maximum(direct_bound(y, rho[2:4], 1, 31, EPS), fft_bound(y, rho[2:4], 1, 31, EPS).expand_as(out))
    assert ((out - expected).abs() <= bound + storage_bound(0 * out, expected, EPS)).all()


@strides
@pytest.mark.parametrize("N", [1, 2, 3, 24, 25, 48, 51, 127])
@pytest.mark.parametrize("taps", [1, 5, 300])
def test_triangle_is_its_direct_sum(N: int, taps: int, stride: int) -> None:
    rho, y, before = sparse(3, taps, stride), torch.randn(N, 2, 3).double(), torch.randn(N, 2, 3).double()
    out = before.clone()
    triangle_conv(y, PreparedFilter(rho, stride=stride), out=out)
    owed = causal_conv_oracle(y.transpose(0, 1), rho)
    bound = causal_bound(y.transpose(0, 1), rho, eps=EPS) + storage_bound(before.transpose(0, 1), owed, EPS)
    assert ((out - before).transpose(0, 1) - owed).abs().le(bound).all()


@strides
@pytest.mark.parametrize("length", [1, 2, 3, 64, 65, 97])
@pytest.mark.parametrize("taps", [1, 7, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_causal_conv_is_its_direct_sum(length: int, taps: int, stride: int, dtype: torch.dtype) -> None:
    rho, y = sparse(3, taps, stride, dtype), torch.randn(2, 3, length, dtype=dtype)
    got = causal_conv(y, rho, stride).transpose(1, 2)
    assert got.dtype == dtype
    bound = causal_bound(y.transpose(1, 2), rho, eps=torch.finfo(dtype).eps)
    assert ((got.double() - causal_conv_oracle(y.transpose(1, 2), rho)).abs() <= bound).all()


def test_causal_conv_has_gradients() -> None:
    y = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    rho = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, rho: causal_conv(y, rho, 2), (y, rho))


# ------------------------------------------------------------------------------------------------------------- stacks


def check_stack(tiling, sizes: list[int], *, taps: int, stride: int, count: int = 1, impl: Impl | None = None) -> None:
    """Outputs of `count` convolutions of width 2, for inputs in these chunks, against the direct sum."""
    total, width, batch = sum(sizes), 2, 2
    rho, skip = sparse(count * width, taps, stride), torch.randn(count * width, dtype=torch.float64)
    y = torch.randn(batch, total, count * width, dtype=torch.float64)
    stack = Stack(PreparedFilter(rho, stride=stride), width, skip)
    state, outputs, at = stack.init(batch, tiling), [], 0
    for n in sizes:
        for size in stack.pieces(state, n):
            for tile in stack.due(state) if impl else ():
                stack.pay(state, tile, impl)
            stack.begin(state, size)
            lanes = y[:, at : at + size].split(width, dim=2)
            outputs.append(torch.cat([stack.mix(state, m, lane) for m, lane in enumerate(lanes)], dim=2))
            stack.commit(state, size)
            at += size
    exact = causal_conv_oracle(y, rho) + skip * y
    bound = causal_bound(y, rho, skip, eps=EPS, payments=2 * total)
    assert ((torch.cat(outputs, dim=1) - exact).abs() <= bound).all(), (tiling, sizes)


@settings(max_examples=60)
@given(data=st.data())
def test_any_tiling_any_chunks(data: st.DataObject) -> None:
    length, taps = data.draw(lengths(130), "length"), data.draw(lengths(130), "taps")
    check_stack(
        data.draw(tilings(length), "tiling"),
        data.draw(chunks(length), "chunks"),
        taps=taps,
        stride=data.draw(st.integers(2, 3), "stride"),
        count=data.draw(st.integers(1, 2), "convolutions"),
    )


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("impl", TILE_CONV_IMPLS, ids=str)
def test_every_implementation_pays(make, impl: Impl) -> None:
    check_stack(Prompted(make(40, None), 17), [17, *[1] * 40], taps=57, stride=2, impl=impl)


@pytest.mark.parametrize("taps", [1, 2, 5, 33])
def test_a_ring(taps: int) -> None:
    check_stack(Spread(Separated(None, 8, 4, taps=taps), 4), [3, 50, *[1] * 120, 40], taps=taps, stride=2)


def test_the_largest_block() -> None:
    """Inline pairs of a block above NEAR read the kept taps themselves."""
    check_stack(Blocked(600, 2 * NEAR), [1] * 600, taps=600, stride=2)


def test_half_the_taps_and_no_more_spectra() -> None:
    dense, strided = (PreparedFilter(sparse(4, 101, 2), stride=s) for s in (1, 2))
    y = torch.randn(32, 1, 4, dtype=torch.float64)
    for filter in (dense, strided):
        tile_conv(y, filter, 1, out=torch.zeros_like(y), impl=Impl.FFT)
    assert (dense.length, strided.length) == (101, 101)
    assert (dense.rho.shape[1], strided.rho.shape[1]) == (101, 51)
    assert 0 < strided.spectra_used <= dense.spectra_used


@pytest.mark.parametrize("budget", [0, 500, None])
def test_results_do_not_depend_on_the_budget_for_spectra(budget: int | None) -> None:
    rho, y = sparse(3, 300, 2), torch.randn(64, 1, 3, dtype=torch.float64)
    got, expected = torch.zeros_like(y), torch.zeros_like(y)
    filter = PreparedFilter(rho, budget, stride=2)
    for first in (1, 65, 1, 64):
        tile_conv(y, filter, first, out=got, impl=Impl.FFT)
        tile_conv(y, PreparedFilter(rho, stride=2), first, out=expected, impl=Impl.FFT)
        assert filter.spectra_used <= filter.spectra_bytes
    assert torch.equal(got, expected)


def test_transforms_of_a_tile_that_pairs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One complex transform of half the points there and back, whatever the parity; none once more for the filter."""
    filter, y, calls = PreparedFilter(sparse(4, 200, 2), stride=2), torch.randn(48, 1, 4, dtype=torch.float64), []
    for name in ("fft", "ifft", "rfft", "irfft"):
        transform = getattr(torch.fft, name)

        def counted(x: Tensor, n: int | None = None, *, name: str = name, transform=transform) -> Tensor:
            calls.append((name, n or x.shape[-1]))
            return transform(x, n=n)

        monkeypatch.setattr(torch.fft, name, counted)
    tile_conv(y, filter, 1, out=torch.zeros_like(y), impl=Impl.FFT)
    assert calls == [("fft", 48), ("fft", 48), ("ifft", 48)]
    calls.clear()
    tile_conv(y, filter, 1, out=torch.zeros_like(y), impl=Impl.FFT)
    assert calls == [("fft", 48), ("ifft", 48)]


@pytest.mark.parametrize(
    ("stride", "message"),
    [
        (
            2,
            r"stride 2 needs zero taps at lags that it does not divide; channel 1 lag 5 is 3\.0\. Prepare",
        ),
        (0, r"stride is 0; expected 1 or more"),
        (-2, r"stride is -2; expected 1 or more"),
    ],
)
def test_taps_where_the_stride_says_none(stride: int, message: str) -> None:
    rho = sparse(2, 9, 2)
    rho[1, 5] = 3.0
    with pytest.raises(FilterError, match=message):
        PreparedFilter(rho, stride=stride)
