"""Modal filters and the recurrence that convolves with them, against powers by repeated multiplication."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_inference.errors import FilterError, ShapeError
from flash_inference.filters import DiagonalFilter, Modal, ModalFilter, RealModalFilter, S4DFilter
from flash_inference.mixers import ModalConv, Moment
from flash_inference.mixers import modal as mixer
from flash_inference.mixers.modal import CHUNK
from flash_inference.ops.causal_conv import causal_conv_reference
from flash_inference.testing import causal_conv_oracle, modal_filter_oracle, recurrence_bound
from flash_inference.testing.strategies import chunks, lengths

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def modal(channels: int = 4, length: int = 300) -> ModalFilter:
    return ModalFilter(channels, length, modes=3)


def real(channels: int = 4, length: int = 300) -> RealModalFilter:
    return RealModalFilter(channels, length, modes=5)


def s4d(channels: int = 4, length: int = 300) -> S4DFilter:
    return S4DFilter(channels, length, modes=4)


def s4d_shared(channels: int = 4, length: int = 300) -> S4DFilter:
    return S4DFilter(channels, length, modes=4, copies=1)


def bilinear(channels: int = 4, length: int = 300) -> DiagonalFilter:
    return DiagonalFilter(channels, length, modes=4, copies=channels // 2 if channels % 2 == 0 else 0)


def held(channels: int = 4, length: int = 300) -> DiagonalFilter:
    filter = DiagonalFilter(channels, length, modes=4, discretization="zoh")
    torch.nn.init.normal_(filter.B)
    return filter


FILTERS = {"modal": modal, "real": real, "s4d": s4d, "s4d-shared": s4d_shared, "bilinear": bilinear, "zoh": held}


def poles_and_residues(filter: Modal) -> tuple[Tensor, Tensor]:
    """Of what a filter stores, by the definition of its family, complex128."""
    w = {name: p.detach().double() for name, p in filter.named_parameters()}
    if isinstance(filter, ModalFilter):
        return tuple(torch.complex(w[name][..., 0, 0], w[name][..., 0, 1]) for name in ("poles", "residues"))  # type: ignore[return-value]
    if isinstance(filter, RealModalFilter):
        return w["log_poles"][..., 0].exp() + 0j, w["residues"] + 0j
    if isinstance(filter, DiagonalFilter):
        w = {name: value.numpy().astype(np.longdouble) for name, value in w.items()}
        turns = [c % len(w["B"]) for c in range(filter.channels)]
        A = (-np.exp(w["log_A_real"]) + 1j * w["A_imag"])[turns]
        dt = np.exp(w["log_dt"])[:, None]
        weights = 2 * (w["C"][..., 0] + 1j * w["C"][..., 1]) * (w["B"][..., 0] + 1j * w["B"][..., 1])[turns]
        if filter.discretization == "zoh":
            poles, sampled = np.exp(dt * A), (np.exp(dt * A) - 1) / A
        else:
            poles, sampled = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
        return torch.from_numpy(poles.astype(complex)), torch.from_numpy((weights * sampled).astype(complex))
    # p - 1 cancels where dt is small: extended precision keeps the oracle's residues good to float64.
    log_dt, C, log_real, imag = (
        w[name].numpy().astype(np.longdouble) for name in ("log_dt", "C", "log_w_real", "w_imag")
    )
    A = (-np.exp(log_real) + 1j * imag)[[c % len(imag) for c in range(filter.channels)]]
    poles = np.exp(np.exp(log_dt)[:, None] * A)
    residues = 2 * (C[..., 0] + 1j * C[..., 1]) * (poles - 1) / A
    return torch.from_numpy(poles.astype(complex)), torch.from_numpy(residues.astype(complex))


def taps_bound(filter: Modal, n: int) -> Tensor:
    """[C, n]: what float64 may err, relative to sum |R| |p|^t.

    In units of eps: t |log p| for log p and its product with t, as much again for S4D's own dt A; 3 t for the products
    that powers are doubled by, t for the oracle's poles rounded; S for the sum over modes, 4 for residues and products.
    """
    poles, residues = poles_and_residues(filter)
    t = torch.arange(n, dtype=torch.float64)
    relative = t * (2 * poles.log().abs().amax(1, keepdim=True) + 4) + poles.shape[1] + 4
    return EPS[torch.float64] * relative * modal_filter_oracle(poles.abs(), residues.abs(), n)


@pytest.mark.parametrize("made", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 257])
def test_taps_are_the_definition(made, n: int) -> None:
    filter = made().double()
    exact = modal_filter_oracle(*poles_and_residues(filter), n)
    assert ((filter.taps(n) - exact).abs() <= taps_bound(filter, n)).all()


@given(data=st.data(), kind=st.sampled_from(sorted(FILTERS)))
def test_pieces_of_taps_are_the_whole(data: st.DataObject, kind: str) -> None:
    filter, n = FILTERS[kind](5, 300).double(), 300
    start = data.draw(st.integers(0, n - 1))
    size = data.draw(st.integers(1, n - start))
    first = data.draw(st.integers(0, 4))
    channels = slice(first, data.draw(st.integers(first + 1, 5)))
    piece, whole = filter.taps(size, start, channels), filter.taps(n)
    assert (
        (piece - whole[channels, start : start + size]).abs()
        <= 2 * taps_bound(filter, n)[channels][:, start : start + size]
    ).all()


@pytest.mark.parametrize("made", FILTERS.values(), ids=FILTERS)
def test_taps_in_float32_are_rounded_once(made) -> None:
    """Powers are formed in float64 from float32 parameters: an error does not grow with the lag."""
    filter = made(2, 20_000)
    exact = modal_filter_oracle(*poles_and_residues(filter), 20_000)
    taps = filter.taps(20_000)
    assert taps.dtype == torch.float32
    assert ((taps - exact).abs() <= EPS[torch.float32] / 2 * exact.abs() + taps_bound(filter, 20_000) + 1e-45).all()


def test_a_pole_at_zero_gives_one_tap() -> None:
    filter = ModalFilter(1, 8, modes=1).double().requires_grad_(False)
    filter.poles.zero_()
    filter.residues.copy_(torch.tensor([3.0, 1.0]).view(1, 1, 1, 2))
    assert torch.allclose(filter.taps(4), torch.tensor([[3.0, 0, 0, 0]], dtype=torch.float64), atol=1e-300, rtol=0)


@pytest.mark.parametrize("made", [modal, s4d], ids=["modal", "s4d"])
def test_stored_numbers_may_lie_on_any_8_bytes(made) -> None:
    """As those of a mapped file do: complex numbers of 16 bytes must not be read there in place."""
    filter = made().double()
    expected = filter.taps(50)
    for name, stored in list(filter.named_parameters()):
        odd = torch.empty(stored.numel() + 1, dtype=torch.float64)[1:].view(stored.shape).copy_(stored.detach())
        setattr(filter, name, torch.nn.Parameter(odd))
    assert torch.equal(filter.taps(50), expected)


def test_poles_outside_the_circle_while_the_taps_are_finite() -> None:
    filter = modal(2, 100).requires_grad_(False)
    filter.poles.div_(filter.poles.norm(dim=-1, keepdim=True)).mul_(1.01)
    exact = modal_filter_oracle(*poles_and_residues(filter), 100)
    assert torch.allclose(filter.taps(100).double(), exact, rtol=1e-6, atol=1e-6)
    with pytest.raises(FilterError, match=r"channel 0 reach .* within 20000 positions \(largest \|pole\| 1.01\)"):
        filter.taps(20_000)
    with pytest.raises(FilterError, match="fewer positions"):
        ModalConv(2, filter).init(1, 20_000)
    assert filter.double().taps(20_000).isfinite().all()


def test_modes_that_are_no_numbers_are_named() -> None:
    filter = real(3).requires_grad_(False)
    filter.residues[1, 2] = math.nan
    with pytest.raises(FilterError, match="channel 1 reach nan"):
        filter.taps(3)


CONVS = {
    "modal": lambda **k: ModalConv(4, modal(), **k),
    "modal-groups": lambda **k: ModalConv(4, modal(2), **k),
    "real-no-skip": lambda **k: ModalConv(4, real(), skip=False, **k),
    "s4d": lambda **k: ModalConv(4, s4d(), **k),
}


def exact_and_bound(conv: ModalConv, y: Tensor, eps: float, storage_eps: float | None = None) -> tuple[Tensor, Tensor]:
    repeats = conv.channels // conv.filter.channels
    poles, residues = (x.repeat_interleave(repeats, 0) for x in poles_and_residues(conv.filter))
    z = causal_conv_oracle(y, modal_filter_oracle(poles, residues, y.shape[1]))
    if conv.skip is not None:
        z = z + conv.skip.detach().double() * y.double()
    return z, recurrence_bound(y, poles, residues, conv.skip, eps=eps, storage_eps=storage_eps)


def stepped(conv: ModalConv, y: Tensor, sizes: list[int]) -> Tensor:
    past, pieces, clock = conv.init(len(y), y.shape[1]), [], 0
    for n in sizes:
        pieces.append(conv.extend(past, y[:, clock : clock + n], Moment(clock)))
        clock += n
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("made", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("length", [1, 2, 31, 257])
def test_forward_is_the_direct_sum(made, length: int, dtype: torch.dtype) -> None:
    conv, y = made().to(dtype).requires_grad_(False), torch.randn(2, length, 4, dtype=dtype)
    exact, bound = exact_and_bound(conv, y, EPS[dtype])
    assert ((conv(y) - exact).abs() <= bound).all()


@given(data=st.data(), kind=st.sampled_from(sorted(CONVS)), dtype=st.sampled_from(list(EPS)))
@settings(max_examples=40)
def test_any_chunks_are_the_direct_sum(data: st.DataObject, kind: str, dtype: torch.dtype) -> None:
    """With float32 inputs and a float64 state, only inputs' and outputs' own rounding is left: storage_eps."""
    length = data.draw(lengths(257))
    conv, y = CONVS[kind]().to(dtype), torch.randn(2, length, 4, dtype=dtype)
    exact, bound = exact_and_bound(conv, y, EPS[torch.float64], EPS[dtype])
    z = stepped(conv, y, data.draw(chunks(length)))
    assert z.dtype == dtype
    assert ((z - exact).abs() <= bound).all()


@given(data=st.data(), kind=st.sampled_from(sorted(CONVS)))
def test_a_float32_state_stays_within_its_bound(data: st.DataObject, kind: str) -> None:
    length = data.draw(lengths(257))
    conv, y = CONVS[kind](accumulate=torch.float32), torch.randn(2, length, 4)
    assert conv.init(1, 1).state.dtype == torch.float32
    exact, bound = exact_and_bound(conv, y, EPS[torch.float32])
    assert ((stepped(conv, y, data.draw(chunks(length))) - exact).abs() <= bound).all()


@pytest.mark.parametrize("made", CONVS.values(), ids=CONVS)
def test_long_prompts_are_taken_in_pieces(made) -> None:
    """Lengths beyond CHUNK, against the direct sum in float64."""
    conv, y = made().double().requires_grad_(False), torch.randn(1, 2 * CHUNK + 77, 4, dtype=torch.float64)
    rho = conv.filter.taps(y.shape[1]).repeat_interleave(4 // conv.filter.channels, 0)
    exact = causal_conv_reference(y.mT, rho).mT + (0 if conv.skip is None else conv.skip * y)
    for sizes in ([2 * CHUNK + 77], [CHUNK, 1, CHUNK + 1, 75], [3, CHUNK + 1, CHUNK + 73]):
        assert (stepped(conv, y, sizes) - exact).abs().max() <= 1e-9


@pytest.mark.slow
def test_a_hundred_thousand_steps_do_not_drift() -> None:
    """Single float32 steps of modes that last 10^2 to 10^5 positions stay within two roundings of a float64 run."""
    N, tau = 100_000, torch.logspace(2, 5, 4)
    filter = RealModalFilter(4, N, modes=1).requires_grad_(False)
    filter.log_poles.copy_((-1 / tau)[:, None, None])
    y = torch.randn(1, N, 4)
    conv = ModalConv(4, filter, skip=False)
    z = stepped(conv, y, [1] * N)
    exact = stepped(conv.double(), y.double(), [N])
    assert ((z - exact).abs() <= EPS[torch.float32] * exact.abs() + 1e-9).all()


def test_a_real_state_has_no_imaginary_part() -> None:
    assert ModalConv(4, real()).init(3, 10).state.shape == (3, 4, 5)
    assert ModalConv(4, modal()).init(3, 10).state.shape == (3, 4, 2 * 3)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(FilterError, match="filter has 3 channels; expected a divisor of 4"):
        ModalConv(4, modal(3))
    with pytest.raises(ShapeError, match=r"float16; expected torch\.float32 or torch\.float64"):
        ModalConv(4, modal(), accumulate=torch.float16)


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [9, 8, 23]], ids=str)
def test_steps_and_chunks_give_the_same(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two ways is taken is a question of speed alone."""
    conv, y = ModalConv(4, modal()).double(), torch.randn(2, 40, 4, dtype=torch.float64)
    exact, bound = exact_and_bound(conv, y, EPS[torch.float64])
    for answer in (True, False):
        monkeypatch.setattr(mixer, "stepwise", lambda y, answer=answer: answer)
        assert ((stepped(conv, y, sizes) - exact).abs() <= bound).all()


def test_steps_are_taken_where_they_are_faster() -> None:
    assert mixer.stepwise(torch.zeros(1, mixer.STEPS, 1))
    assert mixer.stepwise(torch.zeros(2, 1000, mixer.FULL // 2))
    assert not mixer.stepwise(torch.zeros(1, 1000, 4))
    assert not mixer.stepwise(torch.zeros(1, 1000, mixer.FULL, device="meta"))


@pytest.mark.parametrize(
    ("kind", "copies"), [(S4DFilter, 3), (DiagonalFilter, 3), (S4DFilter, -1), (DiagonalFilter, 8)]
)
def test_channels_take_turns_in_a_divisor_of_their_number(kind, copies):
    with pytest.raises(
        FilterError, match=rf"copies is {copies}; expected a divisor of 4, the channels that take turns"
    ):
        kind(4, 20, copies=copies)


def test_a_discretization_that_depends_on_the_length_is_unknown():
    with pytest.raises(FilterError, match=r"discretization is 'dss'; expected one of 'bilinear', 'zoh'"):
        DiagonalFilter(4, 20, discretization="dss")


def test_a_bilinear_pole_at_zero_gives_one_tap():
    """exp(log_dt) A = -2 + 0 i: what comes in is forgotten at once."""
    filter = DiagonalFilter(1, 20, modes=1).double()
    with torch.no_grad():
        filter.log_dt.fill_(0.0)
        filter.log_A_real.fill_(2.0).log_()
        filter.A_imag.zero_()
    taps = filter.taps(5)[0]
    assert taps[0] != 0
    assert taps[1:].abs().max() <= 1e-15
