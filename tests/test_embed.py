"""Embeddings: the states of the full forward at every layer, whatever the chunk, the neighbours or the pool."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_inference import LanguageModel, embed
from flash_inference.engine.verify import TIE
from flash_inference.errors import LengthError, NumericsError, SettingError, TokenError
from flash_inference.testing import hidden_oracle, random_model
from flash_inference.testing.strategies import chunks
from flash_inference.tiling import Blocked, Prompted, Relaxed

EXACT = 1e-9
LAYERS = 3
ALL = range(-LAYERS - 2, LAYERS + 2)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model(3, dtype=torch.float64, length=150, vocab_size=256, layers=LAYERS)


@pytest.fixture(scope="module")
def given_rows() -> Tensor:
    return torch.randint(256, (3, 150), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exact(model: LanguageModel, given_rows: Tensor) -> list[Tensor]:
    """Every layer's states, by the oracle; position t does not depend on what comes later."""
    return hidden_oracle(model, given_rows)


def far(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max())


@pytest.mark.parametrize("layer", ALL)
def test_every_layer_is_the_definition(
    model: LanguageModel, given_rows: Tensor, exact: list[Tensor], layer: int
) -> None:
    assert far(embed(model, given_rows, layer=layer), exact[layer]) <= EXACT


@settings(max_examples=15)
@given(data=st.data())
def test_any_chunk_and_any_pool(
    model: LanguageModel, given_rows: Tensor, exact: list[Tensor], data: st.DataObject
) -> None:
    length, rows = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 3))
    layer, chunk = data.draw(st.sampled_from(ALL)), data.draw(st.integers(1, 500))
    tokens, states = given_rows[:rows, :length], exact[layer][:rows, :length]
    assert far(embed(model, tokens, layer=layer, chunk=chunk), states) <= EXACT
    assert far(embed(model, tokens, layer=layer, chunk=chunk, pool="mean"), states.mean(1)) <= EXACT
    assert far(embed(model, tokens, layer=layer, chunk=chunk, pool="last"), states[:, -1]) <= EXACT


@settings(max_examples=15)
@given(data=st.data())
def test_hidden_states_and_logits_by_turns(
    model: LanguageModel, given_rows: Tensor, exact: list[Tensor], data: st.DataObject
) -> None:
    decoder = model.decoder(150)
    tiling = data.draw(st.sampled_from([Blocked(150), Relaxed(150), Prompted(Blocked(50), 40)]))
    state, first = decoder.init(3, tiling), 0
    sizes = data.draw(chunks(50))
    if isinstance(tiling, Prompted):
        sizes = [40, *sizes]
    for size in sizes:
        piece = given_rows[:, first : first + size]
        layer = data.draw(st.sampled_from([*ALL, None]))
        if layer is None:
            logits = decoder.extend(state, piece)
            assert far(logits, exact[-1][:, first + size - 1] @ model.head.weight.T) <= EXACT
        else:
            assert far(decoder.hidden(state, piece, layer), exact[layer][:, first : first + size]) <= EXACT
        first += size


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), chunk=st.integers(1, 60))
def test_ragged_rows_are_as_each_alone(model: LanguageModel, lengths: list[int], chunk: int) -> None:
    rows = [torch.randint(256, (length,)) for length in lengths]
    got = embed(model, rows, chunk=chunk)
    for row, states in zip(rows, got, strict=True):
        assert far(states.reshape(1, -1, states.shape[-1]), embed(model, row)) <= EXACT
    pooled = embed(model, rows, pool="mean", chunk=chunk)
    assert far(pooled, torch.stack([embed(model, row, pool="mean")[0] for row in rows])) <= EXACT
    assert pooled.shape == (len(rows), model.config.width)


def test_text_has_a_vector_a_token(model: LanguageModel) -> None:
    start = model.config.start_token
    texts = ["a longer text", "b", "c"]
    for row, text in zip(embed(model, texts, layer=2), texts, strict=True):
        ids = torch.tensor([[start, *text.encode()]])
        assert far(row, embed(model, ids, layer=2)[:, 1:]) <= EXACT
        assert far(embed(model, text, layer=2, chunk=1), row) <= EXACT
        assert far(embed(model, text, layer=2, pool="mean"), row.mean(1)) <= EXACT
    mixed = embed(model, ["ab", [start, 97]])
    assert [row.shape[1] for row in ([*mixed] if isinstance(mixed, list) else mixed[:, None])] == [2, 2]
    assert far(mixed[0][:1], mixed[1][1:]) <= EXACT


def test_long_input_is_read_in_chunks() -> None:
    model = random_model(dtype=torch.float64, length=1500)
    tokens = torch.randint(64, (1, 1500))
    whole = hidden_oracle(model, tokens)[-1]
    seen: list[int] = []
    assert far(embed(model, tokens, chunk=257, progress=seen.append), whole) <= EXACT
    assert seen == [257] * 5 + [215]


def test_rows_of_one_length_run_together_within_the_chunk(model: LanguageModel) -> None:
    seen: list[int] = []
    embed(model, [[1] * 10] * 7 + [[2] * 20], chunk=30, progress=seen.append, pool="last")
    assert seen == [20, 30, 30, 10]


def test_float32_is_as_close_as_the_full_forward() -> None:
    """The full forward's own error against float64 is the scale, as for the ties of `verify`."""
    double = random_model(dtype=torch.float64, length=400)
    single = random_model(length=400)
    tokens = torch.randint(64, (2, 400))
    exact = hidden_oracle(double, tokens)[-1]
    heads: list[Tensor] = []
    hook = single.norm.register_forward_hook(lambda *args: heads.append(args[-1]))
    single(tokens)
    hook.remove()
    own = float((heads[0] - exact).abs().max())
    for chunk in (1, 33, 4096):
        assert float((embed(single, tokens, chunk=chunk) - exact).abs().max()) <= TIE * own


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
def test_gradient_modes(mode: type) -> None:
    model = random_model(2, length=60).requires_grad_(True)
    tokens = torch.randint(64, (1, 60))
    with mode():
        got = embed(model, tokens, chunk=13)
    assert not got.requires_grad
    assert torch.equal(got, embed(model, tokens, chunk=13))


@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    [
        ([[1, 2]], {"layer": 5}, SettingError, r"layer is 5; this model has 0 .* 1 \.\. 3 .* and -1"),
        ([[1, 2]], {"layer": -6}, SettingError, r"layer is -6"),
        ([[1, 2]], {"pool": "max"}, SettingError, r"pool is 'max'; expected one of none, mean, last"),
        ([[1, 2]], {"chunk": 0}, LengthError, r"chunk is 0; expected at least 1 position"),
        (["a", ""], {}, LengthError, r"row 1 is empty text; .* Remove it"),
        ([[1, 256]], {}, TokenError, r"token id 256 at row 0, position 1 is outside the vocabulary"),
        ([[1] * 151], {}, LengthError, r"151 positions were given; the filter has 150 taps"),
    ],
    ids=["layer", "layer-negative", "pool", "chunk", "empty", "vocabulary", "too-long"],
)
def test_wrong_inputs(model: LanguageModel, tokens: object, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        embed(model, tokens, **options)


def test_states_that_are_not_finite_name_the_position() -> None:
    model = random_model(2, length=60)
    model.embedding.weight[7] = float("inf")
    tokens = torch.randint(6, (2, 40))
    tokens[1, 21] = 7
    with pytest.raises(NumericsError, match=r"positions 20 \.\. 23 are not finite"):
        embed(model, tokens, chunk=4)
