"""Prompts as a GPU's graphs read them, without a GPU: logits, inputs and pasts are those of any other reading."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from family_models import FAMILIES, family_model
from flash_inference import LanguageModel
from flash_inference.mixers.mixer import tensors
from flash_inference.models.decoder import Decoder, ModelState
from flash_inference.models.gpu_prompt import PromptReader
from flash_inference.testing import random_model
from flash_inference.tiling import Blocked

LENGTH = 150


def hyena(**settings: object) -> LanguageModel:
    return random_model(3, layers=2, vocab_size=29, width=8, length=LENGTH, tied=False, **settings).double()  # type: ignore[arg-type]


def tokens_of(n: int, seed: int = 0) -> Tensor:
    return torch.randint(29, (1, n), generator=torch.Generator().manual_seed(seed))


def compare(reader: PromptReader, model: LanguageModel, n: int, seed: int = 0) -> None:
    """Against the full forward, and a Decoder that reads the same token by token; then both go on."""
    slow, tokens = Decoder(model, LENGTH), tokens_of(n, seed)
    states: list[ModelState] = [each.init(1, Blocked(LENGTH)) for each in (reader, slow)]
    logits = reader.extend(states[0], tokens)
    for t in range(n):
        slow.extend(states[1], tokens[:, t : t + 1])
    torch.testing.assert_close(logits, model(tokens)[:, -1], rtol=0, atol=1e-9)
    assert states[0].clock == states[1].clock == n
    for mine, theirs in zip(*([past for of in state.pasts for past in of] for state in states), strict=True):
        for name, tensor in tensors(mine).items():
            torch.testing.assert_close(tensor, tensors(theirs)[name], rtol=0, atol=1e-9)
    for more in (1, 5) if n + 6 <= LENGTH else ():
        after = tokens_of(more, seed + 1)
        both = [each.extend(state, after) for each, state in zip((reader, slow), states, strict=True)]
        torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 24, 25, 96, 149, 150])
def test_a_prompt_of_any_length(n: int) -> None:
    model = hyena()
    compare(PromptReader(model, LENGTH), model, n)


@pytest.mark.parametrize("taps", [1, 2, 6])
def test_short_filters_of_any_length(taps: int) -> None:
    model = hyena(short_taps=taps)
    for n in (1, 3, 5, 20):
        compare(PromptReader(model, LENGTH), model, n)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family: str) -> None:
    """Those with mixers that reach back further than a few taps are read as ever."""
    model = family_model(family, length=LENGTH).double()
    reader = PromptReader(model, LENGTH)
    for n in (1, 3, 20):
        compare(reader, model, n)


def test_nothing_is_left_of_the_prompt_before() -> None:
    """A reader's memory serves all prompts: after one whose logits are NaN, another has the same bits as at first."""
    model = hyena()
    with torch.no_grad():
        model.embedding.weight[28] = float("nan")
    reader, tokens, seen = PromptReader(model, LENGTH), tokens_of(20, 3).clamp(max=27), list[Tensor]()
    for prompt in (tokens, torch.full((1, 24), 28), tokens):
        state = reader.init(1, Blocked(LENGTH))
        seen.append(reader.extend(state, prompt))
        assert state.stack is not None
        seen.append(torch.cat([column for _, column in _columns(reader, state, prompt.shape[1])]))
    assert seen[2].isnan().all()
    assert torch.equal(seen[0], seen[4])
    assert torch.equal(seen[1], seen[5])


def _columns(reader: PromptReader, state: ModelState, n: int) -> list[tuple[int, Tensor]]:
    assert reader.stack is not None
    assert state.stack is not None
    return reader.stack.columns(state.stack, range(n), slice(None), False, state.stack.inputs)


def test_sizes_leave_less_than_half_in_vain() -> None:
    reader = PromptReader(hyena(), LENGTH)
    assert reader.sizes == [16, 24, 32, 48, 64, 96, 128, 150]
