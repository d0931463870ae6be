"""The FIR: either order of taps, groups, bias and skip, against the definition, at lengths below and above the taps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from flash_inference.errors import FilterError
from flash_inference.mixers import FIR, Moment, ShiftSSM

CASES = list(itertools.product([1, 2, 7, 128], [6, 2, 1], ["cross-correlation", "convolution"], [True, False]))


def made(taps: int, groups: int, order: str, extras: bool, dtype: torch.dtype) -> FIR:
    """With bias and skip, or without both."""
    fir = FIR(6, taps, groups=groups, order=order, bias=extras, skip=extras)  # type: ignore[arg-type]
    fir = fir.to(dtype).requires_grad_(False)
    if fir.bias is not None:
        fir.bias.normal_()
    return fir


def oracle(fir: FIR, u: Tensor, absolute: bool = False) -> Tensor:
    """z[t, c] = bias + skip u + sum of h[k] u[t - k], one product at a time; of magnitudes if `absolute`."""
    arrays = [None if x is None else x.detach().double().numpy() for x in (fir.weight, fir.bias, fir.skip, u)]
    weight, bias, skip, inputs = [np.abs(x) if absolute and x is not None else x for x in arrays]
    z = np.zeros(inputs.shape)
    for t in range(inputs.shape[1]):
        for c in range(6):
            row = weight[c * len(weight) // 6, 0]
            for k in range(min(fir.taps, t + 1)):
                z[:, t, c] += row[k if fir.order == "convolution" else fir.taps - 1 - k] * inputs[:, t - k, c]
            if bias is not None:
                z[:, t, c] += bias[c] + skip[c] * inputs[:, t, c]
    return torch.from_numpy(z)


def bound(fir: FIR, u: Tensor) -> Tensor:
    """(taps + 3) roundings of sums no larger than that of the magnitudes."""
    return (fir.taps + 3) * torch.finfo(u.dtype).eps * oracle(fir, u, absolute=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("taps", "groups", "order", "extras"), CASES)
def test_forward_and_steps_are_the_definition(
    taps: int, groups: int, order: str, extras: bool, dtype: torch.dtype
) -> None:
    fir, u = made(taps, groups, order, extras, dtype), torch.randn(2, 140, 6, dtype=dtype)
    exact, slack = oracle(fir, u), bound(fir, u)
    assert ((fir(u) - exact).abs() <= slack).all()
    for sizes in ([1] * 140, [5, 1, 1, 130, 3], [129, 11]):
        past, clock, pieces = fir.init(2, 140), 0, []
        for n in sizes:
            pieces.append(fir.extend(past, u[:, clock : clock + n], Moment(clock)))
            clock += n
        assert ((torch.cat(pieces, dim=1) - exact).abs() <= slack).all()


@pytest.mark.parametrize("taps", [3, 7])
def test_every_prompt_length(taps: int) -> None:
    """Shorter than the taps too: a prompt at once, then single steps."""
    fir, u = made(taps, 2, "cross-correlation", True, torch.float64), torch.randn(1, 20, 6, dtype=torch.float64)
    exact, slack = oracle(fir, u), bound(fir, u)
    for prompt in range(1, 13):
        past = fir.init(1, 20)
        pieces = [fir.extend(past, u[:, :prompt], Moment(0))]
        pieces += [fir.extend(past, u[:, t : t + 1], Moment(t)) for t in range(prompt, 20)]
        assert ((torch.cat(pieces, dim=1) - exact).abs() <= slack).all()


@pytest.mark.parametrize(
    ("order", "expected"), [("cross-correlation", [1.5, 12.5, 123.5]), ("convolution", [100.5, 210.5, 321.5])]
)
def test_which_weight_is_the_newest(order: str, expected: list[float]) -> None:
    fir = FIR(1, 3, order=order).requires_grad_(False)  # type: ignore[arg-type]
    fir.weight.copy_(torch.tensor([[[100.0, 10.0, 1.0]]]))
    fir.bias.fill_(0.5)  # type: ignore[union-attr]
    assert fir(torch.tensor([[[1.0], [2.0], [3.0]]])).flatten().tolist() == expected


def test_bad_arguments_are_named() -> None:
    with pytest.raises(FilterError, match="4 groups of filters for 6 channels; expected a divisor"):
        FIR(6, 3, groups=4)
    with pytest.raises(FilterError, match="taps is 0; expected at least 1"):
        FIR(6, 0)
    with pytest.raises(FilterError, match="order is 'newest'; expected"):
        FIR(6, 3, order="newest")  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [1, 2, 7])
def test_a_shift_state_space_is_its_state_moved_on(order):
    """s[t] = (0, s[t-1][:-1]) + B u[t], z[t] = C . s[t] + skip u[t], in chunks of every size."""
    mixer = ShiftSSM(3, order).double().requires_grad_(False)
    for p in mixer.parameters():
        torch.nn.init.normal_(p)
    u, state = torch.randn(2, 20, 3, dtype=torch.float64), torch.zeros(2, 3, order, dtype=torch.float64)
    expected = torch.zeros_like(u)
    for t in range(20):
        state = torch.cat([torch.zeros(2, 3, 1), state[..., :-1]], -1) + mixer.filter.B * u[:, t, :, None]
        expected[:, t] = (state * mixer.filter.C).sum(-1) + mixer.skip * u[:, t]
    assert (mixer(u) - expected).abs().max() <= 1e-12
    for sizes in ([1] * 20, [3, 1, 9, 7], [20]):
        past, at, pieces = mixer.init(2, 20), 0, []
        for n in sizes:
            pieces.append(mixer.extend(past, u[:, at : at + n], Moment(at)))
            at += n
        assert (torch.cat(pieces, 1) - expected).abs().max() <= 1e-12
    impulse = torch.zeros(1, 20, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    taps = (mixer(impulse) - mixer.skip * impulse)[0].T
    for start, n in ((0, 20), (3, 2), (order, 4), (1, 0)):
        assert torch.allclose(mixer.filter.taps(n, start), taps[:, start : start + n], atol=1e-12)
        assert torch.allclose(mixer.filter.taps(n, start, slice(1, 3)), taps[1:3, start : start + n], atol=1e-12)


def test_a_shift_state_space_follows_its_parameters():
    mixer = ShiftSSM(2, 3).requires_grad_(False)
    x, at = torch.randn(1, 1, 2), Moment(0)
    before = mixer.extend(mixer.init(1, 4), x, at)
    mixer.filter.C.mul_(2)
    after = mixer.extend(mixer.init(1, 4), x, at)
    assert torch.allclose(after - mixer.skip * x, 2 * (before - mixer.skip * x))
