"""Scores: the log-probabilities of the full forward, whatever the chunk."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_inference import LanguageModel, score
from flash_inference.engine.score import score_chunks
from flash_inference.errors import LengthError, NumericsError, TokenError
from flash_inference.testing import model_oracle, random_model

EXACT = 1e-10


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model(3, dtype=torch.float64, length=150, vocab_size=256)


def full(model: LanguageModel, tokens: Tensor) -> Tensor:
    return model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


@given(data=st.data())
def test_any_chunk_is_the_full_forward(model: LanguageModel, data: st.DataObject) -> None:
    tokens = torch.randint(256, (data.draw(st.integers(1, 3)), data.draw(st.integers(2, 150))))
    chunk = data.draw(st.integers(1, 160))
    got = score(model, tokens, chunk=chunk)
    assert got.shape == (len(tokens), tokens.shape[1] - 1)
    assert (got - full(model, tokens)).abs().max() <= EXACT


def test_scores_are_the_definition(model: LanguageModel) -> None:
    tokens = torch.randint(256, (2, 90))
    logits = model_oracle(model, tokens)[:, :-1]
    exact = (logits - logits.logsumexp(-1, keepdim=True)).gather(-1, tokens[:, 1:, None])[..., 0]
    assert (score(model, tokens, chunk=7) - exact).abs().max() <= EXACT


def test_all_chunks_give_the_same(model: LanguageModel) -> None:
    tokens = torch.randint(256, (2, 150))
    whole = score(model, tokens)
    for chunk in (1, 2, 31, 32, 33, 149, 4096):
        assert (score(model, tokens, chunk=chunk) - whole).abs().max() <= EXACT
        pieces = list(score_chunks(model, tokens, chunk))
        assert [piece.shape[1] for piece in pieces] == [min(chunk, 149 - i) for i in range(0, 149, chunk)]


def test_ragged_rows_and_texts(model: LanguageModel) -> None:
    start = model.config.start_token
    texts = ["a longer text", "b"]
    got = score(model, texts)
    assert [row.shape for row in got] == [(1, 13), (1, 1)]
    for row, text in zip(got, texts, strict=True):
        tokens = torch.tensor([[start, *text.encode()]])
        assert (row - full(model, tokens)).abs().max() <= EXACT
        assert torch.equal(row, score(model, text))
    ragged = score(model, [[1, 2, 3], [4, 5]])
    assert [row.shape for row in ragged] == [(1, 2), (1, 1)]


def test_scores_are_the_log_probabilities_that_generation_gives(model: LanguageModel) -> None:
    from flash_inference import generate

    prompt = torch.randint(256, (2, 20))
    made = generate(model, prompt, max_new_tokens=50, temperature=1.0, seed=1, logprobs=True)
    scores = score(model, torch.cat([prompt, made.tokens], dim=1))[:, 19:]
    assert (scores - made.logprobs).abs().max() <= EXACT


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
def test_gradient_modes(mode: type) -> None:
    model = random_model(2, length=60).requires_grad_(True)
    tokens = torch.randint(64, (1, 60))
    with mode():
        got = score(model, tokens, chunk=13)
    assert not got.requires_grad
    assert torch.equal(got, score(model, tokens, chunk=13))


@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    [
        ([[1]], {}, LengthError, r"1 token was given; a score needs 2, .* Prepend a start token"),
        (None, {}, LengthError, r"1 token was given"),
        ([[1, 2]], {"chunk": 0}, LengthError, r"chunk is 0; expected at least 1 position"),
        ([[1, 2]], {"chunk": -3}, LengthError, r"chunk is -3; expected at least 1 position"),
        ([[1, 256]], {}, TokenError, r"token id 256 at row 0, position 1 is outside the vocabulary"),
        ([[1] * 151], {}, LengthError, r"151 positions were given; the filter has 150 taps"),
    ],
    ids=["one-token", "nothing", "chunk-0", "chunk-negative", "vocabulary", "too-long"],
)
def test_wrong_inputs(model: LanguageModel, tokens: object, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        score(model, tokens, **options)


@pytest.mark.parametrize("chunk", [4, 100])
def test_logits_that_are_not_finite_name_the_position(chunk: int) -> None:
    model = random_model(2, length=60)
    model.embedding.weight[7] = float("inf")
    tokens = torch.randint(6, (2, 40))
    tokens[1, 21] = 7
    with pytest.raises(NumericsError, match=r"(?s)(?=.*not finite)(?=.*[Cc]heck the weights)") as caught:
        score(model, tokens, chunk=chunk)
    first, last = re.search(r"positions? (\d+)(?: \.\. (\d+))?", str(caught.value)).groups()
    assert int(first) <= 21 <= int(last or first)
