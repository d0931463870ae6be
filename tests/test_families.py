"""What a family may be: mixers with pasts of their own, convolutions of any widths, in any mixture, or none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flash_inference import ExplicitFilter, LanguageModel, generate, load, save, score
from flash_inference.engine.decode import decoder_for
from flash_inference.engine.plan import plan
from flash_inference.engine.verify import verify
from flash_inference.errors import CheckpointError, LengthError, ModelError
from flash_inference.filters import ModalFilter, SpectralFilter
from flash_inference.mixers import FIR, Attention, AttentionConfig, ModalConv, Rotary
from flash_inference.mixers.mixer import Moment
from flash_inference.models.block import Block, BlockPast, Convolutions, common_stride
from flash_inference.models.config import ModelConfig
from flash_inference.models.decoder import Decoder
from flash_inference.models.families import FAMILIES
from flash_inference.models.fused import unfused
from flash_inference.models.hyena import FilterConfig, HyenaBlock, HyenaConfig
from flash_inference.models.snapshot import load_state, save_state
from flash_inference.testing import random_model
from flash_inference.testing.strategies import chunks, tilings
from flash_inference.tiling import Blocked, Relaxed, TwiceRelaxed

EXACT = 1e-10
LENGTH = 120


@dataclass(slots=True)
class LeakyPast:
    total: Tensor


class Leaky(nn.Module):
    """z[t] = sum over i <= t of decay^(t - i) x[i]: a past of one number per channel."""

    decodes: ClassVar[str] = "recurrence"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(width))

    def past_bytes(self, length: int) -> int:
        return self.decay.nbytes

    def init(self, batch: int, length: int) -> LeakyPast:
        return LeakyPast(self.decay.new_zeros(batch, len(self.decay)))

    def forward(self, x: Tensor) -> Tensor:
        lag = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        powers = self.decay ** lag.clamp(min=0)[..., None] * (lag >= 0)[..., None]
        return torch.einsum("tid,bid->btd", powers, x)

    def extend(self, past: LeakyPast, x: Tensor, moment: Moment) -> Tensor:
        outputs = []
        for row in moment.enter(past, x).unbind(1):
            past.total.mul_(self.decay).add_(row)
            outputs.append(past.total.clone())
        return torch.stack(outputs, 1)


@dataclass(slots=True)
class MeanPast:
    seen: Tensor


class Mean(nn.Module):
    """z[t] = mean of x[0 .. t], each row from its own start: a past with room for every position."""

    decodes: ClassVar[str] = "KV cache"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))

    def past_bytes(self, length: int) -> int:
        return length * self.scale.nbytes

    def init(self, batch: int, length: int) -> MeanPast:
        return MeanPast(self.scale.new_zeros(batch, length, len(self.scale)))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.stack([x[:, : t + 1].mean(1) for t in range(x.shape[1])], 1)

    def extend(self, past: MeanPast, x: Tensor, moment: Moment) -> Tensor:
        N, positions = x.shape[1], moment.positions(x.shape[1])
        past.seen[:, moment.clock : moment.clock + N] = moment.enter(past, x)
        sums = [past.seen[:, : moment.clock + n + 1].sum(1) for n in range(N)]
        return self.scale * torch.stack(sums, 1) / (positions + 1).clamp(min=1)[..., None]


class Own(Block):
    """x + out(mixer(x)): a block without a long convolution."""

    def __init__(self, mixer: Any, width: int) -> None:
        super().__init__()
        self.own, self.out = mixer, nn.Linear(width, width)

    @property
    def mixers(self) -> Sequence[Any]:
        return (self.own,)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.own(x)))

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        return x + self.out(torch.tanh(self.own.extend(past.pasts[0], x, past.moment)))


class Wide(Block):
    """Two long convolutions in a chain, wider than the model, with a filter shorter than the sequence."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.inner = 2 * width + 3
        self.up, self.down = nn.Linear(width, self.inner), nn.Linear(self.inner, width)
        self.filter = ExplicitFilter(2 * self.inner, taps)

    @property
    def convolutions(self) -> Sequence[Convolutions]:
        return (Convolutions(self.filter, self.inner),)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (rho.T for rho in self.filter.rho.split(self.inner))
        return x + self.down(self.sums(torch.tanh(self.sums(self.up(x), first)), second))

    def sums(self, y: Tensor, rho: Tensor) -> Tensor:
        reach = range(y.shape[1])
        return torch.stack([sum(y[:, t - k] * rho[k] for k in range(min(t + 1, len(rho)))) for t in reach], 1)

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        return x + self.down(past.mix(1, torch.tanh(past.mix(0, self.up(x)))))


@dataclass(frozen=True, slots=True)
class ToyConfig(ModelConfig):
    """Blocks as `pattern` lists them, one after another."""

    family: ClassVar[str] = "toy"

    pattern: tuple[str, ...] = ("leaky",)

    def blocks(self) -> list[Block]:
        explicit = FilterConfig(kind="explicit")
        hyena = HyenaConfig(self.vocab_size, self.width, 1, self.length, order=3, filter=explicit)
        make = {
            "leaky": lambda: Own(Leaky(self.width), self.width),
            "mean": lambda: Own(Mean(self.width), self.width),
            "modal": lambda: Own(ModalConv(self.width, ModalFilter(self.width, self.length, modes=3)), self.width),
            "fir": lambda: Own(FIR(self.width, 4, order="convolution", skip=True), self.width),
            "cache": lambda: Own(Attention(AttentionConfig(self.width, 2, head_width=4, rotary=Rotary())), self.width),
            "window": lambda: Own(Attention(AttentionConfig(self.width, 1, window=16)), self.width),
            "wide": lambda: Wide(self.width, self.length // 3),
            "hyena": lambda: HyenaBlock(hyena),
        }
        return [make[kind]() for kind in self.pattern]

    def final_norm(self) -> nn.Module:
        return nn.Tanh()


PATTERNS = {
    "mixers-alone": ("leaky", "mean"),
    "among-hyena": ("leaky", "hyena", "mean", "hyena"),
    "widths": ("wide", "hyena", "leaky", "wide"),
    "every-mixer": ("modal", "hyena", "cache", "fir", "window"),
}
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())


def toy(pattern: Sequence[str]) -> LanguageModel:
    """Biases are not zero, so that what enters before a row's start would be seen."""
    generator = torch.Generator().manual_seed(len(pattern))
    config = ToyConfig(31, 5, len(pattern), LENGTH, pattern=tuple(pattern), tied=False)
    model = LanguageModel(config).double().eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if not any(part in name for part in ("rho", "decay", "poles")):
            scale = 1.0 if weight.ndim < 2 else weight.shape[-1] ** -0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    model.embedding.weight.mul_(3)
    return model


MODELS = {pattern: toy(pattern) for pattern in PATTERNS.values()}


@patterns
@settings(max_examples=15)
@given(data=st.data())
def test_any_chunks_are_the_forward(pattern: tuple[str, ...], data: st.DataObject) -> None:
    model, length = MODELS[pattern], data.draw(st.integers(1, LENGTH))
    decoder, tokens = model.decoder(), torch.randint(31, (2, length))
    state, pieces, at = decoder.init(2, data.draw(tilings(length))), [], 0
    for n in data.draw(chunks(length)):
        if data.draw(st.booleans()):
            for tile in decoder.due(state):
                decoder.pay(state, tile)
        pieces.append(decoder.extend(state, tokens[:, at : at + n], every=True))
        at += n
        assert state.clock == at
    assert (torch.cat(pieces, 1) - model(tokens)).abs().max() <= EXACT


@patterns
@settings(max_examples=15)
@given(data=st.data())
def test_rows_begin_at_their_own_clocks(pattern: tuple[str, ...], data: st.DataObject) -> None:
    model, length = MODELS[pattern], data.draw(st.integers(2, 60))
    starts = data.draw(st.lists(st.integers(0, length - 1), min_size=3, max_size=3))
    decoder, tokens = model.decoder(), torch.randint(31, (3, length))
    state, pieces, at = decoder.init(3, Blocked(length, block=4), start=torch.tensor(starts)), [], 0
    for n in data.draw(chunks(length)):
        pieces.append(decoder.extend(state, tokens[:, at : at + n], every=True))
        at += n
    logits = torch.cat(pieces, 1)
    for row, start in enumerate(starts):
        assert (logits[row, start:] - model(tokens[row : row + 1, start:])[0]).abs().max() <= EXACT


@patterns
def test_clone_and_restored_state_go_on_bit_for_bit(pattern: tuple[str, ...], tmp_path) -> None:
    model = MODELS[pattern]
    decoder, tokens = model.decoder(), torch.randint(31, (2, LENGTH))
    state = decoder.init(2, Blocked(LENGTH), start=torch.tensor([0, 3]))
    with torch.inference_mode():
        decoder.extend(state, tokens[:, :50])
        copy = decoder.clone(state)
        save_state(decoder, state, tmp_path / "state")
        back = load_state(decoder, tmp_path / "state")
        branch = decoder.clone(state)
        decoder.extend(branch, tokens[:, 50:].flip(1))
    assert copy.clock == back.clock == 50
    assert not copy.start.is_inference()
    for t in range(50, 90):
        logits = decoder.extend(state, tokens[:, t : t + 1])
        assert torch.equal(logits, decoder.extend(copy, tokens[:, t : t + 1]))
        assert torch.equal(logits, decoder.extend(back, tokens[:, t : t + 1]))
    assert (logits[0] - model(tokens[:1, :90])[0, -1]).abs().max() <= EXACT
    assert (logits[1] - model(tokens[1:, 3:90])[0, -1]).abs().max() <= EXACT


@patterns
@pytest.mark.parametrize("prompt", [1, 2, 37])
def test_greedy_tokens_are_those_of_the_full_recompute(pattern: tuple[str, ...], prompt: int) -> None:
    model, given_ = MODELS[pattern], torch.randint(31, (2, prompt))
    tokens = generate(model, given_, max_new_tokens=LENGTH - prompt)
    full = model(torch.cat([given_, tokens], 1)[:, :-1])[:, prompt - 1 :]
    assert torch.equal(full.argmax(-1), tokens)
    assert verify(model, given_[0], tokens=20).equal


@patterns
@pytest.mark.parametrize("prompt", [1, 2, 37])
def test_drawn_tokens_have_the_chances_of_the_full_recompute(pattern: tuple[str, ...], prompt: int) -> None:
    """Drawn tokens vary, where a greedy run of so small a model may repeat a few."""
    model, given_ = MODELS[pattern], torch.randint(31, (2, prompt))
    drawn = generate(model, given_, max_new_tokens=LENGTH - prompt, temperature=1.0, seed=0, logprobs=True)
    full = model(torch.cat([given_, drawn.tokens], 1)[:, :-1])[:, prompt - 1 :].log_softmax(-1)
    assert (full.gather(-1, drawn.tokens[..., None])[..., 0] - drawn.logprobs).abs().max() <= EXACT
    assert len(drawn.tokens.unique()) > 10


@patterns
def test_scores_do_not_depend_on_the_chunk(pattern: tuple[str, ...]) -> None:
    model, tokens = MODELS[pattern], torch.randint(31, (2, 70))
    exact = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    for chunk in (1, 7, 4096):
        assert (score(model, tokens, chunk=chunk) - exact).abs().max() <= EXACT


SPECTRAL = FilterConfig(kind="spectral", options={"count": 6})


@pytest.mark.parametrize("prompt", [1, 2, 37])
def test_a_model_whose_filters_all_have_stride_2_pays_every_other_lag(prompt: int) -> None:
    torch.manual_seed(0)
    model = LanguageModel(HyenaConfig(31, 5, 2, LENGTH, order=3, filter=SPECTRAL, tied=False)).double().eval()
    decoder = model.decoder()
    assert decoder.stack is not None
    assert decoder.stack.filter.stride == 2
    assert decoder.stack.filter.rho.shape == (2 * 2 * 5, LENGTH // 2)
    given_ = torch.randint(31, (2, prompt))
    drawn = generate(model, given_, max_new_tokens=LENGTH - prompt, temperature=1.0, seed=0, logprobs=True)
    full = model(torch.cat([given_, drawn.tokens], 1)[:, :-1])[:, prompt - 1 :].log_softmax(-1)
    assert (full.gather(-1, drawn.tokens[..., None])[..., 0] - drawn.logprobs).abs().max() <= EXACT
    made = plan(model, prompt=20, max_new_tokens=LENGTH - 20)
    assert made.filters == 8 * 20 * (LENGTH // 2 + LENGTH // 2)


def test_filters_of_several_strides_are_paid_at_every_lag() -> None:
    strided, dense = SpectralFilter(4, 50, count=6), ExplicitFilter(3, 50)
    groups = [Convolutions(strided, 2), Convolutions(dense, 3)]
    assert [common_stride(some) for some in (groups, groups[:1], groups[1:], [])] == [1, 2, 1, 1]


def test_settings_of_a_filter_reach_it_and_unknown_ones_are_refused() -> None:
    config = HyenaConfig(31, 5, 1, 16, filter=FilterConfig(kind="squashed", options={"threshold": 0.25}))
    assert LanguageModel(config).blocks[0].mixer.filter.threshold == 0.25
    assert HyenaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ModelError, match=r"make no filter of kind 'squashed': .*'treshold'"):
        LanguageModel(HyenaConfig(31, 5, 1, 16, filter=FilterConfig(kind="squashed", options={"treshold": 0.25})))
    with pytest.raises(ModelError, match=r"are given for kind 'implicit', whose settings are the other fields"):
        FilterConfig(options={"width": 3})


def test_without_long_convolutions_any_tiling_will_do() -> None:
    model = MODELS[PATTERNS["mixers-alone"]]
    decoder, tokens = Decoder(model, 40), torch.randint(31, (1, 40))
    assert decoder.stack is None
    for tiling in (TwiceRelaxed(40), Relaxed(None, taps=4), Relaxed(40, taps=1)):
        state = decoder.init(1, tiling)
        decoder.extend(state, tokens[:, :30])
        assert decoder.due(state) == decoder.take(state) == ()
        logits = decoder.extend(state, tokens[:, 30:])
        assert (logits - model(tokens)[:, -1]).abs().max() <= EXACT
        with pytest.raises(LengthError, match=r"1 more positions after 40 make 41; the state holds 40\."):
            decoder.extend(state, tokens[:, :1])


@patterns
def test_the_plan_tells_how_each_part_decodes_and_what_it_keeps(pattern: tuple[str, ...]) -> None:
    model = MODELS[pattern]
    made = plan(model, prompt=20, max_new_tokens=60, batch=3)
    ways = {"leaky": ["recurrence"], "mean": ["KV cache"], "wide": ["tiles"], "hyena": ["tiles", "FIR ring"]}
    ways |= {"modal": ["recurrence"], "fir": ["FIR ring"], "cache": ["KV cache"], "window": ["KV cache"]}
    assert [(layer.block, layer.decodes) for layer in made.layers] == [
        (number, way) for number, kind in enumerate(pattern) for way in ways[kind]
    ]
    state = Decoder(model, 80).init(3, Blocked(80))
    rows = 80 / state.stack.history.shape[2] if state.stack else 1
    tiles = sum(layer.bytes for layer in made.layers if layer.decodes == "tiles")
    own = sum(layer.bytes for layer in made.layers if layer.decodes != "tiles")
    history = state.stack.history.nbytes if state.stack else 0
    assert tiles * 3 == pytest.approx(history * rows)
    assert own * 3 == state.nbytes - (state.stack.nbytes if state.stack else 0)
    assert made.state >= state.nbytes
    assert all(layer.why for layer in made.layers)


def test_a_family_is_saved_and_loaded_by_its_name(tmp_path, monkeypatch) -> None:
    model, tokens = MODELS[PATTERNS["widths"]], torch.randint(31, (1, 20))
    with pytest.raises(ModelError, match="cannot save a model of ToyConfig; the known families are hyena"):
        save(model, tmp_path)
    monkeypatch.setitem(FAMILIES, "toy", ToyConfig)
    save(model, tmp_path)
    back = load(tmp_path)
    assert back.config == model.config
    assert torch.equal(back(tokens), model(tokens))
    monkeypatch.delitem(FAMILIES, "toy")
    with pytest.raises(CheckpointError, match="unknown family 'toy'"):
        load(tmp_path)


def test_configs_of_all_families_share_their_errors() -> None:
    values = ToyConfig(31, 5, 1, 16).to_dict()
    assert ToyConfig.from_dict({**values, "pattern": ["mean"]}).pattern == ("mean",)
    with pytest.raises(ModelError, match=r"unknown key 'patern' for ToyConfig\. Did you mean 'pattern'\?"):
        ToyConfig.from_dict({**values, "patern": 3})
    with pytest.raises(ModelError, match=r"does not make a ToyConfig: 'int' object is not iterable"):
        ToyConfig.from_dict({**values, "stop_tokens": 3})
    with pytest.raises(ModelError, match=r"ToyConfig\.width = 0 is out of range"):
        ToyConfig(31, 0, 1, 16)


def test_the_fused_steps_say_which_models_they_do_not_know() -> None:
    assert unfused(random_model()) is None
    assert random_model().decoder().fused is not None
    model = MODELS[PATTERNS["among-hyena"]]
    assert unfused(model) == "block 0 is a Own, and the fused step knows Hyena blocks only"
    assert model.decoder().fused is None
    assert "config is a ToyConfig" in str(unfused(toy(["hyena", "hyena"])))


def test_graphs_refuse_a_mixer_that_may_not_replay_and_pytorch_runs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = pytest.importorskip("flash_inference.models.gpu")
    model = MODELS[PATTERNS["among-hyena"]]
    with pytest.raises(ModelError, match=r"no graph can hold .*: block 0 has a Leaky.*model\.decoder\(length\)"):
        gpu.gpu_decoder(model, 16)
    monkeypatch.setattr(gpu, "unusable", lambda weight: None)
    weight = SimpleNamespace(device=torch.device("cuda"))
    away = SimpleNamespace(
        embedding=SimpleNamespace(weight=weight), blocks=model.blocks, config=model.config, decoder=model.decoder
    )
    with pytest.warns(UserWarning, match=r"kernels are not used: block 0 has a Leaky") as caught:
        assert isinstance(decoder_for(away, 16), Decoder)  # type: ignore[arg-type]
    assert len(caught) == 1
