"""Tiles: every implementation against the float64 direct sum, within bounds derived from the data."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flash_inference.errors import FilterError, ShapeError
from flash_inference.ops.causal_conv import causal_conv, causal_conv_reference, good_size
from flash_inference.ops.tile_conv import NEAR, TILE_CONV_IMPLS, Choice, Impl, PreparedFilter, tile_conv, triangle_conv
from flash_inference.testing import (
    causal_bound,
    causal_conv_oracle,
    direct_bound,
    fft_bound,
    storage_bound,
    tile_conv_oracle,
)


class Case(NamedTuple):
    sources: int
    targets: int
    first: int
    taps: int
    batch: int
    channels: int

    def __str__(self) -> str:
        return f"S{self.sources}-T{self.targets}-lag{self.first}-taps{self.taps}-B{self.batch}-C{self.channels}"


CASES = [
    Case(1, 1, 0, 1, 1, 1),
    Case(1, 1, 1, 300, 2, 3),
    Case(1, 13, 0, 20, 1, 5),
    Case(1, 40, NEAR - 20, 600, 2, 3),
    Case(1, 9, 3, 7, 3, 1),
    Case(13, 1, 0, 13, 1, 3),
    Case(61, 1, 7, 40, 2, 5),
    Case(17, 1, 500, 503, 1, 2),
    Case(7, 13, 0, 19, 1, 3),
    Case(13, 7, 1, 19, 2, 3),
    Case(5, 31, 2, 12, 3, 1),
    Case(33, 33, 1, 65, 2, 3),
    Case(32, 32, 1, 64, 1, 8),
    Case(65, 3, 0, 80, 1, 7),
    Case(3, 65, 129, 150, 2, 2),
    Case(129, 127, 1, 257, 1, 3),
    Case(64, 64, 1, 30, 2, 5),
    Case(64, 64, 90, 100, 1, 3),
    Case(100, 50, 1000, 1024, 1, 2),
    Case(48, 48, 4000, 4001, 1, 1),
]
IMPLS = [*TILE_CONV_IMPLS, Impl.MEASURED]
LAYOUTS = ["time-contiguous", "channel-contiguous"]
cases = pytest.mark.parametrize("case", CASES, ids=str)
impls = pytest.mark.parametrize("impl", IMPLS, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
MARGIN = 3


def placed(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(buffer, view): `values` [N, B, C] as a view into a buffer that is NaN all around it."""
    N, B, C = values.shape
    padded = torch.full((N + 2 * MARGIN, B, C + 2 * MARGIN), float("nan"), dtype=values.dtype)
    buffer = padded if layout == "channel-contiguous" else padded.permute(2, 1, 0).contiguous()
    rows = buffer if layout == "channel-contiguous" else buffer.permute(2, 1, 0)
    view = rows[MARGIN : MARGIN + N, :, MARGIN : MARGIN + C]
    view.copy_(values)
    assert view.stride(2 if layout == "channel-contiguous" else 0) == 1
    return buffer, view


def untouched(buffer: Tensor, values: Tensor) -> bool:
    """Whether the buffer is still NaN but for as many places as `values` has, which are finite."""
    return int(torch.isfinite(buffer).sum()) == values.numel() == int((~buffer.isnan()).sum())


def tile_bound(impl: Impl, y: Tensor, rho: Tensor, case: Case, eps: float) -> Tensor:
    direct = direct_bound(y, rho, case.first, case.targets, eps)
    if impl in (Impl.DIRECT, Impl.REFERENCE):
        return direct
    fft = fft_bound(y, rho, case.first, case.targets, eps).expand_as(direct)
    return fft if impl is Impl.FFT else torch.maximum(direct, fft)


def check_tile(case: Case, impl: Impl, dtype: torch.dtype, storage: torch.dtype, layout: str, channels: slice) -> None:
    S, T, first, taps, B, C = case
    start, stop, _ = channels.indices(C)
    rho = torch.randn(C, taps, dtype=dtype)
    y = torch.randn(S, B, stop - start, dtype=dtype).to(storage)
    before = torch.randn(T, B, stop - start, dtype=dtype).to(storage)
    _, sources = placed(y, layout)
    buffer, out = placed(before, layout)
    tile_conv(sources, PreparedFilter(rho), first, out=out, channels=channels, impl=impl)
    owed = tile_conv_oracle(y, rho[channels], first, T)
    bound = tile_bound(impl, y, rho[channels], case, torch.finfo(dtype).eps)
    bound = bound + storage_bound(before, owed, torch.finfo(storage).eps)
    assert ((out.double() - before.double() - owed).abs() <= bound).all()
    assert untouched(buffer, before)


@cases
@impls
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_tile_is_its_direct_sum(case: Case, impl: Impl, layout: str, dtype: torch.dtype) -> None:
    check_tile(case, impl, dtype, dtype, layout, slice(None))


@cases
@impls
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_tile_of_short_floats_is_summed_in_float32(case: Case, impl: Impl, storage: torch.dtype) -> None:
    check_tile(case, impl, torch.float32, storage, "time-contiguous", slice(None))


@cases
@impls
@layouts
def test_tile_of_some_channels(case: Case, impl: Impl, layout: str) -> None:
    if case.channels < 3:
        case = case._replace(channels=case.channels + 2)
    for channels in (slice(0, 1), slice(1, None), slice(1, case.channels - 1)):
        check_tile(case, impl, torch.float32, torch.float32, layout, channels)


@impls
def test_sources_and_filter_are_left_alone(impl: Impl) -> None:
    rho, y, out = torch.randn(3, 80), torch.randn(40, 2, 3), torch.zeros(40, 2, 3)
    filter = PreparedFilter(rho)
    y_before, rho_before = y.clone(), rho.clone()
    tile_conv(y, filter, 1, out=out, impl=impl)
    assert torch.equal(y, y_before)
    assert torch.equal(filter.rho, rho_before)
    rho.zero_()
    assert torch.equal(filter.rho, rho_before)


@impls
def test_tile_past_the_filters_end_pays_nothing(impl: Impl) -> None:
    out = torch.randn(5, 1, 2)
    before = out.clone()
    tile_conv(torch.randn(4, 1, 2), PreparedFilter(torch.randn(2, 9)), 9, out=out, impl=impl)
    assert torch.equal(out, before)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("N", [1, 2, 7, 24, 25, 64, 65, 127])
@layouts
@pytest.mark.parametrize("taps", [1, 5, 300])
def test_triangle_is_its_direct_sum(N: int, B: int, layout: str, taps: int) -> None:
    C, channels = 6, slice(1, 4)
    rho, y, before = torch.randn(C, taps), torch.randn(N, B, 3), torch.randn(N, B, 3)
    _, sources = placed(y, layout)
    buffer, out = placed(before, layout)
    triangle_conv(sources, PreparedFilter(rho), out=out, channels=channels)
    owed = causal_conv_oracle(y.transpose(0, 1), rho[channels])
    eps = torch.finfo(torch.float32).eps
    bound = causal_bound(y.transpose(0, 1), rho[channels], eps=eps) + storage_bound(before.transpose(0, 1), owed, eps)
    assert ((out - before).transpose(0, 1).double() - owed).abs().le(bound).all()
    assert untouched(buffer, before)


@pytest.mark.parametrize("length", [1, 2, 13, 64, 65, 257])
@pytest.mark.parametrize("taps", [1, 7, 65, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_causal_conv_is_its_direct_sum(length: int, taps: int, dtype: torch.dtype) -> None:
    y, rho = torch.randn(2, 3, length, dtype=dtype), torch.randn(3, taps, dtype=dtype)
    exact = causal_conv_oracle(y.transpose(1, 2), rho)
    bound = causal_bound(y.transpose(1, 2), rho, eps=torch.finfo(dtype).eps)
    assert ((causal_conv(y, rho).transpose(1, 2).double() - exact).abs() <= bound).all()
    double = causal_bound(y.transpose(1, 2), rho, eps=torch.finfo(torch.float64).eps)
    assert ((causal_conv_reference(y, rho).transpose(1, 2) - exact).abs() <= double).all()


def test_causal_conv_has_gradients() -> None:
    y = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    rho = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(causal_conv, (y, rho))


def test_good_sizes() -> None:
    for n in range(1, 3000):
        size = good_size(n)
        odd = size // (size & -size)
        assert size >= n
        assert odd in (1, 3, 5)
        assert not any(n <= f << q < size for f in (1, 3, 5) for q in range(13))


# ------------------------------------------------------------------------------------------------------------ spectra


def stored_bytes(filter: PreparedFilter, tiles: list[tuple[int, int]]) -> int:
    """Bytes of the distinct tables behind these spectra that a second call finds again."""
    tables = {}
    for first, n in tiles:
        one, two = filter.spectrum(first, n), filter.spectrum(first, n)
        if one.data_ptr() == two.data_ptr():
            tables[one.data_ptr()] = one.untyped_storage().nbytes()
    return sum(tables.values())


@pytest.mark.parametrize("budget", [0, 1, 2000, 10_000, None])
def test_spectra_stay_within_their_budget(budget: int | None) -> None:
    filter = PreparedFilter(torch.randn(3, 500), budget)
    tiles = [(1, 64), (1, 128), (65, 128), (1, 256), (0, 512), (1, 64), (300, 1024)]
    for first, n in tiles:
        got = filter.spectrum(first, n)
        window = torch.nn.functional.pad(filter.rho, (0, first + n))[:, first : first + n]
        exact = torch.fft.rfft(window.double(), n=n)
        bound = fft_bound(torch.ones(n, 1, 3), window, 0, 1, torch.finfo(torch.float32).eps)
        assert ((got.to(torch.complex128) - exact).abs().amax(1) <= bound[0]).all()
        assert filter.spectra_used <= filter.spectra_bytes
    assert stored_bytes(filter, tiles) == filter.spectra_used
    assert (filter.spectra_used == 0) == (budget in (0, 1))


@pytest.mark.parametrize("budget", [0, 2000, None])
def test_results_do_not_depend_on_the_budget(budget: int | None) -> None:
    rho, y = torch.randn(3, 300), torch.randn(64, 1, 3)
    out, expected = torch.zeros(64, 1, 3), torch.zeros(64, 1, 3)
    filter = PreparedFilter(rho, budget)
    for first in (1, 65, 1):
        tile_conv(y, filter, first, out=out, impl=Impl.FFT)
        tile_conv(y, PreparedFilter(rho), first, out=expected, impl=Impl.FFT)
    assert torch.equal(out, expected)


def test_spectra_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    filter, y, calls = PreparedFilter(torch.randn(4, 200)), torch.randn(50, 1, 4), []
    rfft = torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda x, n=None: calls.append(tuple(x.shape)) or rfft(x, n=n))
    tile_conv(y, filter, 1, out=torch.zeros(50, 1, 4), impl=Impl.FFT)
    first = len(calls)
    tile_conv(y, filter, 1, out=torch.zeros(50, 1, 4), impl=Impl.FFT)
    assert (first, len(calls) - first) == (2, 1)


def test_spectra_of_shares_fill_one_table() -> None:
    rho, y = torch.randn(7, 200), torch.randn(40, 2, 7)
    whole, parts = torch.zeros(40, 2, 7), torch.zeros(40, 2, 7)
    filter = PreparedFilter(rho)
    for channels in (slice(5, 7), slice(0, 2), slice(2, 5)):
        tile_conv(y[..., channels], filter, 1, out=parts[..., channels], channels=channels, impl=Impl.FFT)
    tile_conv(y, PreparedFilter(rho), 1, out=whole, impl=Impl.FFT)
    assert torch.equal(parts, whole)
    assert filter.spectra_used == filter.spectrum(1, good_size(79)).untyped_storage().nbytes()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("y", "out", "options", "message"),
    [
        ((4, 3), (4, 1, 3), {}, r"y \(4, 3\) and out \(4, 1, 3\) must be \[S, B, C\] and \[T, B, C\] with equal B, C"),
        ((4, 2, 3), (4, 1, 3), {}, r"y \(4, 2, 3\) and out \(4, 1, 3\) must be .* equal B, C"),
        ((4, 1, 3), (4, 1, 2), {}, r"y \(4, 1, 3\) and out \(4, 1, 2\) must be .* equal B, C"),
        ((4, 1, 2), (4, 1, 2), {}, r"y has 2 channels; the filter slice 0:3 has 3"),
        ((4, 1, 3), (4, 1, 3), {"channels": slice(1, 3)}, r"y has 3 channels; the filter slice 1:3 has 2"),
        ((4, 1, 3), (4, 1, 3), {"first": -1}, r"first lag is -1; expected 0 or more: a tile pays later positions only"),
    ],
    ids=["two-axes", "batches", "channels", "filter", "slice", "lag"],
)
def test_wrong_shapes(y: tuple, out: tuple, options: dict, message: str) -> None:
    first = options.pop("first", 1)
    with pytest.raises(ShapeError, match=message):
        tile_conv(torch.zeros(y), PreparedFilter(torch.ones(3, 8)), first, out=torch.zeros(out), **options)


@pytest.mark.parametrize(
    ("rho", "error", "message"),
    [
        (torch.zeros(3), ShapeError, r"rho has shape \(3,\); expected \[channels, taps\], lag 0 first"),
        (torch.zeros(0, 4), FilterError, r"empty: shape \(0, 4\); expected at least 1 channel and 1 tap"),
        (torch.zeros(4, 0), FilterError, r"empty: shape \(4, 0\)"),
        (
            torch.tensor([[0.0, 1.0], [2.0, float("nan")]]),
            FilterError,
            r"not finite: 1 of 4 taps, first channel 1 lag 1 = nan\. Check the weights or the window",
        ),
        (torch.tensor([[float("inf"), 1.0]]), FilterError, r"first channel 0 lag 0 = inf"),
    ],
    ids=["one-axis", "no-channels", "no-taps", "nan", "inf"],
)
def test_filters_that_are_none(rho: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PreparedFilter(rho)


# ------------------------------------------------------------------------------------------------------------- choice


def test_choice_without_measurements() -> None:
    like = torch.zeros(())
    assert Choice().pick(1, 5000, 1, 8, like) == "direct"
    assert Choice().pick(5000, 1, 1, 8, like) == "direct"
    assert Choice().pick(8, 8, 1, 8, like) == "direct"
    assert Choice().pick(1024, 1024, 1, 8, like) == "fft"


def test_choice_is_saved_and_loaded_and_obeyed(tmp_path) -> None:
    from flash_inference.ops.tile_conv import Measurement

    threads = torch.get_num_threads()
    rows = [
        Measurement(side, 1, 8, "torch.float32", "cpu", threads, impl, time, 0.0)
        for side, impl, time in [(8, "direct", 9.0), (8, "fft", 5.0), (512, "direct", 5.0), (512, "fft", 9.0)]
    ]
    path = tmp_path / "folder" / "table.json"
    Choice(tuple(rows)).save(path)
    again = Choice.load(path)
    assert again.measurements == tuple(rows)
    assert again.pick(8, 8, 1, 8, torch.zeros(())) == "fft"
    assert again.pick(512, 512, 1, 8, torch.zeros(())) == "direct"
    assert again.pick(8, 8, 1, 8, torch.zeros((), dtype=torch.float64)) == "direct"
    path.write_text("{")
    with pytest.raises(Exception, match=r"table\.json cannot be read .* delete it, or write it anew"):
        Choice.load(path)
