"""The GPU's kernels of tiles on a CPU, through Triton's interpreter: every number, at sizes that it bears."""

from __future__ import annotations

import pytest
import torch

import interpreted  # noqa: F401

# isort: split

from flash_inference.errors import ShapeError
from flash_inference.models.gpu import GRAPH
from flash_inference.ops.tile_conv.fft_rows import TileFFT, pack, unpack_add
from flash_inference.ops.tile_conv.toeplitz import tile_toeplitz
from flash_inference.ops.tile_conv.triton import tile_rows
from flash_inference.testing import direct_bound, fft_bound, storage_bound, tile_conv_oracle
from kernel_laws import check_multiply

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("n", "places"), [(1, 2), (5, 9), (64, 128), (65, 130)])
@pytest.mark.parametrize("channels", [range(0, 1), range(3, 70), range(1, 6)])
def test_pack_transposes_and_pads(n: int, places: int, channels: range, dtype: torch.dtype) -> None:
    history = torch.full((n + 9, 71), NAN, dtype=dtype)
    wanted = torch.randn(n, len(channels)).to(dtype)
    history[4 : 4 + n, channels.start : channels.stop] = wanted
    out = torch.empty(len(channels), places)
    pack(history, 4, n, channels, out)
    assert torch.equal(out[:, :n], wanted.T.float())
    assert not out[:, n:].any()


@pytest.mark.parametrize("channels", [range(0, 72), range(6, 66), range(9, 15)])
@pytest.mark.parametrize("position", [0, 100, 2**31 + 5])
def test_pack_reads_zeros_before_a_row_begins(channels: range, position: int) -> None:
    """Three rows: one began long ago, one inside, one begins later; what stands before is NaN."""
    n, since = 70, torch.tensor([0, position + 33, position + 70])
    history = torch.randn(n + 9, 72)
    alive = torch.arange(position, position + n)[:, None] >= since[torch.arange(72) % 3]
    history[4 : 4 + n][~alive] = NAN
    out = torch.empty(len(channels), 80)
    pack(history, 4, n, channels, out, since, position)
    wanted = torch.where(alive, history[4 : 4 + n], 0)[:, channels.start : channels.stop]
    assert torch.equal(out[:, :n], wanted.T)
    assert not out[:, n:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("n", "skip", "places"), [(1, 1, 2), (5, 4, 9), (64, 64, 128), (33, 65, 130)])
@pytest.mark.parametrize("channels", [range(0, 1), range(3, 70), range(1, 6)])
def test_unpack_adds_and_touches_nothing_else(
    n: int, skip: int, places: int, channels: range, dtype: torch.dtype
) -> None:
    history = torch.randn(n + 9, 71).to(dtype)
    before = history.clone()
    sums = torch.full((len(channels), places), NAN)
    sums[:, skip : skip + n] = torch.randn(len(channels), n)
    unpack_add(sums, skip, history, 4, n, channels)
    place, owed = (slice(4, 4 + n), slice(channels.start, channels.stop)), sums[:, skip : skip + n].T
    exact = before[place].double() + owed
    assert ((history[place] - exact).abs() <= storage_bound(before[place], owed, torch.finfo(dtype).eps)).all()
    history[place] = before[place]
    assert torch.equal(history, before)


def test_what_is_packed_comes_back() -> None:
    history = torch.randn(77, 67)
    before, packed = history.clone(), torch.empty(61, 80)
    pack(history, 3, 70, range(5, 66), packed)
    unpack_add(packed, 0, history, 3, 70, range(5, 66))
    before[3:73, 5:66] *= 2
    assert torch.equal(history, before)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 256)])
def test_multiply(shape: tuple[int, int], batch: int) -> None:
    check_multiply(*shape, batch, "cpu")


def check_fft(size: int, sources: int, targets: int, lag: int, channels: range, kept: bool) -> None:
    """`channels` of 7; all others, and rows that are neither source nor target, are NaN and stay so."""
    C, row = 7, sources + 3
    rho = torch.randn(C, lag + 2 * size - size // 2)
    padded = torch.nn.functional.pad(rho, (0, 2 * size))
    fft = TileFFT(size, lambda first, stop, cut: padded[cut.start : cut.stop, first:stop], lag)
    if kept:
        fft.prepare(C, 3)
    start = row + lag
    history = torch.full((start + targets + 5, C), NAN)
    y, before = torch.randn(sources, 1, len(channels)), torch.randn(targets, 1, len(channels))
    inside = slice(channels.start, channels.stop)
    history[3:row, inside] = y[:, 0]
    history[start : start + targets, inside] = before[:, 0]
    whole = history.clone()
    fft.pay(history, range(3, row), range(start, start + targets), channels)
    owed = tile_conv_oracle(y, padded[inside], lag + 1, targets)
    bound = storage_bound(before, owed, EPS) + fft_bound(y, padded[inside, lag : lag + 2 * size], 0, size, EPS)
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


@pytest.mark.parametrize("size", [1, 2, 64])
def test_tile_by_fft_of_any_side(size: int) -> None:
    check_fft(size, size, size, size, range(1, 7), True)


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
