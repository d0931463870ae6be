"""The model against an independent transcription of its definition, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flash_inference import ExplicitFilter, FilterConfig, HyenaConfig, ImplicitFilter, LanguageModel
from flash_inference.errors import LengthError, ModelError, TokenError
from flash_inference.models.hyena import Hyena
from flash_inference.testing import hyena_oracle, implicit_filter_oracle, model_oracle, random_model

EXACT = 1e-10
FILTERS = {
    "implicit": FilterConfig(width=8, features=5),
    "implicit-9-features-3-inner": FilterConfig(width=8, features=9, inner=3, frequency=14.0),
    "implicit-3-features": FilterConfig(width=8, features=3, inner=0),
    "implicit-unmodulated": FilterConfig(width=8, modulate=False),
    "implicit-shifted": FilterConfig(width=8, shift=0.05, fast_decay=0.2, slow_decay=2.0),
    "explicit": FilterConfig(kind="explicit"),
}


@pytest.mark.parametrize("filter", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_forward_is_the_definition(order: int, tied: bool, filter: FilterConfig) -> None:
    model = random_model(order, dtype=torch.float64, filter=filter, tied=tied, length=150, width=8, vocab_size=32)
    tokens = torch.randint(32, (2, 131))
    assert (model(tokens) - model_oracle(model, tokens)).abs().max() <= EXACT


@pytest.mark.parametrize("short_taps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 97])
def test_short_taps_and_short_inputs(length: int, short_taps: int) -> None:
    model = random_model(3, dtype=torch.float64, short_taps=short_taps, length=97, width=6, layers=3, inner=10)
    tokens = torch.randint(64, (2, length))
    assert (model(tokens) - model_oracle(model, tokens)).abs().max() <= EXACT


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_operator_is_the_definition(order: int) -> None:
    config = HyenaConfig(vocab_size=8, width=5, layers=1, length=40, order=order, filter=FilterConfig(width=6))
    operator = Hyena(config).double().requires_grad_(False)
    for weight in operator.parameters():
        weight.copy_(torch.randn_like(weight) * 0.5)
    x = torch.randn(2, 33, 5, dtype=torch.float64)
    rho = implicit_filter_oracle(operator.filter.state_dict(), config, 33)
    assert (operator(x) - hyena_oracle(x, operator.state_dict(), rho, order)).abs().max() <= EXACT


@pytest.mark.parametrize("length", [1, 2, 64, 97])
@pytest.mark.parametrize("filter", [f for f in FILTERS.values() if f.kind == "implicit"], ids=list(FILTERS)[:-1])
def test_filter_taps_are_the_definition(filter: FilterConfig, length: int) -> None:
    config = HyenaConfig(vocab_size=8, width=5, layers=1, length=length, filter=filter)
    made = ImplicitFilter(5, length, **filter.settings()).double()
    assert (made.taps(length) - implicit_filter_oracle(made.state_dict(), config, length)).abs().max() <= EXACT


@pytest.mark.parametrize("made", [ExplicitFilter(3, 97), ImplicitFilter(3, 97)], ids=["explicit", "implicit"])
def test_taps_do_not_depend_on_how_many_are_asked_for(made: ExplicitFilter | ImplicitFilter) -> None:
    whole = made.double().taps(97)
    for n in (1, 2, 64, 96):
        assert (made.taps(n) - whole[:, :n]).abs().max() <= EXACT
        assert (made.taps(97 - n, start=n) - whole[:, n:]).abs().max() <= EXACT


def test_prefixes_agree() -> None:
    model = random_model(3, dtype=torch.float64, length=100)
    tokens = torch.randint(64, (2, 100))
    whole = model(tokens)
    for n in (1, 2, 33, 99):
        assert (model(tokens[:, :n]) - whole[:, :n]).abs().max() <= EXACT


def test_the_future_does_not_matter() -> None:
    model = random_model(2, dtype=torch.float64, length=100)
    tokens = torch.randint(64, (1, 100))
    changed = tokens.clone()
    changed[:, 60:] = (changed[:, 60:] + 1) % 64
    a, b = model(tokens), model(changed)
    assert (a[:, :60] - b[:, :60]).abs().max() <= EXACT
    assert (a[:, 60:] - b[:, 60:]).abs().amax(-1).min() > EXACT


@pytest.mark.parametrize("order", [2, 3, 4])
def test_random_models_prove_something(order: int) -> None:
    """Biases are non-zero, embeddings have unit scale, one seed is one model, and the far past changes the logits."""
    model = random_model(order, dtype=torch.float64)
    for name, weight in model.named_parameters():
        assert "bias" not in name or (weight != 0).all()
    n = model.embedding.weight.numel()
    assert abs(model.embedding.weight.std().item() - 1) < 5 / (2 * n) ** 0.5
    again = random_model(order, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    tokens = torch.randint(64, (1, 512))
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 64
    far = (model(tokens)[0, -1] - model(changed)[0, -1]).abs().max()
    assert far > 1000 * EXACT


def test_dropout_is_off_in_eval_mode_and_training_has_gradients() -> None:
    model = random_model(3, dropout=0.5).requires_grad_(True)
    tokens = torch.randint(64, (2, 33))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    model(tokens).square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.long), TokenError, r"shape \(3,\); expected \[B, L\]\. Add a batch axis"),
        (torch.zeros(1, 3), TokenError, r"tokens are torch\.float32; expected integer ids\. Convert with tokens\.long"),
        (torch.zeros(1, 3, dtype=torch.bool), TokenError, r"tokens are torch\.bool; expected integer ids"),
        (
            torch.tensor([[1, 2, 3], [4, 64, 5]]),
            TokenError,
            r"token id 64 at row 1, position 1 is outside the vocabulary; expected 0 \.\. 63",
        ),
        (torch.tensor([[-1]]), TokenError, r"token id -1 at row 0, position 0 is outside the vocabulary"),
        (torch.zeros(1, 513, dtype=torch.long), LengthError, r"513 positions were given; the filter has 512 taps"),
    ],
    ids=["one-axis", "floats", "booleans", "too-large", "negative", "too-long"],
)
def test_wrong_tokens(tokens: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        random_model()(tokens)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0), ("width", 0), ("layers", 0), ("length", 0), ("length", -1), ("order", 1), ("inner", -1),
        ("short_taps", 0), ("dropout", 1.0), ("start_token", 8), ("pad_token", -1),
    ],
)  # fmt: skip
def test_wrong_configurations(field: str, value: float) -> None:
    with pytest.raises(ModelError, match=rf"HyenaConfig\.{field} = {value}.* is out of range\. Sizes are at least 1"):
        dataclasses.replace(HyenaConfig(8, 4, 1, 16), **{field: value})


def test_unknown_keys_and_kinds_name_the_nearest() -> None:
    values = HyenaConfig(8, 4, 1, 16).to_dict()
    assert HyenaConfig.from_dict(values) == HyenaConfig(8, 4, 1, 16)
    with pytest.raises(ModelError, match=r"unknown key 'widht' for HyenaConfig\. Did you mean 'width'\?"):
        HyenaConfig.from_dict({**values, "widht": 3})
    with pytest.raises(ModelError, match=r"unknown key 'modulated' for FilterConfig\. Did you mean 'modulate'\?"):
        HyenaConfig.from_dict({**values, "filter": {"modulated": True}})
    with pytest.raises(ModelError, match=r"filter kind 'implicitt' is unknown; expected one of implicit, explicit"):
        LanguageModel(HyenaConfig(8, 4, 1, 16, filter=FilterConfig(kind="implicitt")))
    with pytest.raises(ModelError, match=r"token table 'letters' is unknown; expected one of bytes, dna"):
        _ = LanguageModel(HyenaConfig(8, 4, 1, 16, tokens="letters")).tokens
