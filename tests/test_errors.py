"""Bad input is refused before any compute, by a message that says got, expected, remedy."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flash_inference import FilterConfig, HyenaConfig, LanguageModel, generate, load, stream
from flash_inference.engine import plan as plans
from flash_inference.errors import (
    FilterError,
    FlashInferenceError,
    LengthError,
    ModelError,
    NumericsError,
    PlanError,
    SamplingError,
    ShapeError,
    TokenError,
)
from flash_inference.models import weights
from flash_inference.testing import random_model
from flash_inference.tiling import Blocked, Lazy, Relaxed, TwiceRelaxed

OPTIONS = {"max_new_tokens": 10}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model(2, length=100, vocab_size=256)


@pytest.fixture
def idle(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A model that fails the test if anything is computed with it."""

    def compute(*_: object, **__: object) -> None:
        raise AssertionError("something was computed")

    for name in ("decoder", "forward"):
        monkeypatch.setattr(model, name, compute)
    return model


@dataclasses.dataclass
class Bad:
    prompt: object
    options: dict
    error: type[Exception]
    message: str


BAD = {
    "too-many-new": Bad(
        [[1] * 60],
        {"max_new_tokens": 41},
        LengthError,
        r"60 prompt tokens \+ 41 new tokens = 101; this model's filter has 100 taps, the most positions it can run\. "
        r"Ask for at most 40 new tokens, or shorten the prompt",
    ),
    "too-long-prompt": Bad([[1] * 100], OPTIONS, LengthError, r"100 prompt tokens .* Ask for at most 0 new tokens"),
    "longer-than-the-filter": Bad([[1] * 500], OPTIONS, LengthError, r"(?s)500 .*100 taps"),
    "zero-new": Bad([[1]], {"max_new_tokens": 0}, LengthError, r"max_new_tokens is 0; expected at least 1"),
    "negative-new": Bad([[1]], {"max_new_tokens": -5}, LengthError, r"max_new_tokens is -5; expected at least 1"),
    "id-too-large": Bad(
        [[1, 2], [3, 256]],
        OPTIONS,
        TokenError,
        r"token id 256 at row 1, position 1 is outside the vocabulary; expected 0 \.\. 255\. Was the text encoded",
    ),
    "id-negative": Bad([[7, -1]], OPTIONS, TokenError, r"token id -1 at row 0, position 1 is outside the vocab"),
    "id-in-tensor": Bad(
        torch.tensor([[1, 2, 3], [4, 5, 999]]), OPTIONS, TokenError, r"token id 999 at row 1, position 2 is outside"
    ),
    "floats": Bad(torch.zeros(1, 3), OPTIONS, TokenError, r"tokens are torch\.float32; expected integer ids"),
    "float-list": Bad([[1.5]], OPTIONS, TokenError, r"tokens are torch\.float32; expected integer ids"),
    "mixed-list": Bad([[1, "a"]], OPTIONS, TokenError, r"a prompt row is not a list of integer ids .*Encode text"),
    "three-axes": Bad(
        torch.zeros(1, 2, 3, dtype=torch.long), OPTIONS, ShapeError, r"shape \(1, 2, 3\); expected \[B, P\]"
    ),
    "no-rows": Bad(torch.zeros(0, 3, dtype=torch.long), OPTIONS, ShapeError, r"no rows; expected at least one"),
    "a-number": Bad(3, OPTIONS, TokenError, r"the prompt is a int; expected token ids"),
    "surrogate": Bad("a\ud800", OPTIONS, TokenError, r"lone surrogate"),
    "samples": Bad([[1]], {**OPTIONS, "n": 0}, SamplingError, r"n is 0; expected at least 1 sample per prompt"),
    "temperature": Bad(
        [[1]], {**OPTIONS, "temperature": -1.0}, SamplingError, r"temperature is -1\.0; expected a number"
    ),
    "top-k": Bad([[1]], {**OPTIONS, "top_k": 0}, SamplingError, r"top_k is 0; expected an integer >= 1"),
    "top-p": Bad([[1]], {**OPTIONS, "top_p": 0.0}, SamplingError, r"top_p is 0\.0; expected a number in \(0, 1\]"),
    "min-p": Bad([[1]], {**OPTIONS, "min_p": 2.0}, SamplingError, r"min_p is 2\.0; expected a number in \[0, 1\]"),
    "penalty": Bad([[1]], {**OPTIONS, "repetition_penalty": 0.0}, SamplingError, r"repetition_penalty is 0\.0"),
    "allowed-none": Bad([[1]], {**OPTIONS, "allowed": []}, SamplingError, r"allowed is \(\); expected at least one"),
    "allowed-id": Bad([[1]], {**OPTIONS, "allowed": [256]}, TokenError, r"allowed token id 256 is outside the vocab"),
    "stop-id": Bad([[1]], {**OPTIONS, "stop_tokens": [300]}, TokenError, r"stop token id 300 is outside the vocab"),
    "stop-empty": Bad([[1]], {**OPTIONS, "stop": ["a", ""]}, SamplingError, r"a stop string is empty"),
    "tiling-too-short": Bad(
        [[1] * 8], {**OPTIONS, "tiling": Blocked(12)}, FlashInferenceError, r"(?s)(?=.*17)(?=.*12)"
    ),
    "tiling-for-fewer-taps": Bad(
        [[1] * 30], {**OPTIONS, "tiling": Relaxed(39, taps=5)}, FlashInferenceError, r"(?s)(?=.*taps)(?=.*5)"
    ),
    "tiling-of-parallelograms": Bad(
        [[1]], {**OPTIONS, "tiling": TwiceRelaxed(50)}, FlashInferenceError, r"TwiceRelaxed"
    ),
}
every_bad = pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())


@every_bad
def test_generate_refuses_before_any_compute(idle: LanguageModel, bad: Bad) -> None:
    with pytest.raises(bad.error, match=bad.message):
        generate(idle, bad.prompt, **bad.options)


@every_bad
def test_stream_refuses_at_the_call(idle: LanguageModel, bad: Bad) -> None:
    with pytest.raises(bad.error, match=bad.message):
        stream(idle, bad.prompt, **bad.options)


def test_ragged_streams_are_refused(idle: LanguageModel) -> None:
    with pytest.raises(TokenError, match=r"a stream needs prompts of one length; .* or use generate"):
        stream(idle, [[1], [2, 3]], max_new_tokens=4)


def test_unknown_settings_are_refused_at_the_call(idle: LanguageModel) -> None:
    with pytest.raises(TypeError, match="temprature"):
        stream(idle, [[1]], max_new_tokens=4, temprature=1.0)


def test_ragged_rows_are_all_checked_first(idle: LanguageModel) -> None:
    with pytest.raises(LengthError, match=r"99 prompt tokens \+ 10 new tokens"):
        generate(idle, [[1], [2] * 99], max_new_tokens=10)
    with pytest.raises(TokenError, match=r"token id 700"):
        generate(idle, [[1], [2, 700]], max_new_tokens=10)


def test_the_row_that_is_wrong_is_named(idle: LanguageModel) -> None:
    with pytest.raises(TokenError, match=r"token id 700 at row 2, position 1"):
        generate(idle, [[1], [2, 3], [4, 700]], max_new_tokens=10)


def test_not_enough_memory(idle: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "free_memory", lambda: 1 << 20)
    for call in (generate, stream):
        with pytest.raises(
            PlanError, match=r"the run needs \d\.\d\d GiB for 1 x 11 positions; 0\.00 GiB are free\. About 0"
        ):
            call(idle, [[1]], **OPTIONS)
    assert issubclass(PlanError, MemoryError)


def test_a_run_as_long_as_the_filter_is_allowed(model: LanguageModel) -> None:
    assert generate(model, [[1] * 60], max_new_tokens=40).shape == (1, 40)
    assert generate(model, [[1] * 60], max_new_tokens=40, tiling=Lazy(99)).shape == (1, 40)


# -------------------------------------------------------------------------------------------------------------- models


def test_unknown_models_name_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "shipped", lambda: ["genes", "shakespeare"])
    with pytest.raises(
        ModelError,
        match=r"model 'shakespear' is neither a shipped model nor a folder\. Did you mean 'shakespeare'\? "
        r"Shipped models: genes, shakespeare",
    ):
        load("shakespear")
    with pytest.raises(
        ModelError, match=r"model 'xyz' is neither a shipped model nor a folder\. Shipped models: genes"
    ):
        load("xyz")


@pytest.mark.parametrize("length", [0, -1, 101])
def test_decoders_of_impossible_lengths(model: LanguageModel, length: int) -> None:
    with pytest.raises(LengthError, match=rf"{length} positions were asked for; this model's filter allows 1 \.\. 100"):
        model.decoder(length)


@pytest.mark.parametrize("kind", ["implicit", "explicit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_filters_that_are_not_finite(kind: str, value: float) -> None:
    model = random_model(2, length=50, filter=FilterConfig(kind=kind, width=16))
    filter = model.blocks[1].mixer.filter
    (filter.out.weight if kind == "implicit" else filter.rho)[3] = value
    for call in (generate, stream):
        with pytest.raises(
            FilterError, match=r"not finite: \d+ of \d+ taps, first channel 19 lag \d+ = .*Check the weights"
        ):
            call(model, [[1]], **OPTIONS)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}, {"allowed": [1, 2]}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(options: dict, value: float) -> None:
    """The row is named; in a stream, what was yielded before stands."""
    model = random_model(2, length=50)
    model.embedding.weight[7] = value
    rows = [[1, 2, 3], [4, 5, 6], [1, 7, 3]]
    message = r"the logits of row 2 are not finite .*Check the weights and the filter for NaN or overflow"
    with pytest.raises(NumericsError, match=message):
        generate(model, rows, **OPTIONS, **options)
    with pytest.raises(NumericsError, match=message):
        next(stream(model, rows, **OPTIONS, **options))
    assert generate(model, rows[:2], max_new_tokens=1, **options).shape == (2, 1)


def test_every_error_is_one_of_ours_and_a_built_in_one() -> None:
    from flash_inference import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    for kind in kinds:
        assert issubclass(kind, FlashInferenceError)
        assert kind is FlashInferenceError or issubclass(kind, (ValueError, ArithmeticError, MemoryError))


def test_configurations_of_wrong_types() -> None:
    values = HyenaConfig(8, 4, 1, 16).to_dict()
    with pytest.raises(ModelError, match=r"config key 'filter' is str; expected an object"):
        HyenaConfig.from_dict({**values, "filter": "implicit"})
    del values["width"]
    with pytest.raises(
        ModelError, match=r"config does not make a HyenaConfig: .*width.*Compare with HyenaConfig's fields"
    ):
        HyenaConfig.from_dict(values)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("bad", [-1, 256])
def test_a_decoder_refuses_ids_outside_the_vocabulary(bad: int, chunk: int) -> None:
    model = random_model(2, vocab_size=256)
    decoder = model.decoder()
    state = decoder.init(1, Blocked(64))
    decoder.extend(state, torch.tensor([[1, 2]]))
    with pytest.raises(TokenError, match=rf"token id {bad} at row 0, position {chunk - 1} is outside the vocabulary"):
        decoder.extend(state, torch.tensor([[3] * (chunk - 1) + [bad]]))
    assert state.clock == 2
