"""Mixers from their own block routine: any tiling and any split equals the float64 double sum over pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_inference.errors import LengthError, ShapeError, StateError, TilingError
from flash_inference.mixers import AdaptiveConv, Contribution, TiledPast
from flash_inference.mixers.tiled import Tiled
from flash_inference.testing.strategies import KINDS, chunks, lengths, tilings
from flash_inference.tiling import Blocked, Prompted, Relaxed, Separated, Spread, Tiling, TwiceRelaxed

WIDTH = 3


class PowerLaw(Contribution):
    """A weighted mean of the past: source i counts e^(y[i, 0]) / (j - i + 1) at target j."""

    sum_shape = (WIDTH,)

    def cont(self, y: Tensor, sources: range, targets: range) -> Tensor:
        i, j = (torch.tensor(list(r), dtype=y.dtype) for r in (sources, targets))
        gain = y[..., :1].exp()
        return (1 / (j[:, None] - i + 1)) @ torch.cat([gain, gain * y[..., 1:]], dim=2)

    def read(self, sums: Tensor, y: Tensor) -> Tensor:
        return y[..., 2:] * sums[..., 1:] / sums[..., :1]


class Largest(Contribution):
    """The largest decayed input so far: + is the maximum, nothing is -inf."""

    sum_shape = (WIDTH,)
    nothing = -torch.inf

    def cont(self, y: Tensor, sources: range, targets: range) -> Tensor:
        lags = torch.tensor([[j - i for i in sources] for j in targets], dtype=y.dtype)
        return (y[:, None] - 0.1 * lags[..., None]).amax(2)

    def agg(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    def read(self, sums: Tensor, y: Tensor) -> Tensor:
        return sums - y


def power_law_oracle(y: Tensor) -> Tensor:
    rows = y.double()
    z = torch.zeros(*y.shape[:2], WIDTH - 1, dtype=torch.float64)
    for j in range(y.shape[1]):
        weights = [rows[:, i, :1].exp() / (j - i + 1) for i in range(j + 1)]
        total = sum(w * rows[:, i, 1:] for i, w in enumerate(weights))
        z[:, j] = rows[:, j, 2:] * total / sum(weights)
    return z


def largest_oracle(y: Tensor) -> Tensor:
    best = [torch.stack([y[:, i] - 0.1 * (j - i) for i in range(j + 1)]).max(0).values for j in range(y.shape[1])]
    return torch.stack(best, dim=1) - y


MIXERS = {"power-law": (PowerLaw, power_law_oracle), "largest": (Largest, largest_oracle)}
mixers = pytest.mark.parametrize(("mixer", "oracle"), MIXERS.values(), ids=MIXERS.keys())


def inputs(length: int, width: int = WIDTH) -> Tensor:
    return torch.randn(2, length, width, dtype=torch.float64)


def run(mixer: Tiled, past: TiledPast, y: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([mixer.extend(past, piece) for piece in y.split(sizes, dim=1)], dim=1)


@mixers
@pytest.mark.parametrize("length", [1, 7, 65, 97])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_every_tiling_equals_the_double_sum(mixer: type, oracle, make, length: int) -> None:
    y = inputs(length)
    past = mixer().init(2, make(length, None), WIDTH, like=y)
    torch.testing.assert_close(run(mixer(), past, y, [1] * length), oracle(y), rtol=0, atol=1e-9)


@mixers
@given(data=st.data())
def test_every_split_equals_the_double_sum(mixer: type, oracle, data: st.DataObject) -> None:
    length = data.draw(lengths(70))
    y = inputs(length)
    past = mixer().init(2, data.draw(tilings(length)), WIDTH, like=y)
    z = run(mixer(), past, y, data.draw(chunks(length)))
    torch.testing.assert_close(z, oracle(y), rtol=0, atol=1e-9)
    torch.testing.assert_close(mixer().forward(y), oracle(y), rtol=0, atol=1e-9)


@mixers
def test_a_chunk_may_begin_and_end_amid_the_shares_of_a_tile(mixer: type, oracle) -> None:
    length = 21
    y = inputs(length)
    expected = oracle(y)
    for start in range(1, length):
        for n in (2, 4, 7):
            n = min(n, length - start)
            past = mixer().init(2, Spread(Separated(length, 4, 1), every=2), WIDTH, like=y)
            z = run(mixer(), past, y, [1] * start + [n] + [1] * (length - start - n))
            torch.testing.assert_close(z, expected, rtol=0, atol=1e-9)


def test_the_routine_is_called_for_few_large_blocks() -> None:
    areas: list[int] = []

    class Counted(PowerLaw):
        def cont(self, y: Tensor, sources: range, targets: range) -> Tensor:
            areas.append(len(sources) + len(targets))
            return super().cont(y, sources, targets)

    y = inputs(256)
    run(Counted(), Counted().init(2, Relaxed(256), WIDTH, like=y), y, [1] * 256)
    # 2^(P-1-q) tiles of side 2^q, q = 0 .. P - 1, of S + T = 2^(q+1) each, and one pair (t, t) a step.
    assert len(areas) == 255 + 256
    assert sum(areas) == 8 * 256 + 2 * 256


def adaptive_oracle(y: Tensor, rho: Tensor) -> Tensor:
    z = torch.zeros(y.shape, dtype=torch.float64)
    for t in range(y.shape[1]):
        for i in range(t + 1):
            z[:, t] += y[:, i].double() * rho[:, t - i].double()
    return z


@pytest.mark.parametrize("length", [1, 2, 7, 64, 97, 130])
def test_taps_that_depend_on_what_was_put_out_before(length: int) -> None:
    """Tap k and input k are functions of output k - 1: nothing can be read ahead of time."""
    conv = AdaptiveConv()
    past = conv.init(2, TwiceRelaxed(length), WIDTH, like=inputs(1))
    noise, z, ys, taps = inputs(length, 2 * WIDTH), torch.zeros(2, 1, WIDTH, dtype=torch.float64), [], []
    out = []
    for t in range(length):
        y, rho = (noise[:, t : t + 1] + torch.cat([z.sin(), z.cos()], dim=2)).chunk(2, dim=2)
        rho = rho / length**0.5
        z = conv.extend(past, torch.cat([y, rho], dim=2))
        ys.append(y), taps.append(rho), out.append(z)
    expected = adaptive_oracle(torch.cat(ys, 1), torch.cat(taps, 1))
    torch.testing.assert_close(torch.cat(out, 1), expected, rtol=0, atol=1e-9)


@given(data=st.data())
def test_adaptive_filters_in_any_split(data: st.DataObject) -> None:
    length = data.draw(lengths(130))
    both = inputs(length, 2 * WIDTH)
    conv = AdaptiveConv()
    past = conv.init(2, TwiceRelaxed(length), WIDTH, like=both)
    z = run(conv, past, both, data.draw(chunks(length)))
    expected = adaptive_oracle(*both.chunk(2, dim=2))
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(conv.forward(both), expected, rtol=0, atol=1e-9)


def test_no_step_reads_a_tap_or_an_input_that_is_not_known() -> None:
    conv, length = AdaptiveConv(), 100
    both = inputs(length, 2 * WIDTH)
    past = conv.init(2, TwiceRelaxed(length), WIDTH, like=both)
    past.inputs.fill_(torch.nan)
    assert torch.isfinite(run(conv, past, both, [1] * 40 + [20] + [1] * 40)).all()


def test_paying_by_hand_is_the_same() -> None:
    mixer, y = PowerLaw(), inputs(40)
    past, out = mixer.init(2, Blocked(40, 8), WIDTH, like=y), []
    for t in range(40):
        for item in mixer.due(past):
            mixer.pay(past, item)
        assert mixer.due(past) == ()
        out.append(mixer.extend(past, y[:, t : t + 1]))
    torch.testing.assert_close(torch.cat(out, 1), power_law_oracle(y), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("mixer", "tiling"),
    [(PowerLaw(), TwiceRelaxed(9)), (AdaptiveConv(), Relaxed(9)), (AdaptiveConv(), Prompted(Relaxed(9), 3))],
)
def test_tilings_of_the_other_kind_are_refused(mixer: PowerLaw | AdaptiveConv, tiling: Tiling) -> None:
    with pytest.raises(TilingError, match=r"has (parallelograms|rectangles).*[Uu]se"):
        mixer.init(1, tiling, WIDTH)


def test_what_does_not_fit_is_refused() -> None:
    mixer = PowerLaw()
    with pytest.raises(LengthError, match=r"endless; .* Give the tiling a length"):
        mixer.init(1, Relaxed(None, taps=8), WIDTH)
    past = mixer.init(2, Relaxed(9), WIDTH, like=inputs(1))
    with pytest.raises(LengthError, match="10 positions were given; the state holds 9"):
        mixer.extend(past, inputs(10))
    with pytest.raises(ShapeError, match=r"expected \[2, N, 3\]"):
        mixer.extend(past, inputs(4, 5))
    mixer.extend(past, inputs(4))
    with pytest.raises(StateError, match="is not due after 4 positions"):
        mixer.pay(past, Relaxed(9).after(0)[0])
    with pytest.raises(ShapeError, match="float32 or float64"):
        AdaptiveConv().init(1, TwiceRelaxed(9), WIDTH, like=torch.empty(0, dtype=torch.bfloat16))
