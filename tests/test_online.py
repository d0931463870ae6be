"""Streams: blocks of any size, any number of them, in fixed memory, equal one direct convolution."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_inference import OnlineConvolution
from flash_inference.errors import FilterError, FlashInferenceError, NumericsError, ShapeError
from flash_inference.testing import causal_bound, causal_conv_oracle
from flash_inference.testing.strategies import chunks, lengths, makers
from flash_inference.tiling import Blocked


def check(conv: OnlineConvolution, filter: torch.Tensor, x: torch.Tensor, sizes: list[int]) -> None:
    """Pushes x [L, C] in blocks of these sizes; filter [taps, C]."""
    outputs, at = [], 0
    for n in sizes:
        block = x[at : at + n]
        before = block.clone()
        outputs.append(conv.push(block[:, 0] if conv.flat else block))
        assert torch.equal(block, before)
        at += n
    got = torch.cat(outputs)
    got = got[:, None] if conv.flat else got
    assert got.dtype == filter.dtype
    exact = causal_conv_oracle(x, filter.T)
    bound = causal_bound(x[None], filter.T, eps=torch.finfo(filter.dtype).eps, payments=len(sizes) + 64)[0]
    assert ((got.double() - exact).abs() <= bound).all()


@settings(max_examples=60)
@given(data=st.data())
def test_any_blocks(data: st.DataObject) -> None:
    taps, channels = data.draw(lengths(300), "taps"), data.draw(st.integers(1, 3), "channels")
    filter = torch.randn(taps, channels, dtype=torch.float64)
    x = torch.randn(data.draw(lengths(600), "samples"), channels, dtype=torch.float64)
    check(OnlineConvolution(filter), filter, x, data.draw(chunks(len(x)), "blocks"))


@settings(max_examples=30)
@given(data=st.data())
def test_any_tiling(data: st.DataObject) -> None:
    taps = data.draw(lengths(70), "taps")
    filter = torch.randn(taps, 2, dtype=torch.float64)
    x = torch.randn(data.draw(lengths(300), "samples"), 2, dtype=torch.float64)
    tiling = data.draw(makers(), "tiling")(None, taps)
    check(OnlineConvolution(filter, tiling=tiling), filter, x, data.draw(chunks(len(x)), "blocks"))


@pytest.mark.parametrize("taps", [1, 2, 64, 65, 257, 1000])
@pytest.mark.parametrize("block", [1, 17, 128, 3000])
def test_long_streams_in_fixed_memory(taps: int, block: int) -> None:
    filter = torch.randn(taps, 1)
    conv = OnlineConvolution(filter)
    before = conv.nbytes
    check(conv, filter, torch.randn(9 * block if block > 1 else 3000, 1), [block] * 9 if block > 1 else [1] * 3000)
    assert conv.nbytes == before
    assert conv.position == max(9 * block, 3000 if block == 1 else 0)


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_stream() -> None:
    conv = OnlineConvolution(torch.randn(100, 2))

    def push() -> int:
        for _ in range(10):
            conv.push(torch.randn(333, 2))
            conv.push(torch.randn(1, 2))
        return held()

    for _ in range(5):  # until every regular shape has come once: its spectrum is kept
        push()
    held_now = push()
    assert [push() for _ in range(9)] == [held_now] * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_one_axis(dtype: torch.dtype) -> None:
    filter = torch.randn(50, dtype=dtype)
    conv = OnlineConvolution(filter)
    check(conv, filter[:, None], torch.randn(200, 1, dtype=dtype), [1, 99, *[1] * 50, 50])
    assert conv.push(torch.zeros(0, dtype=dtype)).shape == (0,)
    assert conv.push(torch.zeros(1, dtype=dtype)).shape == (1,)
    assert conv.push(torch.zeros(3, dtype=dtype)).shape == (3,)


def test_reset_forgets() -> None:
    filter, x = torch.randn(70, 2), torch.randn(150, 2)
    conv = OnlineConvolution(filter)
    first = torch.cat([conv.push(x[:100]), *(conv.push(x[t : t + 1]) for t in range(100, 150))])
    conv.reset()
    assert conv.position == 0
    again = torch.cat([conv.push(x[:100]), *(conv.push(x[t : t + 1]) for t in range(100, 150))])
    assert torch.equal(first, again)


def test_numpy_in_and_the_same_out() -> None:
    filter, x = np.random.default_rng(0).standard_normal((2, 90, 3))
    array, tensor = OnlineConvolution(filter), OnlineConvolution(torch.from_numpy(filter))
    for block in (x[:50], x[50:51], x[51:]):
        assert torch.equal(array.push(block), tensor.push(torch.from_numpy(block)))


def test_outputs_stay_as_they_were() -> None:
    conv = OnlineConvolution(torch.randn(40, 2))
    outputs = [conv.push(torch.randn(n, 2)) for n in (1, 5, 1)]
    kept = [out.clone() for out in outputs]
    for _ in range(100):
        conv.push(torch.randn(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(outputs, kept, strict=True))


def test_the_filter_may_change_afterwards() -> None:
    filter = torch.randn(40, 2)
    conv, same = OnlineConvolution(filter), OnlineConvolution(filter.clone())
    filter.zero_()
    x = torch.randn(100, 2)
    assert torch.equal(conv.push(x), same.push(x))


@pytest.mark.parametrize(
    ("filter", "error", "message"),
    [
        (
            torch.ones(4, dtype=torch.int64),
            ShapeError,
            r"filter is torch\.int64; expected float32 or float64\. Convert",
        ),
        (torch.ones(4, dtype=torch.bfloat16), ShapeError, r"filter is torch\.bfloat16; expected float32 or float64"),
        (torch.ones(4, 2, 1), ShapeError, r"shape \(4, 2, 1\); expected \[taps, channels\] or \[taps\]"),
        (torch.tensor(1.0), ShapeError, r"shape \(\); expected \[taps, channels\] or \[taps\]"),
        (torch.ones(0), FilterError, r"the filter is empty: shape \(0,\); expected at least 1 tap and 1 channel"),
        (torch.ones(3, 0), FilterError, r"the filter is empty: shape \(3, 0\)"),
        (torch.tensor([1.0, float("nan")]), FilterError, r"not finite: 1 of 2 taps, first channel 0 lag 1 = nan"),
        (torch.tensor([[1.0, float("inf")]]), FilterError, r"not finite: 1 of 2 taps, first channel 1 lag 0 = inf"),
    ],
    ids=["integers", "bfloat16", "three-axes", "no-axis", "no-taps", "no-channels", "nan", "inf"],
)
def test_filters_that_are_none(filter: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OnlineConvolution(filter)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (torch.zeros(5), r"shape \(5,\); expected torch\.float32 \[N, 2\], as the filter is"),
        (torch.zeros(5, 3), r"shape \(5, 3\); expected torch\.float32 \[N, 2\]"),
        (torch.zeros(1, 3), r"shape \(1, 3\); expected torch\.float32 \[N, 2\]"),
        (torch.zeros(1, 5, 2), r"shape \(1, 5, 2\); expected torch\.float32 \[N, 2\]"),
        (torch.zeros(5, 2, dtype=torch.float64), r"block is torch\.float64 of shape \(5, 2\); expected torch\.float32"),
    ],
    ids=["one-axis", "channels", "one-sample", "three-axes", "dtype"],
)
def test_blocks_that_do_not_fit(block: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        OnlineConvolution(torch.zeros(4, 2)).push(block)
    with pytest.raises(ShapeError, match=r"expected torch\.float32 \[N\], as the filter is"):
        OnlineConvolution(torch.zeros(4)).push(torch.zeros(3, 2))


@pytest.mark.parametrize("samples", [1, 2, 100])
def test_a_block_that_is_not_finite_is_refused_and_changes_nothing(samples: int) -> None:
    filter = torch.randn(30, 2)
    conv, same = OnlineConvolution(filter), OnlineConvolution(filter)
    x, bad = torch.randn(60, 2), torch.randn(samples, 2)
    bad[-1, 1] = float("nan")
    assert torch.equal(conv.push(x[:20]), same.push(x[:20]))
    with pytest.raises(
        NumericsError, match=rf"sample {samples - 1} of the block, channel 1, is nan, which would spread"
    ):
        conv.push(bad)
    assert torch.equal(conv.push(x[20:]), same.push(x[20:]))


def test_a_tiling_built_for_fewer_taps_is_refused() -> None:
    with pytest.raises(FlashInferenceError, match=r"(?s)(?=.*10)(?=.*30)(?=.*taps)"):
        OnlineConvolution(torch.randn(30), tiling=Blocked(None, 8, taps=10))
