"""What every mixer with a past of its own promises: any split is the whole, and rows know nothing of one another.

A new mixer is one line in MIXERS.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flash_inference.errors import ShapeError
from flash_inference.filters import ModalFilter, RealModalFilter, S4DFilter
from flash_inference.mixers import FIR, Attention, AttentionConfig, Mixer, ModalConv, Moment, Rotary
from flash_inference.testing.strategies import chunks, lengths

WIDTH, LENGTH = 6, 200
ALIBI, ROTARY = (0.5, 0.25, 0.1), Rotary(500.0, 4.0)

MIXERS: dict[str, Callable[[], nn.Module]] = {
    "modal": lambda: ModalConv(WIDTH, ModalFilter(WIDTH, LENGTH, modes=3)),
    "modal-grouped": lambda: ModalConv(WIDTH, ModalFilter(2, LENGTH, modes=1)),
    "modal-real-no-skip": lambda: ModalConv(WIDTH, RealModalFilter(WIDTH, LENGTH), skip=False),
    "modal-s4d": lambda: ModalConv(WIDTH, S4DFilter(WIDTH, LENGTH, modes=5)),
    "fir-1": lambda: FIR(WIDTH, 1, bias=False),
    "fir-3": lambda: FIR(WIDTH, 3),
    "fir-7-groups": lambda: FIR(WIDTH, 7, groups=2, bias=False),
    "fir-128-convolution-skip": lambda: FIR(WIDTH, 128, groups=3, order="convolution", bias=False, skip=True),
    "attention": lambda: Attention(AttentionConfig(WIDTH, 3)),
    "attention-rotary-grouped": lambda: Attention(AttentionConfig(WIDTH, 3, 1, rotary=ROTARY, qkv_bias=True)),
    "attention-alibi": lambda: Attention(AttentionConfig(WIDTH, 3, alibi=ALIBI, out_bias=True)),
    "attention-window-1": lambda: Attention(AttentionConfig(WIDTH, 3, window=1)),
    "attention-window-rotary": lambda: Attention(AttentionConfig(WIDTH, 3, head_width=4, window=7, rotary=ROTARY)),
    "attention-window-alibi-cap": lambda: Attention(
        AttentionConfig(WIDTH, 6, 3, head_width=2, window=16, alibi=ALIBI * 2, softcap=0.5)
    ),
    "attention-cap": lambda: Attention(AttentionConfig(WIDTH, 2, 1, softcap=1.0)),
}


@pytest.fixture(params=MIXERS, scope="module")
def mixer(request: pytest.FixtureRequest) -> Mixer:
    torch.manual_seed(len(request.param))
    made = MIXERS[request.param]().double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return made


def stepped(mixer: Mixer, x: Tensor, sizes: list[int], start: Tensor | None = None) -> Tensor:
    past, outputs, clock = mixer.init(len(x), x.shape[1]), [], 0
    for n in sizes:
        outputs.append(mixer.extend(past, x[:, clock : clock + n], Moment(clock, start)))
        clock += n
    return torch.cat(outputs, dim=1)


def close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-9 * b.abs().amax().clamp(min=1)).all())


@given(data=st.data())
@settings(max_examples=15)
def test_any_split_is_the_whole(mixer: Mixer, data: st.DataObject) -> None:
    L = data.draw(lengths(LENGTH))
    x = torch.randn(2, L, WIDTH, dtype=torch.float64)
    assert close(stepped(mixer, x, data.draw(chunks(L))), mixer.forward(x))


@given(data=st.data())
@settings(max_examples=15)
def test_nothing_before_a_start_leaves_a_trace(mixer: Mixer, data: st.DataObject) -> None:
    """Each row of a ragged batch equals that row alone, whatever stood before it, NaN included."""
    L = data.draw(lengths(LENGTH))
    start = torch.tensor(data.draw(st.lists(st.integers(0, L - 1), min_size=3, max_size=3)))
    x = torch.randn(3, L, WIDTH, dtype=torch.float64)
    for b, s in enumerate(start.tolist()):
        x[b, :s] = data.draw(st.sampled_from([7.0, float("inf"), float("nan")]))
    out = stepped(mixer, x, data.draw(chunks(L)), start)
    assert out.isfinite().all()
    for b, s in enumerate(start.tolist()):
        assert close(out[b, s:], mixer.forward(x[b : b + 1, s:])[0])


def test_a_past_is_a_value(mixer: Mixer) -> None:
    """It can be forked, and cut into rows: first axis the batch, nothing but tensors."""
    x, more = torch.randn(3, 20, WIDTH, dtype=torch.float64), torch.randn(3, 5, WIDTH, dtype=torch.float64)
    past = mixer.init(3, 30)
    mixer.extend(past, x, Moment(0))
    fork = copy.deepcopy(past)
    row = type(past)(**{f.name: getattr(past, f.name)[1:2].clone() for f in dataclasses.fields(past)})
    mixer.extend(past, -more, Moment(20))
    whole = mixer.forward(torch.cat([x, more], dim=1))[:, 20:]
    assert close(mixer.extend(fork, more, Moment(20)), whole)
    assert close(mixer.extend(row, more[1:2], Moment(20)), whole[1:2])


def test_past_bytes_are_the_bytes(mixer: Mixer) -> None:
    for length in (1, 5, 50):
        past = mixer.init(2, length)
        tensors = [getattr(past, f.name) for f in dataclasses.fields(past)]
        assert 2 * mixer.past_bytes(length) == sum(t.numel() * t.itemsize for t in tensors)


def test_no_positions_change_nothing(mixer: Mixer) -> None:
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    past = mixer.init(2, 9)
    assert mixer.extend(past, x[:, :0], Moment(0)).shape == (2, 0, WIDTH)
    first = mixer.extend(past, x[:, :4], Moment(0))
    assert mixer.extend(past, x[:, :0], Moment(4)).shape == (2, 0, WIDTH)
    assert close(torch.cat([first, mixer.extend(past, x[:, 4:], Moment(4))], dim=1), mixer.forward(x))


def test_gradients_flow_in_forward(mixer: Mixer) -> None:
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mixer.zero_grad()
    parameters = [p for p in mixer.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: mixer.forward(x), (x, *parameters), atol=1e-6, fast_mode=True)
    mixer.forward(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


def test_changed_parameters_are_seen(mixer: Mixer) -> None:
    other, x = copy.deepcopy(mixer), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    before = stepped(other, x, [1] * 9)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    after = stepped(other, x, [1] * 9)
    assert close(after, other.forward(x))
    assert not close(after, before)


def test_a_wrong_width_or_batch_is_named(mixer: Mixer) -> None:
    with pytest.raises(ShapeError, match=f"={WIDTH}"):
        mixer.forward(torch.zeros(1, 3, WIDTH + 1, dtype=torch.float64))
    with pytest.raises(ShapeError, match="B=2"):
        mixer.extend(mixer.init(2, 4), torch.zeros(3, 1, WIDTH, dtype=torch.float64), Moment(0))


@given(data=st.data())
@settings(max_examples=10)
def test_a_clock_on_the_device_changes_nothing(mixer: Mixer, data: st.DataObject) -> None:
    """Single positions behind a prompt, in rows that have all begun."""
    L = data.draw(st.integers(2, 40))
    known = data.draw(st.integers(1, L - 1))
    start = torch.tensor(data.draw(st.lists(st.integers(0, known), min_size=2, max_size=2)))
    x = torch.randn(2, L, WIDTH, dtype=torch.float64)
    past, other = mixer.init(2, L), mixer.init(2, L)
    for held in (past, other):
        mixer.extend(held, x[:, :known], Moment(0, start))
    for t in range(known, L):
        z = mixer.extend(past, x[:, t : t + 1], Moment(torch.tensor([t]), start))
        assert close(z, mixer.extend(other, x[:, t : t + 1], Moment(t, start)))
    assert mixer.replays
