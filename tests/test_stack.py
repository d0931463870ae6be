"""Convolutions in tiles: any tiling, any split into chunks, any storage, equals the float64 direct sum."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_inference.errors import FlashInferenceError, LengthError, ShapeError
from flash_inference.filters import ExplicitFilter, ImplicitFilter
from flash_inference.mixers import LongConv, Stack, StackState
from flash_inference.ops.tile_conv import TILE_CONV_IMPLS, Impl, PreparedFilter
from flash_inference.testing import causal_bound, causal_conv_oracle
from flash_inference.testing.strategies import KINDS, chunks, lengths, tilings
from flash_inference.tiling import Blocked, Lazy, Prompted, Relaxed, Separated, Share, Spread, Tiling, TwiceRelaxed

kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


class Counted(Stack):
    """A stack that counts how often each target is reached by a payment, and a chunk is opened."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.targets: Counter[int] = Counter()
        self.opened = 0

    def apply(self, state: StackState, tile: object, impl: Impl = Impl.MEASURED, **how: bool) -> None:
        self.targets.update(tile.tile.targets if isinstance(tile, Share) else tile.targets)
        super().apply(state, tile, impl, **how)

    def begin(self, state: StackState, n: int) -> None:
        self.opened += 1
        super().begin(state, n)

    def payments(self, length: int) -> Tensor:
        return torch.tensor([self.targets[t] + self.opened for t in range(length)])


def run(stack: Stack, state: StackState, y: Tensor, sizes: list[int], impl: Impl | None = None) -> Tensor:
    """Outputs [B, L, M D] for inputs y [B, L, M D] that arrive in chunks of these sizes."""
    D, outputs, at = stack.width, [], state.clock
    for n in sizes:
        for size in stack.pieces(state, n):
            if impl is not None:
                for tile in stack.due(state):
                    stack.pay(state, tile, impl)
            stack.begin(state, size)
            piece = y[:, at : at + size]
            outputs.append(
                torch.cat([stack.mix(state, m, piece[..., m * D : m * D + D]) for m in range(stack.count)], -1)
            )
            stack.commit(state, size)
            at += size
    return torch.cat(outputs, dim=1)


def check(
    tiling: Tiling,
    sizes: list[int],
    *,
    taps: int,
    batch: int = 1,
    count: int = 1,
    width: int = 2,
    start: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    storage: torch.dtype | None = None,
    impl: Impl | None = None,
) -> None:
    torch.manual_seed(len(sizes))
    L, C = sum(sizes), count * width
    rho, skip = torch.randn(C, taps, dtype=dtype), torch.randn(C, dtype=dtype)
    y = torch.randn(batch, L, C, dtype=dtype)
    stack = Counted(PreparedFilter(rho), width, skip)
    begun = None if start is None else torch.tensor(start)
    state = stack.init(batch, tiling, dtype=storage, start=begun)
    z = run(stack, state, y, sizes, impl)
    if begun is not None:
        y = y * (torch.arange(L) >= begun[:, None])[..., None]
        z = z * (torch.arange(L) >= begun[:, None])[..., None]
    exact = causal_conv_oracle(y, rho) + skip * y.double()
    bound = causal_bound(
        y,
        rho,
        skip,
        eps=torch.finfo(dtype).eps,
        storage_eps=torch.finfo(storage or dtype).eps,
        payments=stack.payments(L),
    )
    wrong = ((z.double() - exact).abs() > bound).nonzero()
    assert not len(wrong), f"first wrong (row, position, channel): {wrong[0].tolist()} of {tiling!r}, chunks {sizes}"
    assert state.clock == L


@settings(max_examples=150)
@given(data=st.data())
def test_any_tiling_any_chunks(data: st.DataObject) -> None:
    length = data.draw(lengths(257), "length")
    taps = data.draw(lengths(257), "taps")
    bounded = data.draw(st.booleans(), "the tiling knows the taps")
    tiling = data.draw(tilings(length, taps if bounded else None), "tiling")
    batch = data.draw(st.integers(1, 3), "batch")
    start = data.draw(st.none() | st.lists(st.integers(0, length), min_size=batch, max_size=batch), "start")
    check(
        tiling,
        data.draw(chunks(length), "chunks"),
        taps=taps,
        batch=batch,
        count=data.draw(st.integers(1, 3), "convolutions"),
        width=data.draw(st.integers(1, 3), "width"),
        start=start,
    )


@settings(max_examples=60)
@given(data=st.data())
def test_endless_any_chunks(data: st.DataObject) -> None:
    taps = data.draw(lengths(130), "taps")
    tiling = data.draw(tilings(None, taps + data.draw(st.integers(0, 9), "spare taps")), "tiling")
    check(
        tiling,
        data.draw(chunks(data.draw(lengths(513), "length")), "chunks"),
        taps=taps,
        batch=data.draw(st.integers(1, 2), "batch"),
        width=data.draw(st.integers(1, 3), "width"),
    )


@kinds
@pytest.mark.parametrize("impl", TILE_CONV_IMPLS, ids=str)
def test_every_implementation_pays(make, impl: Impl) -> None:
    check(make(129, None), [1] * 129, taps=129, batch=2, count=2, impl=impl)
    check(Prompted(make(60, None), 37), [37, *[1] * 60], taps=97, batch=2, impl=impl)


@kinds
def test_step_by_step_in_float32(make) -> None:
    check(make(257, None), [1] * 257, taps=257, batch=2, count=2, dtype=torch.float32)


@kinds
def test_history_in_bfloat16(make) -> None:
    for sizes in ([1] * 127, [5, *[1] * 60, 40, *[1] * 22]):
        check(make(127, None), sizes, taps=127, dtype=torch.float32, storage=torch.bfloat16)


@kinds
@pytest.mark.parametrize("taps", [1, 5, 33])
def test_a_ring_for_ever(make, taps: int) -> None:
    tiling = make(None, taps)
    stack = Stack(PreparedFilter(torch.randn(1, taps)), 1)
    rows = stack.rows(tiling)
    cycle = [1, 1, 1, 70, 1, rows // 3, 2, *[1] * 40]
    check(tiling, cycle * (11 * rows // sum(cycle) + 1), taps=taps)


def test_a_chunk_longer_than_the_ring() -> None:
    check(Spread(Separated(None, 8, 4, taps=40), 4), [3, 2000, 1, 1, 700], taps=40)


@kinds
def test_rows_that_begin_later_equal_rows_alone(make) -> None:
    """In float64, a row that starts at clock s is that row alone, s positions later, but for rounding."""
    L, start = 90, [0, 13, 64]
    rho = torch.randn(2, L, dtype=torch.float64)
    y = torch.randn(3, L, 2, dtype=torch.float64)
    stack = Counted(PreparedFilter(rho), 2)
    together = run(stack, stack.init(3, make(L, None), start=torch.tensor(start)), y, [20, *[1] * 50, 20])
    for row, s in enumerate(start):
        alone = run(stack, stack.init(1, make(L - s, None)), y[row : row + 1, s:], [1] * (L - s))
        bound = causal_bound(y[row : row + 1, s:], rho, eps=torch.finfo(torch.float64).eps, payments=L)
        assert ((together[row : row + 1, s:] - alone).abs() <= 2 * bound).all()


@kinds
def test_one_buffer(make) -> None:
    """History is one row a position, rounded up to a block, and nothing grows."""
    for length in (1, 33, 200, 1000):
        stack = Stack(PreparedFilter(torch.randn(6, length)), 3)
        state = stack.init(2, make(length, None))
        assert length <= state.history.shape[2] < length + state.block
        assert state.history.nbytes == state.history.shape[2] * 6 * 2 * 4
        assert state.nbytes == state.history.nbytes + 2 * state.block * 6 * 2 * 4


@settings(max_examples=20)
@given(data=st.data())
def test_convolutions_of_different_widths_lie_side_by_side(data: st.DataObject) -> None:
    widths, length = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)), data.draw(lengths(100))
    channels = sum(widths)
    rho, skip = torch.randn(channels, length, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    y = torch.randn(2, length, channels, dtype=torch.float64)
    stack = Stack(PreparedFilter(rho), widths, skip)
    assert stack.count == len(widths)
    state, outputs, at = stack.init(2, data.draw(tilings(length))), [], 0
    for n in data.draw(chunks(length)):
        stack.begin(state, n)
        parts = y[:, at : at + n].split(widths, dim=2)
        outputs.append(torch.cat([stack.mix(state, m, part) for m, part in enumerate(parts)], dim=2))
        stack.commit(state, n)
        at += n
    bound = causal_bound(y, rho, skip, eps=torch.finfo(torch.float64).eps, payments=length)
    assert ((torch.cat(outputs, dim=1) - causal_conv_oracle(y, rho) - skip * y).abs() <= bound).all()


def test_states_are_independent() -> None:
    stack = Stack(PreparedFilter(torch.randn(4, 100)), 2)
    y = torch.randn(2, 1, 100, 4)
    expected = [run(stack, stack.init(1, Blocked(100, 8)), y[i], [1] * 100) for i in range(2)]
    states = [stack.init(1, Blocked(100, 8)) for _ in range(2)]
    got = [[], []]
    for _ in range(100):
        for i in (0, 1):
            got[i].append(run(stack, states[i], y[i], [1]))
    for i in (0, 1):
        assert torch.equal(torch.cat(got[i], dim=1), expected[i])


# ----------------------------------------------------------------------------------------------------------- LongConv


@settings(max_examples=40)
@given(data=st.data())
def test_long_conv_extends_as_it_forwards(data: st.DataObject) -> None:
    length = data.draw(lengths(130), "length")
    kind = data.draw(st.sampled_from((ExplicitFilter, ImplicitFilter)), "filter")
    conv = LongConv(3, 130, filter=kind(3, 130).double(), skip=data.draw(st.booleans(), "skip")).double()
    y = torch.randn(2, length, 3, dtype=torch.float64)
    state = conv.init(2, data.draw(tilings(length), "tiling"))
    outputs, at = [], 0
    for n in data.draw(chunks(length), "chunks"):
        outputs.append(conv.extend(state, y[:, at : at + n]))
        at += n
        for tile in conv.due(state) if data.draw(st.booleans(), "pay at once") and at < length else ():
            conv.pay(state, tile)
    skip = None if conv.skip is None else conv.skip.detach()
    # The same tap evaluated among more taps may round differently: each way is held against the taps that it used.
    for got, evaluated in ((torch.cat(outputs, dim=1), 130), (conv(y).detach(), length)):
        rho = conv.filter.taps(evaluated).detach()
        exact = causal_conv_oracle(y, rho) + (0 if skip is None else skip * y)
        bound = causal_bound(y, rho, skip, eps=torch.finfo(torch.float64).eps, payments=length)
        assert ((got - exact).abs() <= bound).all()


def test_long_conv_prepares_its_filter_anew_when_a_weight_changes() -> None:
    conv = LongConv(2, 20)
    y = torch.randn(1, 20, 2)
    first = conv.stack()
    assert conv.stack() is first
    with torch.no_grad():
        conv.filter.rho[:, 3] += 1
    got = conv.extend(conv.init(1, Relaxed(20)), y)
    rho, skip = conv.filter.rho.detach(), conv.skip.detach()
    bound = causal_bound(y, rho, skip, eps=torch.finfo(torch.float32).eps, payments=20)
    assert ((got - conv(y).detach()).abs() <= 2 * bound).all()


# ------------------------------------------------------------------------------------------------------------- errors


def test_more_positions_than_the_tiling_has() -> None:
    stack = Stack(PreparedFilter(torch.randn(1, 9)), 1)
    state = stack.init(1, Relaxed(9))
    run(stack, state, torch.randn(1, 9, 1), [4, 1])
    with pytest.raises(LengthError, match=r"5 more positions after 5 make 10; the state holds 9\. Make the tiling"):
        run(stack, state, torch.randn(1, 20, 1), [5])
    assert state.clock == 5


def test_a_width_that_does_not_divide() -> None:
    with pytest.raises(ShapeError, match=r"the filter has 5 channels; expected a multiple of the width 2"):
        Stack(PreparedFilter(torch.randn(5, 9)), 2)
    with pytest.raises(ShapeError, match=r"the filter has 5 channels; the convolutions' widths \[2, 2\] add up to 4"):
        Stack(PreparedFilter(torch.randn(5, 9)), [2, 2])


@pytest.mark.parametrize("length", [None, 40])
def test_a_tiling_built_for_fewer_taps_is_refused(length: int | None) -> None:
    """It would drop the lags it does not know, silently."""
    stack = Stack(PreparedFilter(torch.randn(1, 30)), 1)
    with pytest.raises(FlashInferenceError, match=r"(?s)(?=.*10)(?=.*30)(?=.*taps)"):
        stack.init(1, Blocked(length, 8, taps=10))


def test_a_tiling_of_parallelograms_is_refused() -> None:
    stack = Stack(PreparedFilter(torch.randn(1, 30)), 1)
    with pytest.raises(FlashInferenceError, match=r"TwiceRelaxed"):
        stack.init(1, TwiceRelaxed(30))


def test_a_filter_shorter_than_the_sequence_pays_its_taps_only() -> None:
    check(Lazy(50), [1] * 50, taps=3)
    check(Relaxed(50), [25, *[1] * 25], taps=3)
