"""Sampling: every setting against an independent float64 computation, and by frequencies."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flash_inference.engine.sampling import Sampler, Sampling
from flash_inference.errors import NumericsError, SamplingError, TokenError

VOCAB = 23
CHANCE = 1e-6


def probabilities(logits: np.ndarray, seen: set[int], given: Sampling) -> np.ndarray:
    """What a token's chance is, in float64, step by step as `Sampling` says."""
    scores = logits.astype(np.float64)
    for token in seen:
        penalty = given.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    kept = set(range(len(scores)) if given.allowed is None else given.allowed)
    scores = scores / given.temperature
    ranking = sorted(kept, key=lambda token: -scores[token])
    if given.top_k is not None:
        ranking = ranking[: given.top_k]
    if given.top_p is not None:
        weights = np.exp(scores[ranking] - scores[ranking[0]])
        weights /= weights.sum()
        keep, total = 0, 0.0
        while total < given.top_p and keep < len(ranking):
            total += weights[keep]
            keep += 1
        ranking = ranking[:keep]
    if given.min_p is not None:
        best = scores[ranking[0]]
        ranking = [token for token in ranking if math.exp(scores[token] - best) >= given.min_p]
    chances = np.zeros(len(scores))
    chances[ranking] = np.exp(scores[ranking] - scores[ranking[0]])
    return chances / chances.sum()


def near_an_edge(logits: np.ndarray, seen: set[int], given: Sampling) -> bool:
    """Whether float32 rounding could move a token over the edge of top_p or min_p."""
    shift = 64 * np.finfo(np.float32).eps
    support = probabilities(logits, seen, given) > 0
    for name, low in (("top_p", 0.0), ("min_p", 0.0)):
        value = getattr(given, name)
        if value is None:
            continue
        for factor in (1 - shift, 1 + shift):
            moved = min(max(value * factor, low), 1.0)
            if name == "top_p" and moved <= 0:
                continue
            fields = {n: getattr(given, n) for n in Sampling.__dataclass_fields__} | {name: moved}
            if ((probabilities(logits, seen, Sampling(**fields)) > 0) != support).any():
                return True
    return False


samplings = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from((1.0, 1.3, 2.0, 0.7)),
    allowed=st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1).map(lambda s: tuple(sorted(s))),
    temperature=st.sampled_from((0.3, 1.0, 2.5)),
    top_k=st.none() | st.integers(1, VOCAB + 5),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
    seed=st.just(0),
)


@settings(max_examples=200)
@given(given=samplings, seed=st.integers(0, 10_000), dtype=st.sampled_from((torch.float32, torch.float64)))
def test_every_combination_is_the_definition(given: Sampling, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(2, VOCAB, generator=generator)).to(dtype)
    seen = torch.randint(VOCAB, (2, 5), generator=generator)
    sampler = Sampler(given, 2, VOCAB, seen=seen)
    got = sampler.scores(logits).double().softmax(-1).numpy()
    for row in range(2):
        past = set(seen[row].tolist())
        assume(not near_an_edge(logits[row].numpy(), past, given))
        exact = probabilities(logits[row].numpy(), past, given)
        assert ((got[row] > 0) == (exact > 0)).all()
        largest = np.abs(logits[row].numpy()).max() * 2 / given.temperature
        assert np.abs(got[row] - exact).max() <= 8 * np.finfo(np.float32).eps * (1 + largest)


def quantile(freedom: int) -> float:
    """The value that chi-square exceeds with probability CHANCE, by Wilson and Hilferty."""
    z = NormalDist().inv_cdf(1 - CHANCE)
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts: np.ndarray, chances: np.ndarray) -> float:
    """Of counts whose expected value is at least 5, the others pooled."""
    assert not counts[chances == 0].any()
    expected = chances * counts.sum()
    many = expected >= 5
    observed = np.append(counts[many], counts[~many].sum())
    expected = np.append(expected[many], expected[~many].sum())
    keep = expected > 0
    freedom = int(keep.sum()) - 1
    if freedom < 1:
        return 0.0
    return float(((observed - expected)[keep] ** 2 / expected[keep]).sum()) / quantile(freedom)


FREQUENCIES = {
    "temperature-1": Sampling(temperature=1.0, seed=1),
    "temperature-0.4": Sampling(temperature=0.4, seed=2),
    "temperature-3": Sampling(temperature=3.0, seed=3),
    "top-k": Sampling(temperature=1.0, top_k=5, seed=4),
    "top-p": Sampling(temperature=1.5, top_p=0.8, seed=5),
    "min-p": Sampling(temperature=1.5, min_p=0.1, seed=6),
    "allowed": Sampling(temperature=1.0, allowed=(2, 3, 5, 7, 11), seed=7),
    "all": Sampling(temperature=2.0, top_k=12, top_p=0.95, min_p=0.02, allowed=tuple(range(0, 23, 2)), seed=8),
}


@pytest.mark.parametrize("given", FREQUENCIES.values(), ids=FREQUENCIES.keys())
@pytest.mark.parametrize("across", ["rows", "steps"])
def test_frequencies(given: Sampling, across: str) -> None:
    """4,000 draws: of 4,000 rows once, each from its own generator, and of 2 rows 2,000 times."""
    logits = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    rows, steps = (4000, 1) if across == "rows" else (2, 2000)
    sampler = Sampler(given, rows, VOCAB)
    draws = torch.cat([sampler(logits.expand(rows, -1)) for _ in range(steps)])
    counts = np.bincount(draws.numpy(), minlength=VOCAB)
    assert chi_square(counts, probabilities(logits.numpy(), set(), given)) <= 1


def test_the_frequency_check_can_fail() -> None:
    logits = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(Sampling(temperature=1.1, seed=1), 4000, VOCAB)
    counts = np.bincount(sampler(logits.expand(4000, -1)).numpy(), minlength=VOCAB)
    assert chi_square(counts, probabilities(logits.numpy(), set(), Sampling(temperature=1.6))) > 1


def test_greedy_is_the_largest() -> None:
    logits = torch.randn(5, VOCAB)
    assert torch.equal(Sampler(Sampling(), 5, VOCAB)(logits), logits.argmax(-1))
    allowed = Sampler(Sampling(allowed=(4, 9, 2)), 5, VOCAB)(logits)
    assert torch.equal(allowed, torch.tensor([2, 4, 9])[logits[:, [2, 4, 9]].argmax(-1)])


def test_a_penalty_remembers_what_was_drawn() -> None:
    logits = torch.zeros(2, 4)
    logits[:, 1], logits[:, 2] = 2.0, 1.5
    sampler = Sampler(Sampling(repetition_penalty=2.0), 2, 4, seen=torch.tensor([[0], [1]]))
    assert sampler(logits).tolist() == [1, 2]
    assert sampler(logits).tolist() == [2, 1]


@pytest.mark.parametrize("first_row", [0, 3])
def test_rows_draw_from_their_own_generators(first_row: int) -> None:
    given, logits = Sampling(temperature=1.0, seed=5), torch.randn(6, VOCAB)
    together = Sampler(given, 6, VOCAB)
    alone = Sampler(given, 2, VOCAB, first_row=first_row)
    for _ in range(20):
        assert torch.equal(together(logits)[first_row : first_row + 2], alone(logits[first_row : first_row + 2]))


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("temperature", -0.1, r"a number >= 0 \(0 is greedy\)"),
        ("temperature", float("nan"), "a number >= 0"),
        ("temperature", float("inf"), "a number >= 0"),
        ("top_k", 0, "an integer >= 1, or None"),
        ("top_p", 0.0, r"a number in \(0, 1\], or None"),
        ("top_p", 1.1, r"a number in \(0, 1\], or None"),
        ("top_p", float("nan"), r"a number in \(0, 1\], or None"),
        ("min_p", -0.1, r"a number in \[0, 1\], or None"),
        ("min_p", 1.1, r"a number in \[0, 1\], or None"),
        ("repetition_penalty", 0.0, r"a number > 0 \(1 is none\)"),
        ("repetition_penalty", float("inf"), "a number > 0"),
        ("allowed", (), "at least one token id, or None"),
    ],
)
def test_settings_out_of_range(setting: str, value: object, wanted: str) -> None:
    with pytest.raises(SamplingError, match=rf"{setting} is .*; expected {wanted}"):
        Sampling(**{setting: value})


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_allowed_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(TokenError, match=rf"allowed token id {token} is outside the vocabulary; expected 0 \.\. 22"):
        Sampler(Sampling(allowed=(1, token)), 1, VOCAB)


@pytest.mark.parametrize("given", [Sampling(), Sampling(temperature=1.0), Sampling(allowed=(1, 2))])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(given: Sampling, value: float) -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 4] = value
    with pytest.raises(NumericsError, match=r"the logits of row 1 are not finite .*Check the weights and the filter"):
        Sampler(given, 3, VOCAB)(logits)
    logits[1, 4] = -float("inf")
    assert Sampler(given, 3, VOCAB)(logits).shape == (3,)


def test_drawing_without_a_seed_leaves_the_callers_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    samplers = [Sampler(Sampling(temperature=1.0), 1, 1 << 20) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    logits = torch.zeros(1, 1 << 20)
    assert any(int(samplers[0](logits)) != int(samplers[1](logits)) for _ in range(4))
