"""Speculation loses nothing: greedy tokens are those of plain decoding, drawn ones have its law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flash_inference as fi
from flash_inference.engine.drafters import Lookup, ModelDraft, PromptLookup, Proposal
from flash_inference.engine.sampling import Sampler, Sampling, accepted_or_redrawn
from flash_inference.engine.speculative import FUSED, MODULES, MOST, SAVED, SHARE, TRIES, Pace, Price, speculate
from flash_inference.errors import LengthError, ModelError, SettingError
from flash_inference.models.weights import shipped
from flash_inference.testing import random_model
from flash_inference.tiling import Blocked, Relaxed, Separated, Spread
from test_families import MODELS, patterns

SETTINGS = {
    "plain": Sampling(temperature=1.0),
    "warm": Sampling(temperature=0.6),
    "top-k": Sampling(temperature=1.0, top_k=3),
    "top-p": Sampling(temperature=0.9, top_p=0.7),
    "min-p": Sampling(temperature=1.2, min_p=0.3),
    "penalty": Sampling(temperature=0.8, repetition_penalty=1.7),
    "all": Sampling(temperature=0.8, top_k=4, top_p=0.9, min_p=0.05, repetition_penalty=1.4),
}
Rule = Callable[[Tensor, Tensor, int], Tensor]


def redrawn_from_p(p: Tensor, q: Tensor, token: int) -> Tensor:
    """The rule that is wrong: after a rejection it draws from p itself."""
    accept = (p[token] / q[token]).clamp(max=1)
    law = (1 - accept) * p
    law[token] += accept
    return law


def toy_logits(vocab: int, seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    """A law of its own behind every prefix."""

    def logits(prefix: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *prefix)) % 2**31)
        return 2 * torch.randn(1, vocab, generator=generator, dtype=torch.float64)

    return logits


def law_of(logits: Callable[[tuple[int, ...]], Tensor], sampling: Sampling, vocab: int) -> Callable[..., Tensor]:
    """The probabilities behind a prefix, by the sampler in use."""

    def law(prefix: tuple[int, ...]) -> Tensor:
        seen = [torch.tensor(prefix, dtype=torch.long)]
        return Sampler(sampling, 1, vocab, seen=seen).law(logits(prefix))[0]

    return law


def speculated(p: Callable[..., Tensor], q: Callable[..., Tensor], rule: Rule, k: int, vocab: int) -> Tensor:
    """The law of the next k tokens when k are proposed by q: every proposal, every outcome, and plain draws behind.

    A rejection ends the pass; the tokens behind it are drawn by p, which is what exact passes do.
    """
    joint = torch.zeros([vocab] * k, dtype=torch.float64)
    for proposal in product(range(vocab), repeat=k):
        chance = torch.ones((), dtype=torch.float64)
        for i in range(k):
            chance = chance * q(proposal[:i])[proposal[i]]
        if chance == 0:
            continue
        for tokens in product(range(vocab), repeat=k):
            weight, true = chance, True
            for i in range(k):
                behind = p(tokens[:i])
                law = rule(behind, q(tokens[:i]), proposal[i]) if true else behind
                weight = weight * law[tokens[i]]
                true = true and tokens[i] == proposal[i]
            joint[tokens] += weight
    return joint


def plain(p: Callable[..., Tensor], k: int, vocab: int) -> Tensor:
    """The law of the next k tokens, drawn one by one."""
    joint = torch.ones([vocab] * k, dtype=torch.float64)
    for tokens in product(range(vocab), repeat=k):
        for i in range(k):
            joint[tokens] *= p(tokens[:i])[tokens[i]]
    return joint


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(("vocab", "k"), [(5, 1), (3, 2), (2, 3)])
def test_the_law_of_tokens_is_the_models(sampling: Sampling, vocab: int, k: int) -> None:
    p, q = (law_of(toy_logits(vocab, seed), sampling, vocab) for seed in (1, 2))
    wanted = plain(p, k, vocab)
    variation = (speculated(p, q, accepted_or_redrawn, k, vocab) - wanted).abs().sum() / 2
    assert abs(float(wanted.sum()) - 1) < 1e-12
    assert variation < 1e-9


@pytest.mark.parametrize(("vocab", "k"), [(5, 1), (4, 2)])
def test_the_wrong_rule_is_told_from_ours(vocab: int, k: int) -> None:
    p, q = (law_of(toy_logits(vocab, seed), SETTINGS["plain"], vocab) for seed in (1, 2))
    wrong = (speculated(p, q, redrawn_from_p, k, vocab) - plain(p, k, vocab)).abs().sum() / 2
    assert wrong > 1e-2


@settings(max_examples=100)
@given(data=st.data())
def test_one_outcome_averages_to_the_target(data: st.DataObject) -> None:
    """Any two laws, zeros and equal ones among them; the outcome is the proposal exactly if it was accepted."""
    vocab = data.draw(st.integers(2, 8))
    weights = st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 0.5, 1.0, 3.0]), min_size=vocab, max_size=vocab)
    p, q = (torch.tensor(data.draw(weights.filter(any)), dtype=torch.float64) for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    total = torch.zeros_like(p)
    for token in q.nonzero()[:, 0].tolist():
        law = accepted_or_redrawn(p, q, token)
        assert abs(float(law.sum()) - 1) < 1e-12
        assert (law >= 0).all()
        assert abs(float(law[token] - (p[token] / q[token]).clamp(max=1))) < 1e-12
        total += q[token] * law
    assert (total - p).abs().sum() / 2 < 1e-9


@patterns
@pytest.mark.parametrize("tiling", [None, Relaxed(120)], ids=["default", "no-blocks"])
def test_greedy_tokens_of_every_mixer(pattern: tuple[str, ...], tiling: object) -> None:
    model = MODELS[pattern]
    prompt = torch.randint(31, (1, 7)).repeat(1, 3)[:, :20]
    wanted = fi.generate(model, prompt, max_new_tokens=60, tiling=tiling)
    for draft in (PromptLookup(1), ModelDraft(model), ModelDraft(MODELS[("leaky", "mean")])):
        assert torch.equal(fi.generate(model, prompt, max_new_tokens=60, tiling=tiling, draft=draft), wanted)


class Foreseen:
    """Proposes what it was told, right up to every `period`-th token."""

    foretold = None

    def __init__(self, tokens: Sequence[int], period: int) -> None:
        self.tokens, self.period, self.at, self.proposed = list(tokens), period, 0, 0

    def propose(self, most: int) -> Proposal:
        ahead = range(self.at, self.at + most)
        self.proposed += most
        return Proposal([(self.tokens[i] + (i % self.period == 0)) % 31 for i in ahead])

    def see(self, tokens: Sequence[int]) -> None:
        assert list(tokens) == self.tokens[self.at : self.at + len(tokens)]
        self.at += len(tokens)


@patterns
@pytest.mark.parametrize(("period", "beside"), [(1, False), (2, True), (5, False), (1000, True)])
def test_any_mixture_of_right_and_wrong_proposals(pattern: tuple[str, ...], period: int, beside: bool) -> None:
    """Drawn tokens too: where nothing is drawn to propose, they are those of plain decoding with the same seed."""
    model, prompt = MODELS[pattern], torch.randint(31, (1, 3))
    tiling = Spread(Separated(120, 32, 16), 4)
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=5, repetition_penalty=1.2)):
        wanted = fi.generate(
            model, prompt, max_new_tokens=50, temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty, seed=sampling.seed, tiling=tiling,
        )[0]  # fmt: skip
        sampler, foreseen = Sampler(sampling, 1, 31, seen=prompt), Foreseen(wanted.tolist(), period)
        pace = Pace()
        pace.most = lambda room, foretold, pace=pace: min(pace.length, room)  # type: ignore[method-assign]
        tokens = speculate(
            model.decoder(), prompt, lambda logits, token=None, law=None, sampler=sampler: sampler(logits),
            foreseen, max_new_tokens=50, tiling=tiling, beside=beside, pace=pace,
        )  # fmt: skip
        assert torch.equal(torch.cat(list(tokens)), wanted)
        assert foreseen.at == 50
        assert foreseen.proposed > 20


TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\n"


@pytest.mark.skipif("shakespeare" not in shipped(), reason="the model shakespeare is not shipped")
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 4}], ids=["greedy", "drawn"])
def test_real_text_is_that_of_plain_decoding(settings: dict[str, object]) -> None:
    model = fi.load("shakespeare")
    wanted = fi.generate(model, TEXT * 2, max_new_tokens=100, logprobs=True, **settings)
    drafted = fi.generate(model, TEXT * 2, max_new_tokens=100, logprobs=True, draft=PromptLookup(), **settings)
    assert torch.equal(drafted.tokens, wanted.tokens)
    assert (drafted.logprobs - wanted.logprobs).abs().max() < 1e-3
    if not settings:
        other = fi.generate(model, TEXT, max_new_tokens=24, draft=ModelDraft(model))
        assert torch.equal(other, fi.generate(model, TEXT, max_new_tokens=24))


@pytest.mark.parametrize("sampling", ["all", "penalty"])
def test_a_model_that_drafts_for_itself_is_always_right(sampling: str) -> None:
    """Its proposals are by the law that is wanted, so that all are accepted; drawn by seeds of their own."""
    model, chosen = random_model(vocab_size=64, dtype=torch.float64), SETTINGS[sampling]
    counts: list[tuple[int, int]] = []

    class Counting(Pace):
        def drafted(self, proposed: int, accepted: int) -> None:
            counts.append((proposed, accepted))
            super().drafted(proposed, accepted)

    prompt = torch.randint(64, (1, 9))
    sampler = Sampler(chosen, 1, 64, seen=prompt)

    def choose(logits: Tensor, token: int | None = None, law: Tensor | None = None) -> Tensor:
        if token is None or law is None:
            return sampler(logits)
        assert (law - sampler.law(logits)[0]).abs().max() < 1e-9
        return sampler.sample(accepted_or_redrawn(sampler.law(logits)[0], law, token)[None])

    proposer = ModelDraft(model).begin(prompt[0], 150, chosen, 0)
    tokens = list(speculate(model.decoder(), prompt, choose, proposer, max_new_tokens=150, pace=Counting()))
    assert len(tokens) == 150
    assert len(counts) > 4
    assert all(proposed == accepted for proposed, accepted in counts[:-1])


def test_rows_run_one_by_one_as_they_would_together() -> None:
    model, prompts = random_model(), torch.randint(64, (2, 12))
    for rows in (prompts, [prompts[0].tolist(), prompts[1, :5].tolist()]):
        kept = {"max_new_tokens": 40, "n": 2, "temperature": 1.0, "seed": 1, "stop_tokens": [7]}
        assert torch.equal(fi.generate(model, rows, **kept, draft=PromptLookup(1)), fi.generate(model, rows, **kept))
    steps = list(fi.stream(model, prompts[:1], max_new_tokens=40, draft=PromptLookup(1)))
    assert torch.equal(torch.stack(steps, 1), fi.generate(model, prompts[:1], max_new_tokens=40))


def test_lookup_copies_what_followed_last_and_goes_round() -> None:
    lookup = Lookup(2)
    lookup.see([1, 2, 3, 4, 1, 2, 5, 1, 2])
    assert lookup.propose(7) == ([5, 1, 2, 5, 1, 2, 5], None)
    lookup.see([9])
    assert lookup.propose(3).tokens == []
    assert Lookup(3).propose(3).tokens == []


@pytest.mark.parametrize("price", [MODULES, FUSED], ids=["modules", "fused"])
def test_drafts_that_fail_take_their_share_and_no_more(price: Price) -> None:
    pace, spent, steps = Pace(price), 0.0, 10_000
    for _ in range(steps):
        most = pace.most(100)
        if most:
            spent += price.cost(most) - 1
            pace.drafted(most, 0)
        else:
            pace.stepped()
    assert 0.5 * SHARE * steps < spent <= SHARE * steps + TRIES * price.cost(price.first)
    assert pace.savings < price.cost(price.first)


@pytest.mark.parametrize("price", [MODULES, FUSED], ids=["modules", "fused"])
def test_drafts_grow_while_they_come_true_and_are_left_out_where_they_cannot_gain(price: Price) -> None:
    pace, lengths = Pace(price), []
    for _ in range(4):
        lengths.append(pace.most(100))
        pace.drafted(lengths[-1], lengths[-1])
    assert lengths == [price.first, min(2 * price.first, MOST), MOST, MOST]
    assert [pace.most(room) > 0 for room in (-1, 0, 1, MOST)] == [False, False, False, True]
    pace.drafted(MOST, 2)
    assert pace.most(100) == price.first
    assert pace.savings <= SAVED


@pytest.mark.parametrize("price", [MODULES, FUSED], ids=["modules", "fused"])
def test_drafts_are_as_long_as_the_run_that_was_foretold_makes_worthwhile(price: Price) -> None:
    pace, begun = Pace(price), None
    for foretold in range(100):
        tokens = pace.most(100, foretold)
        gain = sum(foretold / (foretold + j) for j in range(1, tokens + 1))
        begun = foretold if tokens and begun is None else begun
        if tokens:
            assert gain + 2 > price.cost(tokens)
            assert tokens == MOST or foretold / (foretold + tokens) >= price.each
        else:
            assert begun is None
        assert pace.most(-1, foretold) == pace.most(0, foretold) == 0
    assert begun is not None
    assert begun < 12


def test_lookup_keeps_to_the_place_that_foretells() -> None:
    """Behind 1 2 stands 3 in one half of the period and 4 in the other: the last place alone is wrong each time."""
    lookup, period = Lookup(2), [1, 2, 3, 1, 2, 4]
    lookup.see(period * 2)
    for token in period * 3:
        assert lookup.propose(1).tokens == [token]
        lookup.see([token])
    assert lookup.foretold >= 3 * len(period)
    assert lookup.propose(7).tokens == [*period, 1]
    lookup.see([9])
    assert lookup.foretold == 0
    assert lookup.propose(3).tokens == []


def test_what_cannot_draft_says_so() -> None:
    model, prompt = random_model(length=64), torch.randint(64, (2, 8))
    with pytest.raises(SettingError, match=r"a stream with draft= has one row, and this one 2\."):
        fi.stream(model, prompt, max_new_tokens=4, draft=PromptLookup())
    with pytest.raises(SettingError, match="ngram is 0; expected at least 1 token"):
        PromptLookup(0)
    with pytest.raises(ModelError, match="the draft model has 32 tokens and the model 64; expected one vocabulary"):
        fi.generate(model, prompt, max_new_tokens=4, draft=ModelDraft(random_model(vocab_size=32)))
    with pytest.raises(LengthError, match="this model's filter has 10 taps"):
        fi.generate(model, prompt, max_new_tokens=4, draft=ModelDraft(random_model(length=10)))
    tiling = Blocked(64, 8)
    with pytest.raises(LengthError):
        fi.generate(model, prompt, max_new_tokens=60, draft=PromptLookup(), tiling=tiling)
