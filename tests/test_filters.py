"""Filters: every tap against a direct float64 transcription of its formula, in any pieces, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flash_inference import FilterConfig, HyenaConfig
from flash_inference.errors import FilterError, LengthError, ShapeError
from flash_inference.filters import (
    FILTERS,
    DiagonalFilter,
    ExplicitFilter,
    Filter,
    ImplicitFilter,
    MultiscaleFilter,
    RelativePositionFilter,
    SharedFilter,
    ShiftFilter,
    SpectralBank,
    SpectralFilter,
    SquashedFilter,
    hankel_matrix,
    spectral_basis,
)
from flash_inference.mixers import LongConv
from flash_inference.ops.tile_conv import PreparedFilter
from flash_inference.testing import causal_conv_oracle, implicit_filter_oracle

EXACT = 1e-9
C, L = 4, 97

MAKERS: dict[str, Callable[[], Filter]] = {
    "explicit": lambda: ExplicitFilter(C, L),
    "implicit": lambda: ImplicitFilter(C, L, width=6),
    "implicit-stored": lambda: ImplicitFilter(C, L, width=6, positions="stored"),
    "implicit-random-features": lambda: ImplicitFilter(C, L, width=6, features=4, positions="stored"),
    "squashed": lambda: SquashedFilter(C, L),
    "squashed-smoothed": lambda: SquashedFilter(C, L, window=7),
    "multiscale": lambda: MultiscaleFilter(C, L, points=8, decay=(1.5, 2.5)),
    "multiscale-nearest": lambda: MultiscaleFilter(C, L, points=5, first=1, interpolation="nearest"),
    "multiscale-sum": lambda: MultiscaleFilter(C, L, points=8, arrangement="sum"),
    "multiscale-short": lambda: MultiscaleFilter(C, L, points=8, pieces=3),
    "relative": lambda: RelativePositionFilter(C, L, width=8),
    "relative-learned": lambda: RelativePositionFilter(
        C,
        L,
        width=8,
        layers=2,
        norm="layernorm",
        activation="silu",
        connection="residual",
        decay="learned",
        final="elu",
    ),
    "relative-endless": lambda: RelativePositionFilter(C, L, width=8, layers=0, decay="none"),
    "spectral": lambda: SpectralFilter(C, L, count=5),
    "spectral-L": lambda: SpectralFilter(C, L, count=5, hankel="L"),
    "shift": lambda: ShiftFilter(C, L, order=5),
    "diagonal": lambda: DiagonalFilter(C, L, modes=3, copies=2),
    "bank": lambda: SpectralBank(L, count=2),
    "bank-L": lambda: SpectralBank(L, count=4, hankel="L"),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def randomised(filter: nn.Module, scale: float = 0.5) -> nn.Module:
    """The filter in float64 with fresh numbers in every trained parameter: no test rests on an initial zero."""
    with torch.no_grad():
        for parameter in filter.double().parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * scale)
    return filter


def numbers(filter: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy() for name, tensor in filter.state_dict().items()}


def close(got: Tensor, expected: np.ndarray | Tensor) -> None:
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= EXACT * max(1.0, float(expected.abs().max()))


# ----------------------------------------------------------------------------------------------------- what all obey


@makers
def test_pieces_are_the_whole(make: Callable[[], Filter]) -> None:
    filter = randomised(make())
    assert isinstance(filter, Filter)
    whole = filter.taps(L).detach()
    assert whole.shape == (C, L)
    assert whole.dtype == torch.float64
    for n in (1, 2, 3, 8, 50, 96, 97):
        close(filter.taps(n), whole[:, :n])
        close(filter.taps(97 - n, start=n), whole[:, n:]) if n < 97 else None
        close(filter.taps(min(n, 90), 7, slice(1, 3)), whole[1:3, 7 : 7 + n])
    close(filter.taps(L, channels=slice(None, None, 2)), whole[::2])


@makers
def test_float32_taps_are_the_float64_ones(make: Callable[[], Filter]) -> None:
    """In float32 from float32 weights: as the float64 taps of the same numbers, but for rounding."""
    filter = make().float()
    single = filter.taps(L)
    assert single.dtype == torch.float32
    double = filter.double().taps(L)
    assert (single - double).abs().max() <= 1e-4 * double.abs().max()


@pytest.mark.parametrize("make", [MAKERS[name] for name in MAKERS if name != "explicit"], ids=list(MAKERS)[1:])
def test_taps_of_bfloat16_weights_are_float32(make: Callable[[], Filter]) -> None:
    filter = make().bfloat16()
    if getattr(filter, "z", None) is not None:
        with pytest.raises(FilterError, match=r"stored positions are torch.bfloat16; expected float32 .* filter.float"):
            filter.taps(3)
        return
    low = filter.taps(L)
    assert low.dtype == torch.float32
    assert torch.equal(low, filter.float().taps(L))


@makers
def test_gradients(make: Callable[[], Filter]) -> None:
    filter = randomised(make())
    trained = [p for p in filter.parameters() if p.requires_grad]
    if isinstance(filter, SpectralBank):
        assert not trained
        return

    names = [f"filter.{name}" for name, parameter in filter.named_parameters() if parameter.requires_grad]

    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = filter

        def forward(self) -> Tensor:
            return self.filter.taps(7, 3)

    def taps(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(Taps(), dict(zip(names, parameters, strict=True)), ())

    assert torch.autograd.gradcheck(taps, tuple(p.detach().clone().requires_grad_() for p in trained))


@makers
def test_state_round_trips(make: Callable[[], Filter]) -> None:
    filter, other = randomised(make()), make().double()
    other.load_state_dict(filter.state_dict())
    assert torch.equal(other.taps(L), filter.taps(L))


@pytest.mark.parametrize("kind", FILTERS)
def test_every_kind_makes_a_layer_that_extends_as_it_forwards(kind: str) -> None:
    from flash_inference.tiling import Blocked

    conv = LongConv(3, 80, filter=randomised(FILTERS[kind](3, 80)), skip=True).double()
    y = torch.randn(2, 80, 3, dtype=torch.float64)
    state = conv.init(2, Blocked(80, 8))
    got = torch.cat([conv.extend(state, part) for part in (y[:, :13], *y[:, 13:].split(1, dim=1))], dim=1)
    expected = causal_conv_oracle(y, conv.filter.taps(80)) + conv.skip.detach() * y
    close(got, expected)
    close(conv(y).detach(), expected)


def test_a_shared_filter_repeats_anothers_taps() -> None:
    inner = randomised(ExplicitFilter(3, 20))
    shared = SharedFilter(inner, 4)
    assert isinstance(shared, Filter)
    assert (shared.channels, shared.length) == (12, 20)
    for start, n, channels in ((0, 20, slice(None)), (3, 5, slice(2, 9)), (19, 1, slice(0, 0))):
        expected = torch.stack([inner.rho[c // 4, start : start + n] for c in range(12)])[channels]
        assert torch.equal(shared.taps(n, start, channels), expected)


# ---------------------------------------------------------------------------------------------------------- implicit


@pytest.mark.parametrize("shift", [0.0, 0.05])
@pytest.mark.parametrize("features", [3, 4, 5, 33])
@pytest.mark.parametrize("length", [1, 2, 97])
def test_stored_positions(length: int, features: int, shift: float) -> None:
    filter = randomised(ImplicitFilter(3, length, width=6, features=features, shift=shift, positions="stored"))
    with torch.no_grad():
        filter.t.copy_(torch.rand(length))
        filter.deltas.copy_(torch.randn(3))
    w = numbers(filter)
    expected = np.zeros((3, length))
    for k in range(length):
        h = w["z"][k]
        for i in range(3):
            h = np.sin(w["freq"] * (w[f"linears.{i}.weight"] @ h + w[f"linears.{i}.bias"]))
        expected[:, k] = (w["out.weight"] @ h) * (np.exp(-w["t"][k] * np.abs(w["deltas"])) + shift)
    close(filter.taps(length), expected)


def test_stored_positions_begin_as_the_rebuilt_ones() -> None:
    stored = ImplicitFilter(3, L, positions="stored").double()
    config = HyenaConfig(vocab_size=8, width=3, layers=1, length=L, filter=FilterConfig())
    state = {name: tensor for name, tensor in stored.state_dict().items() if name not in ("z", "t")}
    # z and t were made in float32: one rounding of each, amplified by frequency 10 through three layers.
    assert (stored.taps(L) - implicit_filter_oracle(state, config, L)).abs().max() <= 1e-4
    assert stored.z.shape == (L, 5)
    assert stored.z.requires_grad
    assert stored.t.shape == (L,)
    assert not stored.t.requires_grad


def test_rebuilt_positions_are_not_in_the_state() -> None:
    names = set(ImplicitFilter(3, L).state_dict())
    assert names == {
        "freq",
        "deltas",
        "out.weight",
        *(f"linears.{i}.{p}" for i in range(3) for p in ("weight", "bias")),
    }


# ---------------------------------------------------------------------------------------------------------- squashed


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_squashed_taps(length: int, window: int) -> None:
    filter = randomised(SquashedFilter(3, length, threshold=0.3, window=window), 1.0)
    kernel, half = numbers(filter)["kernel"], window // 2
    expected = np.zeros((3, length))
    for c in range(3):
        for k in range(length):
            m = sum(kernel[c, i] for i in range(k - half, k + half + 1) if 0 <= i < length) / window
            expected[c, k] = math.copysign(max(abs(m) - 0.3, 0.0), m)
    close(filter.taps(length), expected)
    assert 0 < (filter.taps(length) == 0).sum() < 3 * length or length < 3


# -------------------------------------------------------------------------------------------------------- multiscale


@pytest.mark.parametrize("arrangement", ["cat", "sum"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize(("points", "first", "length"), [(8, 0, 97), (8, 0, 8), (5, 0, 3), (3, 2, 50), (1, 0, 9)])
def test_multiscale_taps(points: int, first: int, length: int, interpolation: str, arrangement: str) -> None:
    """Each piece stretched by torch's interpolation, laid out, divided by the norm; zero where nothing reaches."""
    filter = randomised(
        MultiscaleFilter(3, length, points=points, first=first, arrangement=arrangement, interpolation=interpolation)
    )
    with torch.no_grad():
        filter.multiplier.copy_(torch.rand(3) + 1)
        filter.norm.copy_(torch.rand(3) + 1)
    pieces, m = [piece.detach() for piece in filter.pieces], filter.multiplier
    count = len(pieces)
    assert count == max(1 + math.ceil(math.log2(length / points)) - first, 1)
    total = torch.zeros(3, points * 2 ** (count - 1 + first) + length, dtype=torch.float64)
    at = 0
    for i, piece in enumerate(pieces):
        scale = 2 ** (first + (i if arrangement == "sum" else max(i - 1, 0)))
        decayed = (piece * m[:, None] ** (count - 1 - i))[None]
        part = nn.functional.interpolate(decayed, scale_factor=scale, mode=interpolation)[0]
        total[:, at : at + part.shape[1]] += part
        at += part.shape[1] if arrangement == "cat" else 0
    close(filter.taps(length), total[:, :length] / filter.norm[:, None])
    far = filter.reach + 3
    close(filter.taps(far), nn.functional.pad(total, (0, far))[:, :far] / filter.norm[:, None])


def test_multiscale_norm_is_stored() -> None:
    filter = MultiscaleFilter(3, 60, points=8).double()
    filter.renormalise()
    close(filter.taps(filter.reach).norm(dim=1), torch.ones(3, dtype=torch.float64))
    before = filter.taps(60).detach()
    with torch.no_grad():
        for piece in filter.pieces:
            piece.mul_(2)
    close(filter.taps(60), 2 * before)
    filter.renormalise()
    close(filter.taps(60), before)


# ---------------------------------------------------------------------------------------------------------- relative

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "elu": lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "exp": np.exp,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["simplermsnorm", "layernorm"])
@pytest.mark.parametrize("connection", ["plain", "residual"])
@pytest.mark.parametrize("decay", ["none", "fixed", "learned"])
def test_relative_taps(activation: str, norm: str, connection: str, decay: str) -> None:
    final, length = {"relu": "exp", "silu": "sigmoid"}.get(activation, "none"), 23
    filter = RelativePositionFilter(
        3, length, width=6, layers=2, activation=activation, norm=norm, connection=connection, decay=decay, final=final
    )
    w = numbers(randomised(filter))
    gamma = np.ones(3)
    if decay != "none":
        gamma = w["gamma"] if decay == "fixed" else 0.99 + 0.01 / (1 + np.exp(-w["gamma"]))

    def normed(x: np.ndarray, i: int) -> np.ndarray:
        if norm == "simplermsnorm":
            return x / (math.sqrt((x**2).sum()) / math.sqrt(6) + 1e-8)
        centred = x - x.mean()
        return centred / np.sqrt((centred**2).mean() + 1e-5) * w[f"norms.{i}.weight"] + w[f"norms.{i}.bias"]

    expected = np.zeros((3, length))
    for k in range(length):
        x = w["embed.weight"][:, 0] * k + w["embed.bias"]
        for i in range(2):
            y = w[f"linears.{i}.weight"] @ ACTIVATIONS[activation](normed(x, i)) + w[f"linears.{i}.bias"]
            x = x + y if connection == "residual" else y
        f = w["out.weight"] @ ACTIVATIONS[activation](normed(x, 2)) + w["out.bias"]
        expected[:, k] = ACTIVATIONS[final](gamma**k * f)
    close(filter.taps(length), expected)


# ---------------------------------------------------------------------------------------------------------- spectral


@pytest.mark.parametrize("hankel", ["Z", "L"])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_hankel_matrix(length: int, hankel: str) -> None:
    expected = np.zeros((length, length))
    for i in range(1, length + 1):
        for j in range(1, length + 1):
            s = i + j
            even = 16.0 if s % 2 == 0 else 0.0
            expected[i - 1, j - 1] = 2 / (s**3 - s) if hankel == "Z" else even / ((s + 3) * (s - 1) * (s + 1))
    close(hankel_matrix(length, hankel), expected)


@pytest.mark.parametrize("hankel", ["Z", "L"])
def test_spectral_basis(hankel: str) -> None:
    """Columns are orthogonal eigenvectors of norm sigma^(1/4), the largest last, and are numpy's but for signs."""
    phi, matrix = spectral_basis(64, 6, hankel), hankel_matrix(64, hankel)
    assert phi.dtype == torch.float64
    sigma = phi.norm(dim=0) ** 4
    assert (sigma.diff() > 0).all()
    close(matrix @ phi, phi * sigma)
    values, vectors = np.linalg.eigh(matrix.numpy())
    close(sigma, values[-6:])
    close(phi.abs(), np.abs(vectors[:, -6:] * values[-6:] ** 0.25))


@pytest.mark.parametrize("length", [1, 2, 50])
def test_an_approximate_stu_is_one_filter(length: int) -> None:
    """plus + minus branch, each a convolution of its own: y = k * u + sign (k * (sign u)), k = phi M."""
    filter = randomised(SpectralFilter(3, length, count=1 if length == 1 else 2))
    w = numbers(filter)
    k, u = torch.from_numpy(w["phi"] @ w["mixture"]).T, torch.randn(2, length, 3, dtype=torch.float64)
    sign = (1 - 2 * (torch.arange(length) % 2)).double()[:, None]
    both = causal_conv_oracle(u, k) + sign * causal_conv_oracle(sign * u, k)
    close(causal_conv_oracle(u, filter.taps(length)), both)
    assert filter.stride == 2
    assert (filter.taps(length)[:, 1::2] == 0).all()


def test_an_approximate_stu_of_hankel_l_is_its_plus_branch() -> None:
    filter = randomised(SpectralFilter(3, 50, count=4, hankel="L"))
    w = numbers(filter)
    close(filter.taps(50), (w["phi"] @ w["mixture"]).T)
    assert filter.stride == 1


@pytest.mark.parametrize("hankel", ["Z", "L"])
def test_an_exact_stu_is_a_bank_of_filters(hankel: str) -> None:
    """y[t] = sum over k, j of phi[j, k] u[t - j] (M+_k + (-1)^j M-_k), M- absent for hankel L."""
    K, length, width = 3, 20, 4
    bank = SpectralBank(length, count=K, hankel=hankel).double()
    phi, u = numbers(bank)["phi"], np.random.default_rng(1).standard_normal((length, width))
    plus, minus = np.random.default_rng(2).standard_normal((2, K, width, width)) * [
        [[[1.0]]],
        [[[float(hankel == "Z")]]],
    ]
    expected = np.zeros((length, width))
    for t in range(length):
        for j in range(t + 1):
            for k in range(K):
                expected[t] += phi[j, k] * u[t - j] @ (plus[k] + (-1) ** j * minus[k])
    rho = bank.taps(length)
    assert rho.shape[0] == bank.channels == (6 if hankel == "Z" else 3)
    got = np.zeros((length, width))
    for k in range(bank.channels):
        convolved = causal_conv_oracle(torch.from_numpy(u), rho[k].expand(width, length)).numpy()
        got += convolved @ (plus[k] if k < K else minus[k - K])
    close(torch.from_numpy(got), expected)


def test_a_given_phi_is_kept() -> None:
    phi = torch.randn(9, 2, dtype=torch.bfloat16)
    filter = SpectralFilter(3, 9, count=2, phi=phi)
    assert torch.equal(filter.state_dict()["phi"], phi)
    assert filter.taps(9).dtype == torch.float32
    phi.zero_()
    assert filter.phi.abs().sum() > 0


def test_a_strided_filter_prepares_half_its_taps() -> None:
    conv = LongConv(3, 50, filter=SpectralFilter(3, 50, count=4))
    filter = conv.stack().filter
    assert isinstance(filter, PreparedFilter)
    assert (filter.stride, filter.length, filter.rho.shape) == (2, 50, (3, 25))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "make",
    [MAKERS[name] for name in MAKERS if name.startswith(("implicit-", "squashed", "spectral", "bank"))],
)
@pytest.mark.parametrize(("n", "start"), [(98, 0), (1, 97), (50, 48), (3, -1)])
def test_taps_that_are_not_stored(make: Callable[[], Filter], n: int, start: int) -> None:
    with pytest.raises(LengthError, match=rf"taps {start} \.\. {start + n - 1} were .* taps 0 \.\. 96\. Run shorter"):
        make().taps(n, start)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImplicitFilter(3, 9, positions="kept"), r"positions is 'kept'; expected one of 'rebuilt', 'stored'"),
        (lambda: ImplicitFilter(3, 9, features=4), r"features is 4; expected an odd number, .* positions=.stored.\."),
        (lambda: SquashedFilter(3, 9, threshold=-1.0), r"threshold is -1\.0; expected 0 or more"),
        (lambda: SquashedFilter(3, 9, window=4), r"window is 4; expected an odd number of taps"),
        (lambda: MultiscaleFilter(3, 9, arrangement="mix"), r"arrangement is 'mix'; expected one of 'cat', 'sum'"),
        (lambda: MultiscaleFilter(3, 9, interpolation="cubic"), r"interpolation is 'cubic'; expected one of 'linear'"),
        (lambda: MultiscaleFilter(3, 9, points=0), r"points is 0; expected 1 or more"),
        (lambda: MultiscaleFilter(3, 9, pieces=0), r"pieces is 0; expected 1 or more"),
        (lambda: RelativePositionFilter(3, 9, par_type=2), r"par_type is 2; expected one of 1\. .* input's length"),
        (lambda: RelativePositionFilter(3, 9, par_type=3), r"par_type is 3; expected one of 1\."),
        (lambda: RelativePositionFilter(3, 9, normalize=True), r"normalize is True; expected False.* trained without"),
        (
            lambda: RelativePositionFilter(3, 9, activation="tan"),
            r"activation is 'tan'; expected one of 'none', 'relu'",
        ),
        (
            lambda: RelativePositionFilter(3, 9, norm="scalenorm"),
            r"norm is 'scalenorm'; expected one of 'simplermsnorm'",
        ),
        (
            lambda: RelativePositionFilter(3, 9, connection="x"),
            r"connection is 'x'; expected one of 'plain', 'residual'",
        ),
        (lambda: RelativePositionFilter(3, 9, decay="some"), r"decay is 'some'; expected one of 'none', 'fixed'"),
        (lambda: RelativePositionFilter(3, 9, gamma=1.5), r"gamma is 1\.5; expected what .* between 0 and 1"),
        (lambda: SpectralFilter(3, 9, hankel="Q"), r"hankel is 'Q'; expected one of 'Z', 'L'"),
        (lambda: SpectralFilter(3, 9, count=10), r"10 eigenvectors of a 9 x 9 matrix; expected 1 \.\. 9"),
        (lambda: SpectralFilter(3, 60, count=60), r"of the 60 leading eigenvalues are lost in rounding.* pass the phi"),
    ],
)
def test_settings_that_make_no_filter(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(FilterError, match=message):
        make()


def test_a_phi_of_another_shape() -> None:
    with pytest.raises(ShapeError, match=r"phi has shape \(9, 3\); expected \[9, 2\]: positions x eigenvectors"):
        SpectralBank(9, count=2, phi=torch.zeros(9, 3))
