"""Scores: the log-probabilities of the full forward, whatever the chunk."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_inference import LanguageModel, score
from flash_inference.engine.score import score_chunks
from flash_inference.errors import LengthError, NumericsError, SettingError, TokenError
from flash_inference.testing import model_oracle, random_model

EXACT = 1e-10


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model(3, dtype=torch.float64, length=150, vocab_size=256)


@pytest.fixture(scope="module")
def dna() -> LanguageModel:
    return random_model(dtype=torch.float64, length=80, vocab_size=16, tokens="dna", start_token=2)


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


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6), chunk=st.integers(1, 90))
def test_ragged_rows_are_as_each_alone(model: LanguageModel, lengths: list[int], chunk: int) -> None:
    rows = [torch.randint(256, (length,)) for length in lengths]
    alone = [full(model, row[None])[0] for row in rows]
    for got, expected in zip(score(model, rows, chunk=chunk), alone, strict=True):
        assert (got.flatten() - expected).abs().max() <= EXACT
    totals = score(model, rows, chunk=chunk, reduce="sum")
    means = score(model, rows, chunk=chunk, reduce="mean")
    assert totals.dtype == means.dtype == torch.float64
    assert (totals - torch.stack([row.sum() for row in alone])).abs().max() <= EXACT
    assert (means - torch.stack([row.mean() for row in alone])).abs().max() <= EXACT


@settings(max_examples=15)
@given(texts=st.lists(st.text("ACGTNacgt", min_size=1, max_size=60), min_size=1, max_size=4), chunk=st.integers(1, 70))
def test_both_strands(dna: LanguageModel, texts: list[str], chunk: int) -> None:
    partner = dict(zip("ACGTN", "TGCAN", strict=True))
    others = ["".join(partner[letter] for letter in reversed(text.upper())) for text in texts]
    got = score(dna, texts, reverse_complement=True, chunk=chunk)
    for row, text, other in zip(got, texts, others, strict=True):
        forward, reverse = (full(dna, torch.tensor([[2, *dna.tokens.encode(x)]]))[0] for x in (text, other))
        assert (row.flatten() - (forward + reverse.flip(0)) / 2).abs().max() <= EXACT
    # Either strand may be the one that is given.
    same = score(dna, others, reverse_complement=True, reduce="sum")
    assert (score(dna, texts, reverse_complement=True, reduce="sum") - same).abs().max() <= EXACT


def test_token_rows_have_another_strand_after_their_start_token(dna: LanguageModel) -> None:
    ids = [2, *dna.tokens.encode("GATTACA")]
    assert torch.equal(score(dna, [ids], reverse_complement=True), score(dna, "GATTACA", reverse_complement=True))
    with pytest.raises(TokenError, match=r"begins with the letter G; .* Prepend 2, or give text"):
        score(dna, [ids[1:]], reverse_complement=True)
    with pytest.raises(TokenError, match=r"token id 1 at position 8 has no complement"):
        score(dna, [[*ids, 1]], reverse_complement=True)


def test_progress_counts_every_score(model: LanguageModel, dna: LanguageModel) -> None:
    seen: list[int] = []
    score(model, [[1] * 11] * 7 + [[2] * 31], chunk=33, progress=seen.append)
    assert seen == [30, 30, 30, 10]
    seen.clear()
    score(dna, ["ACG", "T"], reverse_complement=True, progress=seen.append)
    assert sum(seen) == 8


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
        ([[1, 2], [3]], {}, LengthError, r"1 token was given"),
        ([[1, 2]], {"reduce": "max"}, SettingError, r"reduce is 'max'; expected one of none, sum, mean"),
        ("ACGT", {"reverse_complement": True}, TokenError, r"tokens \(bytes\) have no complement"),
        ([[1, 256]], {}, TokenError, r"token id 256 at row 0, position 1 is outside the vocabulary"),
        ([[1] * 151], {}, LengthError, r"151 positions were given; the filter has 150 taps"),
    ],
    ids=[
        "one-token",
        "nothing",
        "chunk-0",
        "chunk-negative",
        "short-row",
        "reduce",
        "strands",
        "vocabulary",
        "too-long",
    ],
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
