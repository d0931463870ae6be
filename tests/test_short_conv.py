"""The short convolution: its definition, and the same in chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_inference.mixers import Moment, ShortConv
from flash_inference.testing import short_conv_oracle
from flash_inference.testing.strategies import chunks, lengths

EPS = torch.finfo(torch.float64).eps


def made(channels: int, taps: int) -> ShortConv:
    conv = ShortConv(channels, taps).double().requires_grad_(False)
    conv.bias.copy_(torch.randn(channels))
    return conv


def bound(conv: ShortConv, u: torch.Tensor) -> torch.Tensor:
    """(taps + 2) roundings of sums no larger than that of the magnitudes; twice, for what is pending."""
    magnitude = short_conv_oracle(u.abs(), conv.weight[:, 0].abs(), conv.bias.abs())
    return 2 * (conv.taps + 2) * EPS * magnitude


@pytest.mark.parametrize("taps", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 33])
def test_forward_is_the_definition(length: int, taps: int) -> None:
    conv, u = made(4, taps), torch.randn(2, length, 4, dtype=torch.float64)
    exact = short_conv_oracle(u, conv.weight[:, 0], conv.bias)
    assert ((conv(u) - exact).abs() <= bound(conv, u)).all()


@given(data=st.data())
def test_any_chunks(data: st.DataObject) -> None:
    length, taps = data.draw(lengths(40)), data.draw(st.integers(1, 5))
    conv, u = made(3, taps), torch.randn(2, length, 3, dtype=torch.float64)
    past, pieces, at = conv.init(2), [], 0
    for n in data.draw(chunks(length)):
        pieces.append(conv.extend(past, u[:, at : at + n], Moment(at)))
        at += n
    exact = short_conv_oracle(u, conv.weight[:, 0], conv.bias)
    slack = bound(conv, u) + EPS * conv.bias.abs() * length
    assert ((torch.cat(pieces, dim=1) - exact).abs() <= slack).all()


def test_a_moment_knows_which_positions_have_begun() -> None:
    start = torch.tensor([0, 5])
    for moment in (Moment(3, start), Moment(3, start, last_start=5)):
        assert moment.positions(3).tolist() == [[3, 4, 5], [-2, -1, 0]]
        assert moment.alive(3).tolist() == [[True, True, True], [False, False, True]]
        assert moment.mute(torch.full((2, 3, 1), torch.inf))[1, :, 0].tolist() == [0, 0, torch.inf]
    assert Moment(5, start).alive(3) is Moment(5, start, last_start=5).alive(3) is Moment(0).alive(3) is None


def test_the_last_weight_is_the_newest() -> None:
    conv = ShortConv(1, 3).requires_grad_(False)
    conv.weight.copy_(torch.tensor([[[100.0, 10.0, 1.0]]]))
    conv.bias.fill_(0.5)
    assert conv(torch.tensor([[[1.0], [2.0], [3.0]]])).flatten().tolist() == [1.5, 12.5, 123.5]


def test_an_empty_past_is_the_bias() -> None:
    conv = made(3, 4)
    assert torch.equal(conv.init(2).pending, conv.bias.expand(2, 3, 3))
    assert conv.init(2).pending.nbytes == 2 * conv.past_bytes(100)


@given(data=st.data())
def test_rows_begin_at_their_own_clocks(data: st.DataObject) -> None:
    """What enters before a row's start leaves no trace, whatever it is."""
    length, taps = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 5))
    starts = data.draw(st.lists(st.integers(0, length - 1), min_size=3, max_size=3))
    conv, u = made(3, taps), torch.randn(3, length, 3, dtype=torch.float64)
    past, pieces, at = conv.init(3), [], 0
    for n in data.draw(chunks(length)):
        pieces.append(conv.extend(past, u[:, at : at + n], Moment(at, torch.tensor(starts))))
        at += n
    got = torch.cat(pieces, dim=1)
    for row, start in enumerate(starts):
        own = u[row : row + 1, start:]
        exact = short_conv_oracle(own, conv.weight[:, 0], conv.bias)
        slack = bound(conv, own) + EPS * conv.bias.abs() * length
        assert ((got[row : row + 1, start:] - exact).abs() <= slack).all()
