"""Models that other packages wrote and ran: the same logits here. See fixtures/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flash_inference as fi

FIXTURES = Path(__file__).parent / "fixtures"
BAR = 1e-4
"""What float32 may miss, relative to the spread of the logits: the bar of published models."""
THEIRS = 2e-5
"""What those packages miss themselves: they transform in float32, over 2 x 97 places through two or three layers."""

names = pytest.mark.parametrize("name", ["multimolecule", "stripedhyena"])


@names
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, BAR), (torch.float64, THEIRS)], ids=["f32", "f64"])
def test_logits_are_the_other_program_s(name: str, dtype: torch.dtype, most: float) -> None:
    model, expected = fi.load(FIXTURES / name).to(dtype), load_file(FIXTURES / name / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["ids"]).double()
    assert logits.shape == expected["logits"].shape
    assert float((logits - expected["logits"]).abs().max()) <= most * float(expected["logits"].std())


@names
def test_steps_are_the_other_program_s_forward(name: str) -> None:
    """Prompts shorter than the short filter, then single steps."""
    model, expected = fi.load(FIXTURES / name), load_file(FIXTURES / name / "expected.safetensors")
    ids, logits = expected["ids"][:1], expected["logits"][0]
    for prompt in (1, 2, 5):
        decoder = model.decoder(97)
        state = decoder.init(1, fi.tiling.Prompted(fi.tiling.Blocked(97 - prompt, 8), prompt))
        steps = [decoder.extend(state, ids[:, :prompt])[0]]
        steps += [decoder.extend(state, ids[:, t : t + 1])[0] for t in range(prompt, 97)]
        got = torch.stack(steps).double()
        assert float((got - logits[prompt - 1 :]).abs().max()) <= BAR * float(logits.std())


def test_greedy_tokens_are_the_other_program_s() -> None:
    model, expected = (
        fi.load(FIXTURES / "multimolecule"),
        load_file(FIXTURES / "multimolecule" / "expected.safetensors"),
    )
    tokens = fi.generate(model, expected["ids"][:1, :9], max_new_tokens=60, stop_tokens=())
    assert torch.as_tensor(tokens)[0, -60:].tolist() == expected["greedy"].tolist()
