"""The GPU's kernels of tiles on a CPU, through Triton's interpreter: every number, at sizes that it bears."""

from __future__ import annotations

import pytest
import torch

import interpreted  # noqa: F401

# isort: split

from flash_inference.errors import ShapeError
from flash_inference.models.gpu import GRAPH
from flash_inference.ops.tile_conv.fft_rows import TileFFT
from flash_inference.ops.tile_conv.toeplitz import tile_toeplitz
from flash_inference.ops.tile_conv.triton import tile_rows
from flash_inference.testing import direct_bound, fft_bound, storage_bound, tile_conv_oracle

EPS = torch.finfo(torch.float32).eps
NAN = float("nan")
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("nan_memory")


# --------------------------------------------------------------------------------------------------------------- tiles


def check_rows(
    sources: range, targets: range, channels: int, taps: int, at: int = 0, dtype: torch.dtype = torch.float32
) -> None:
    """Rows around sources and targets are NaN and stay as they are; so are taps around the given ones."""
    first, last = sources.start + at, targets.stop + at
    history = torch.full((last + 3, channels), NAN, dtype=dtype)
    y = torch.randn(len(sources), 1, channels).to(dtype)
    before = torch.randn(len(targets), 1, channels).to(dtype)
    history[first : sources.stop + at] = y[:, 0]
    history[targets.start + at : last] = before[:, 0]
    whole = history.clone()
    buffer = torch.full((taps + 8, channels), NAN)
    rho = buffer[4 : 4 + taps]
    rho.copy_(torch.randn(taps, channels))
    tile_rows(history, rho, sources, targets, torch.tensor([at]))
    lag = targets.start - sources.stop + 1
    owed = tile_conv_oracle(y, rho.T, lag, len(targets))
    bound = direct_bound(y, rho.T, lag, len(targets), EPS) + storage_bound(before, owed, torch.finfo(dtype).eps)
    got = history[targets.start + at : last, None].double()
    assert ((got - before.double() - owed).abs() <= bound).all()
    history[targets.start + at : last] = whole[targets.start + at : last]
    assert torch.equal(history.nan_to_num(77.0), whole.nan_to_num(77.0))


@pytest.mark.parametrize("side", [1, 5, 16, 33])
@pytest.mark.parametrize("channels", [1, 7, 65])
def test_tile_is_its_direct_sum(side: int, channels: int) -> None:
    check_rows(range(3, 3 + side), range(3 + side, 3 + 2 * side), channels, 2 * side + 1)


@pytest.mark.parametrize(("sources", "targets"), [(1, 40), (40, 1), (17, 70), (33, 16)])
def test_tile_with_sides_that_differ(sources: int, targets: int) -> None:
    check_rows(range(sources), range(sources, sources + targets), 3, sources + targets)


@pytest.mark.parametrize("gap", [1, 16, 50])
def test_tile_behind_a_gap(gap: int) -> None:
    check_rows(range(2, 18), range(18 + gap, 34 + gap), 5, 40 + gap)


@pytest.mark.parametrize("taps", [1, 2, 7, 16, 31])
def test_lags_past_the_taps_pay_nothing(taps: int) -> None:
    check_rows(range(16), range(16, 32), 3, taps)


@pytest.mark.parametrize("side", [5, 16])
def test_ranges_count_from_the_clock(side: int) -> None:
    check_rows(range(GRAPH - side, GRAPH), range(GRAPH, GRAPH + side), 5, 2 * side, at=48)


@pytest.mark.parametrize("side", [1, 16, 33])
def test_tile_of_bfloat16_is_summed_in_float32(side: int) -> None:
    check_rows(range(side), range(side, 2 * side), 5, 2 * side, dtype=torch.bfloat16)


# ----------------------------------------------------------------------------------------------------- large tiles


def check_fft(
    size: int, sources: int, targets: int, lag: int, channels: range, kept: bool, dtype: torch.dtype = torch.float32
) -> None:
    """`channels` of 7; all others, and rows that are neither source nor target, are NaN and stay so."""
    C, row = 7, sources + 3
    rho = torch.randn(C, lag + 2 * size - size // 2)
    padded = torch.nn.functional.pad(rho, (0, 2 * size))
    fft = TileFFT(size, lambda first, stop, cut: padded[cut.start : cut.stop, first:stop], lag)
    if kept:
        fft.prepare(C, 3)
    start = row + lag
    history = torch.full((start + targets + 5, C), NAN, dtype=dtype)
    y = torch.randn(sources, 1, len(channels)).to(dtype)
    before = torch.randn(targets, 1, len(channels)).to(dtype)
    inside = slice(channels.start, channels.stop)
    history[3:row, inside] = y[:, 0]
    history[start : start + targets, inside] = before[:, 0]
    whole = history.clone()
    fft.pay(history, range(3, row), range(start, start + targets), channels)
    owed = tile_conv_oracle(y, padded[inside], lag + 1, targets)
    bound = storage_bound(before, owed, torch.finfo(dtype).eps) + fft_bound(
        y, padded[inside, lag : lag + 2 * size], 0, size, EPS
    )
    got = history[start : start + targets, None, inside].double()
    assert ((got - before.double() - owed).abs() <= bound).all()
    history[start : start + targets, inside] = whole[start : start + targets, inside]
    assert torch.equal(history.nan_to_num(77.0), whole.nan_to_num(77.0))


@pytest.mark.parametrize("lag", [0, 4, 16])
@pytest.mark.parametrize("kept", [False, True], ids=["made", "kept"])
def test_tile_by_fft_is_its_direct_sum(lag: int, kept: bool) -> None:
    check_fft(16, 16, 16, lag, range(7), kept)
    check_fft(16, 16, 5, lag, range(2, 5), kept)
    check_fft(16, 3, 16, lag, range(1, 7), kept)
    check_fft(16, 25, 7, lag, range(7), kept)


@pytest.mark.parametrize("first", [0, 3, 15, 24, 30, 40])
def test_a_tile_on_a_ring(first: int) -> None:
    """The same numbers as on a long history, where sources, the gap or targets stand across the ring's end."""
    rho, ring = torch.randn(5, 60), 44
    fft = TileFFT(16, lambda begin, stop, cut: rho[cut.start : cut.stop, begin:stop], 4)
    sources, targets = range(first, first + 16), range(first + 20, first + 36)
    long, short = torch.full((90, 10), NAN), torch.full((ring + 6, 10), NAN)
    for some in (sources, targets):
        for i in some:
            long[i] = short[i % ring] = torch.randn(10)
    fft.pay(long, sources, targets, range(1, 4), 2)
    fft.pay(short, sources, targets, range(1, 4), 2, ring)
    for some in (sources, targets):
        assert torch.equal(long[some.start : some.stop], torch.stack([short[i % ring] for i in some]))
    assert short.isnan().all(1).sum() == ring + 6 - 32


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128, 256, 512, 1024])
def test_tile_by_fft_of_any_side(size: int) -> None:
    """In one pass up to 256 places, in three above; all of 1 .. 7 channels, and targets that are cut short."""
    check_fft(size, size, size, size, range(1, 7), True)
    check_fft(size, size, -(-size // 3), size, range(6, 7), True)


@slow
@pytest.mark.parametrize("size", [2048, 4096])
def test_tile_by_fft_of_large_sides(size: int) -> None:
    check_fft(size, size - 1, size, 16, range(5), True)


@pytest.mark.parametrize("size", [16, 512])
@pytest.mark.parametrize("share", [0.51, 0.9, 0.99])
def test_more_sources_or_targets_than_a_circle_has_places(size: int, share: float) -> None:
    more = int(2 * size * share)
    check_fft(size, more, 2 * size - more, 9, range(2, 5), True)
    check_fft(size, 2 * size - more, more, 9, range(2, 5), True)


@pytest.mark.parametrize("size", [16, 512])
def test_tile_by_fft_on_16_bit_state(size: int) -> None:
    check_fft(size, size, size, 4, range(2, 7), True, torch.bfloat16)


@pytest.mark.parametrize("size", [16, 512])
@pytest.mark.parametrize("first", [0, 100, 2**31 + 5])
def test_what_stands_before_a_row_begins_owes_nothing(size: int, first: int) -> None:
    """Three rows on a ring: one began long ago, one inside the sources, one begins later; what stands before is NaN."""
    rho, ring, batch = torch.randn(3, 3 * size), 2 * size + 40, 3
    since = torch.tensor([0, first + size // 3, first + size])
    fft = TileFFT(size, lambda begin, stop, cut: rho[cut.start : cut.stop, begin:stop], 4)
    sources, targets = range(first, first + size), range(first + size + 4, first + 2 * size + 4)
    history = torch.full((ring, 3 * batch), NAN)
    rows, places = (torch.tensor([i % ring for i in some]) for some in (sources, targets))
    alive = torch.arange(first, first + size)[:, None] >= since.repeat(3)
    given, before = torch.randn(size, 3 * batch), torch.randn(size, 3 * batch)
    history[rows], history[places] = torch.where(alive, given, NAN), before
    fft.pay(history, sources, targets, range(3), batch, ring, since)
    y = torch.where(alive, given, 0)[:, None]
    taps = rho.repeat_interleave(batch, dim=0)
    owed = tile_conv_oracle(y, taps, 5, size)
    bound = storage_bound(before[:, None], owed, EPS) + fft_bound(y, taps[:, 4:], 0, size, EPS)
    assert ((history[places, None].double() - before[:, None].double() - owed).abs() <= bound).all()
    assert torch.equal(history[rows].nan_to_num(77.0), torch.where(alive, given, 77.0))


@pytest.mark.parametrize(("inputs", "new"), [(16, 16), (5, 9), (1, 1), (300, 200)])
def test_what_a_prompt_owes(inputs: int, new: int) -> None:
    """From rows of another buffer, which may be narrower than where it goes."""
    size = 16 if inputs <= 16 else 512
    rho = torch.randn(5, 2 * size + 3)
    fft = TileFFT(size, lambda first, stop, cut: rho[cut.start : cut.stop, first:stop], 3)
    y, out = torch.randn(inputs, 5), torch.zeros(new, 5)
    for lanes in (range(2), range(2, 5)):
        fft.owe(y, out, lanes)
    owed = tile_conv_oracle(y[:, None], rho, 4, new)[:, 0]
    bound = fft_bound(y[:, None], rho[:, 3:], 0, size, EPS)
    assert ((out - owed).abs()[:, None] <= bound).all()


def test_a_tile_that_its_circle_cannot_hold_is_refused() -> None:
    fft = TileFFT(16, lambda first, stop, cut: torch.zeros(len(cut), stop - first), 4)
    for sources, targets in ((range(16), range(16, 32)), (range(20), range(24, 40))):
        with pytest.raises(ShapeError, match="expected 4 rows between them and at most 32 in both"):
            fft.pay(torch.zeros(80, 3), sources, targets, range(3))


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("batch", [2, 3])
def test_tiles_of_a_batch_share_their_filter(batch: int) -> None:
    history, rho = torch.randn(40, 5 * batch), torch.randn(33, 5)
    alone = [history.unflatten(1, (5, batch))[..., row].contiguous() for row in range(batch)]
    tile_rows(history, rho, range(3, 19), range(19, 35), torch.tensor([0]), batch)
    fft = TileFFT(
        16, lambda first, stop, lanes: torch.nn.functional.pad(rho.T[lanes.start : lanes.stop], (0, 31))[:, first:stop]
    )
    fft.pay(history, range(3, 19), range(19, 35), range(1, 4), batch)
    for row, one in enumerate(alone):
        tile_rows(one, rho, range(3, 19), range(19, 35), torch.tensor([0]))
        fft.pay(one, range(3, 19), range(19, 35), range(1, 4))
        assert torch.equal(history.unflatten(1, (5, batch))[..., row], one)


@pytest.mark.parametrize(("side", "batch", "taps"), [(32, 16, 65), (64, 17, 70), (128, 16, 257)])
def test_a_square_on_tensor_cores_is_its_direct_sum(side: int, batch: int, taps: int) -> None:
    """All other rows are NaN and stay so; lags from `taps` on pay nothing."""
    C, first = 3, 5
    history = torch.full((first + 2 * side + 4, C * batch), NAN)
    y, before, rho = torch.randn(side, batch, C), torch.randn(side, batch, C), torch.randn(C, taps)
    history[first : first + side] = y.transpose(1, 2).flatten(1)
    history[first + side : first + 2 * side] = before.transpose(1, 2).flatten(1)
    whole = history.clone()
    tile_toeplitz(history, rho, side, -16, torch.tensor([first + 16]), batch)
    padded = torch.nn.functional.pad(rho, (0, 2 * side))
    owed = tile_conv_oracle(y, padded, 1, side)
    # The interpreter multiplies in float32: a sum of `side` products.
    size = tile_conv_oracle(y.abs(), padded.abs(), 1, side)
    bound = storage_bound(before, owed, EPS) + side * EPS * size
    got = history[first + side : first + 2 * side].unflatten(1, (C, batch)).transpose(1, 2).double()
    assert ((got - before.double() - owed).abs() <= bound).all()
    history[first + side : first + 2 * side] = whole[first + side : first + 2 * side]
    assert torch.equal(history.nan_to_num(77.0), whole.nan_to_num(77.0))
