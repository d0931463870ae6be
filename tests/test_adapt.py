"""Modules that use none of the library's classes: adapted they give the tokens of a full recompute, or are refused."""

from __future__ import annotations

import sys
import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import flash_inference as fi
from flash_inference.engine import decode
from flash_inference.errors import FilterError, FlashInferenceError, LengthError, ModelError, ShapeError, TokenError
from flash_inference.testing import greedy_differences
from flash_inference.tiling import Prompted, Relaxed, Separated, Spread

HERE = sys.modules[__name__]
LENGTH, VOCAB, WIDTH = 300, 48, 8


def fftconv(u: Tensor, k: Tensor, gain: Tensor) -> Tensor:
    """u [B, D, L], k [D, L]: causal convolution by FFT, as many models have it."""
    n = 2 * u.shape[-1]
    z = torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(k, n=n), n=n)[..., : u.shape[-1]]
    return z + gain[:, None] * u


class Outsider(nn.Module):
    """x + gate * long(short(x)), in two layers that differ in width."""

    def __init__(self, width: int, kernel: int = 3, padding: int = 2) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * width)
        self.short = nn.Conv1d(2 * width, 2 * width, kernel, padding=padding, groups=2 * width)
        self.long, self.outer = Long(width), nn.Linear(width, WIDTH)
        nn.init.normal_(self.inner.weight)
        nn.init.normal_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        u = self.short(self.inner(self.norm(x)).transpose(1, 2))[..., : x.shape[1]]
        gate, v = u.chunk(2, dim=1)
        return x + self.outer((gate * self.long(v)).transpose(1, 2))


class Long(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(2 * torch.randn(1, width, LENGTH) / LENGTH**0.5)
        self.gain = nn.Parameter(torch.randn(width))

    def taps(self, n: int) -> Tensor:
        return self.kernel[0, :, :n]

    def forward(self, u: Tensor) -> Tensor:
        return fftconv(u, self.taps(u.shape[-1]), self.gain)


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(layers or (Outsider(6), Outsider(9)))
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB)
        nn.init.normal_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x + self.mlp(x))


LONG = fi.LongPart(taps=lambda long: long.kernel[0], skip="gain", layout="BDL")
PARTS = {"layers.*.long": LONG, "layers.*.short": fi.ShortPart()}
BY_FUNCTION = {(HERE, "fftconv"): fi.LongPart(taps=1, skip=2, layout="BDL"), "layers.*.short": fi.ShortPart()}


def ready(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def recomputed(model: nn.Module, prompt: Tensor, new: Tensor) -> bool:
    """Whether greedy tokens are those of the full forward over what was generated, ties aside."""
    unexcused, ties = greedy_differences(model, prompt, new)
    return not unexcused and len(ties) <= 2


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return ready(Model())


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("parts", [PARTS, BY_FUNCTION], ids=["submodules", "function"])
def test_greedy_tokens_are_those_of_a_full_recompute(model: nn.Module, prompt: Tensor, parts: dict) -> None:
    fast = fi.adapt(model, parts, length=LENGTH)
    new = fast.generate(prompt, max_new_tokens=256)
    assert len(new.unique()) > 5
    assert recomputed(model, prompt, new)
    assert HERE.fftconv is alias
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("prompt", [1, 2, 3, 40, 257])
def test_prompts_of_every_length(model: nn.Module, prompt: int) -> None:
    model = ready(Model().double())
    fast, given = fi.adapt(model, PARTS, length=LENGTH), torch.randint(VOCAB, (1, prompt))
    new = fast.generate(given, max_new_tokens=40)
    assert recomputed(model, given, new)


@pytest.mark.parametrize("tiling", [Relaxed(149), Spread(Separated(149, 32, 16), 16)], ids=repr)
def test_any_split_under_any_tiling(tiling) -> None:
    model = ready(Model().double())
    fast, tokens = fi.adapt(model, PARTS, length=LENGTH), torch.randint(VOCAB, (3, 159))
    state = fast.init(3, Prompted(tiling, 10))
    pieces = [fast.extend(state, piece, every=True) for piece in tokens.split([10, 1, 1, 1, 30, 50, 1, 65], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=1e-9)
    for item in fast.due(state):
        fast.pay(state, item)
    assert state.clock == 159


@pytest.mark.parametrize("beside", [True, False])
def test_tiles_are_paid_on_a_second_core_too(prompt: Tensor, beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "cores", lambda: 1 + beside)
    model = ready(Model(Outsider(200)))
    fast, tiling = fi.adapt(model, PARTS, length=LENGTH), Spread(Separated(LENGTH, 32, 16), 16)
    assert recomputed(model, prompt, fast.generate(prompt, max_new_tokens=200, tiling=tiling))


def test_sampling_is_shared(model: nn.Module, prompt: Tensor) -> None:
    fast, settings = fi.adapt(model, PARTS, length=LENGTH), {"temperature": 0.8, "top_k": 5, "seed": 4}
    first = fast.generate(prompt, max_new_tokens=20, **settings)
    assert (torch.stack(list(fast.stream(prompt, max_new_tokens=20, **settings)), 1) == first).all()
    assert set(fast.generate(prompt, max_new_tokens=20, allowed=[3, 4]).flatten().tolist()) <= {3, 4}
    stop = int(first[0, 4])
    stopped = fast.generate(prompt[:1], max_new_tokens=20, stop_tokens=[stop], **settings)
    assert stopped[0].tolist() == first[0, : first[0].tolist().index(stop) + 1].tolist()


class Output(NamedTuple):
    logits: Tensor
    hidden: None = None


@pytest.mark.parametrize("wrap", [lambda x: (x, 1), lambda x: {"logits": x}, Output], ids=["tuple", "dict", "object"])
def test_forwards_that_return_more(wrap, prompt: Tensor) -> None:
    class Wrapped(Model):
        def forward(self, tokens: Tensor):
            return wrap(super().forward(tokens))

    model = ready(Wrapped())
    new = fi.adapt(model, PARTS, length=LENGTH).generate(prompt, max_new_tokens=10)
    for n in range(10):
        whole = model(torch.cat([prompt, new[:, :n]], 1))
        logits = whole["logits"] if isinstance(whole, dict) else whole[0]
        assert (logits[:, -1].argmax(-1) == new[:, n]).all()


class Positioned(Model):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(LENGTH, WIDTH)

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        ids = torch.arange(tokens.shape[1])[None] if position_ids is None else position_ids
        x = self.embedding(tokens) + self.places(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x + self.mlp(x))


def test_positions_are_passed(prompt: Tensor) -> None:
    model = ready(Positioned())
    with pytest.raises(ModelError, match=r"'layers.0.norm'.*inputs differ already.*positions="):
        fi.adapt(model, PARTS, length=LENGTH)
    new = fi.adapt(model, PARTS, length=LENGTH, positions="position_ids").generate(prompt, max_new_tokens=60)
    assert recomputed(model, prompt, new)


class Padded(nn.Module):
    """A convolution whose caller pads, one whose end is cut off by its width, and an average over four positions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(WIDTH, WIDTH, 4), nn.Conv1d(WIDTH, WIDTH, 3, dilation=2, padding=4)
        self.mean, self.long = Mean(), Long(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        u = self.one(nn.functional.pad(x.transpose(1, 2), (3, 0)))
        u = self.two(u)[..., :-4]
        return x + self.mean(self.long(u).transpose(1, 2))


class Mean(nn.Module):
    """Of a position and up to three before it, then a tanh: no zeros count at the beginning."""

    def forward(self, x: Tensor) -> Tensor:
        total = sum(nn.functional.pad(x, (0, 0, lag, 0))[:, : x.shape[1]] for lag in range(4))
        return torch.tanh(total) / torch.arange(1, x.shape[1] + 1).clamp(max=4)[:, None]


@pytest.mark.parametrize("length", [1, 2, 3, 30])
def test_short_parts_of_every_padding(length: int) -> None:
    model = ready(Model(Padded()).double())
    parts = {"layers.0.long": LONG, "layers.0.one": fi.ShortPart(), "layers.0.two": fi.ShortPart()}
    parts["layers.0.mean"] = fi.ShortPart(reach=3, layout="BLD")
    fast, tokens = fi.adapt(model, parts, length=LENGTH), torch.randint(VOCAB, (2, 60))
    state = fast.init(2, Relaxed(60))
    pieces = [fast.extend(state, piece, every=True) for piece in tokens.split([length, *[1] * 10, 50 - length], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=1e-9)


def test_one_module_called_twice() -> None:
    shared = Outsider(6)
    model = ready(Model(shared, shared).double())
    fast = fi.adapt(model, {"layers.0.*g": LONG, "layers.0.short": fi.ShortPart()}, length=60)
    tokens = torch.randint(VOCAB, (1, 60))
    state = fast.init(1, Relaxed(60))
    pieces = [fast.extend(state, piece, every=True) for piece in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=1e-9)


class Backwards(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.pad(x, (0, 0, 0, 1))[:, 1:]


class TimeNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True)


class LengthFilter(Long):
    """Taps that are normalised over the length at hand."""

    def taps(self, n: int) -> Tensor:
        return super().taps(n) / super().taps(n).norm(dim=1, keepdim=True)


alias = fftconv


class Other(Long):
    """Calls the function by another name."""

    def forward(self, u: Tensor) -> Tensor:
        return alias(u, self.taps(u.shape[-1]), self.gain)


class TwoSided(Long):
    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u) + super().forward(u.flip(-1)).flip(-1)


class Averaging(nn.Module):
    """A running mean over all that came before: causal, and no convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def with_long(long: nn.Module) -> Model:
    model = Model()
    model.layers[1].long = long
    return model


NO_SHORT = {"layers.*.long": LONG, "layers.0.short": fi.ShortPart()}
NO_SKIP = PARTS | {"layers.*.long": fi.LongPart(LONG.taps, layout="BDL")}
HIDDEN = {"layers.0.long": LONG, "layers.1.long": NO_SKIP["layers.*.long"], "layers.*.short": fi.ShortPart()}
REVERSED = PARTS | {"layers.*.long": fi.LongPart(lambda long: long.kernel[0].flip(1), "gain", "BDL")}
WRONG = {
    "forgotten convolution": (Model, NO_SHORT, ModelError, r"'layers.1.short'.*same inputs.*no part names it"),
    "forgotten long part": (
        Model,
        {"layers.0.long": LONG, "layers.*.short": fi.ShortPart()},
        ModelError,
        r"'layers.1.long'.*no part names it. Name it as a LongPart",
    ),
    "forgotten function": (
        lambda: with_long(Other(9)), BY_FUNCTION, ModelError, r"'layers.1.long'.*same inputs.*no part names it"
    ),
    "anti-causal": (lambda: Model(Outsider(6), Backwards()), PARTS, ModelError, r"'layers.1'.*looks ahead"),
    "bidirectional": (lambda: with_long(TwoSided(9)), PARTS, ModelError, r"'layers.1.long'.*looks ahead"),
    "length at hand": (lambda: with_long(LengthFilter(9)), PARTS, ModelError, r"'layers.1.long'.*depends on the len"),
    "norm over time": (lambda: Model(Outsider(6), TimeNorm()), PARTS, ModelError, r"'layers.1'.*a norm over time"),
    "running mean": (lambda: Model(Outsider(6), Averaging()), PARTS, ModelError, r"'layers.1'.*mixes positions"),
    "no skip": (Model, NO_SKIP, ModelError, r"'layers.0.long'.*named a LongPart.*whether skip"),
    "reversed taps": (Model, REVERSED, ModelError, r"'layers.0.long'.*lag 0 first"),
    "wrong layout": (
        Model,
        PARTS | {"layers.*.long": fi.LongPart(LONG.taps, "gain", "BLD")},
        ShapeError,
        r"layers.0.long got .* 6 channels; expected BLD. Name the other layout=",
    ),
    "transposed taps": (
        Model,
        PARTS | {"layers.*.long": fi.LongPart(lambda long: long.kernel[0].T, layout="BDL")},
        ShapeError,
        r"layers.0.long .* 300 channels; .*give taps as \[D, taps\]",
    ),
    "two axes": (Model, PARTS | {"layers.*.long": fi.LongPart("gain")}, FilterError, r"0.long: taps are .*\(6,\)"),
    "no such filter": (Model, PARTS | {"layers.*.long": fi.LongPart("rho")}, ModelError, "taps='rho' finds nothing"),
    "no submodule": (Model, {"layer.*.long": LONG}, ModelError, "Did you mean 'layers.[01].long'"),
    "no long part": (Model, {"layers.*.short": fi.ShortPart()}, ModelError, "no part is a LongPart"),
    "attention": (Model, PARTS | {"mlp": "attention"}, ModelError, "'mlp' is a str; expected LongPart or ShortPart"),
    "reach unknown": (Model, PARTS | {"mlp": fi.ShortPart()}, ModelError, "mlp is no nn.Conv1d; say how many"),
    "reach too short": (
        lambda: Model(Padded()),
        {
            "layers.0.long": LONG,
            "layers.0.one": fi.ShortPart(),
            "layers.0.two": fi.ShortPart(),
            "layers.0.mean": fi.ShortPart(1, "BLD"),
        },
        ModelError,
        "'layers.0.mean'.*reads more than `reach`",
    ),
    "symmetric padding": (
        lambda: Model(Outsider(6, 3, 1)), PARTS, ModelError, r"layers.0.short .*padding 1 reads later positions"
    ),
    "never called": (
        Model, PARTS | {(torch.fft, "ihfft"): fi.LongPart(1)}, ModelError, r"torch.fft.ihfft\(\).*does not call it"
    ),
    "no such function": (Model, PARTS | {(HERE, "conv"): fi.LongPart(1)}, ModelError, "no function 'conv'"),
    "training mode": (lambda: Model().train(), PARTS, ModelError, r"training mode.*eval\(\)"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "parts", "error", "says"), WRONG.values(), ids=WRONG.keys())
def test_wrong_declarations_are_refused_by_name(make, parts: dict, error: type, says: str) -> None:
    model = make()
    if "training" not in says:
        ready(model)
    with pytest.raises(error, match=f"(?s){says}"):
        fi.adapt(model, parts, length=LENGTH)
    assert HERE.fftconv is alias
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("make", [lambda: fi.LongPart("k", layout="LBD"), lambda: fi.ShortPart(-1)])
def test_parts_are_checked(make) -> None:
    with pytest.raises(ModelError, match="expected"):
        make()


def test_runs_that_do_not_fit_are_refused(model: nn.Module, prompt: Tensor) -> None:
    fast = fi.adapt(model, PARTS, length=LENGTH)
    with pytest.raises(LengthError, match=r"11 prompt tokens \+ 290 new tokens.*at most 300"):
        fast.stream(prompt, max_new_tokens=290)
    with pytest.raises(TokenError, match=r"expected 0 .. 47"):
        fast.generate([[0, VOCAB]], max_new_tokens=1)
    with pytest.raises(TokenError, match=r"expected ids \[B, P\]"):
        fast.generate([], max_new_tokens=1)
    with pytest.raises(FlashInferenceError, match="temperature"):
        fast.generate(prompt, max_new_tokens=1, temperature=-1.0)


def test_weights_that_hide_a_difference_are_no_proof() -> None:
    model = ready(Model())
    model.layers[1].outer.weight.zero_()
    with pytest.raises(ModelError, match=r"'layers.1.long'.*whether skip"):
        fi.adapt(model, HIDDEN, length=LENGTH)
    model.layers[0].outer.weight.zero_()
    with pytest.raises(ModelError, match=r"do not depend on earlier inputs.*[Ll]oad or train"):
        fi.adapt(model, PARTS, length=LENGTH)


def test_weights_that_changed_are_noticed(prompt: Tensor) -> None:
    model = ready(Model())
    fast = fi.adapt(model, PARTS, length=LENGTH)
    model.layers[0].long.gain += 1
    with pytest.raises(ModelError, match=r"changed after it was adapted.*adapt again"):
        fast.generate(prompt, max_new_tokens=2)
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        fi.adapt(model, PARTS, length=LENGTH)


def test_an_error_in_a_step_leaves_the_originals(model: nn.Module) -> None:
    fast = fi.adapt(model, BY_FUNCTION, length=LENGTH)
    state = fast.init(1, Relaxed(20))
    with pytest.raises(IndexError):
        fast.extend(state, torch.tensor([[VOCAB + 1]]))
    assert HERE.fftconv is alias
    assert not any("forward" in vars(module) for module in model.modules())
    assert state.clock == 0


def test_other_threads_reach_the_original_function(model: nn.Module, prompt: Tensor) -> None:
    fast, u, k = fi.adapt(model, BY_FUNCTION, length=LENGTH), torch.randn(1, 4, 9), torch.randn(4, 9)
    own, stop, wrong = fftconv(u, k, k[:, 0]), threading.Event(), []

    def other() -> None:
        while not stop.is_set():
            if not torch.equal(HERE.fftconv(u, k, k[:, 0]), own):
                wrong.append(1)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        new = fast.generate(prompt, max_new_tokens=60)
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert recomputed(model, prompt, new)


def test_two_adapted_models_at_once(model: nn.Module, prompt: Tensor) -> None:
    fast = [fi.adapt(model, BY_FUNCTION, length=LENGTH), fi.adapt(ready(Model()), BY_FUNCTION, length=LENGTH)]
    alone = [one.generate(prompt, max_new_tokens=30) for one in fast]
    streams = [one.stream(prompt, max_new_tokens=30) for one in fast]
    both = list(zip(*streams, strict=True))
    for own, together in zip(alone, zip(*both, strict=True), strict=True):
        assert (torch.stack(together, dim=1) == own).all()


class Narrow(Long):
    """Transforms in float32, whatever the dtype."""

    def forward(self, u: Tensor) -> Tensor:
        return fftconv(u.float(), self.taps(u.shape[-1]).float(), self.gain.float()).to(u.dtype)


def test_modules_that_compute_in_float32_are_held_to_its_rounding(prompt: Tensor) -> None:
    model = ready(with_long(Narrow(9)))
    fast = fi.adapt(model, PARTS, length=LENGTH)
    assert fast.tolerance == 4 * 256 * torch.finfo(torch.float32).eps
    assert fi.adapt(ready(Model()), PARTS, length=LENGTH).tolerance == 1e-9
    assert recomputed(model, prompt, fast.generate(prompt, max_new_tokens=60))
    with pytest.raises(ModelError, match=r"'layers.0.long'"):
        fi.adapt(model, NO_SKIP, length=LENGTH)


class Real(nn.Module):
    """Real inputs [B, L, 1] to three outputs a position."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.long, self.outer = nn.Linear(1, 4), Long(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.long(self.inner(x).transpose(1, 2)).transpose(1, 2)))


def test_real_inputs_need_an_example() -> None:
    model, x = ready(Real().double()), torch.randn(2, 90, 1, dtype=torch.float64)
    with pytest.raises(ModelError, match=r"no nn.Embedding.*example= \[B, 80, ..\]"):
        fi.adapt(model, {"long": LONG}, length=80)
    with pytest.raises(LengthError, match="L >= 95"):
        fi.adapt(model, {"long": LONG}, length=95, example=x)
    fast = fi.adapt(model, {"long": LONG}, length=90, example=x)
    state = fast.init(2, Relaxed(90))
    pieces = [fast.extend(state, piece, every=True) for piece in x.split([1, 1, 40, 1, 47], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(x), rtol=0, atol=1e-9)
