"""Requests that come and go on a GPU, in graphs: each gets the tokens that it gets alone."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("gpu: no CUDA device here, or Triton's interpreter is on", allow_module_level=True)
pytest.importorskip("triton")

import flash_inference as fi
from family_models import family_model
from flash_inference.engine.batch_gpu import GpuBatch
from flash_inference.engine.request import Request, Status
from flash_inference.errors import NumericsError, PlanError
from flash_inference.testing import find_ties, random_model

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def hyena(length: int = 1400, vocab: int = 500, **settings: Any) -> fi.LanguageModel:
    model = random_model(
        2,
        layers=2,
        width=256,
        vocab_size=vocab,
        length=length,
        tied=False,
        filter=fi.FilterConfig(width=16),
        **settings,
    )
    return model.to(CUDA)


def engine_of(model: fi.LanguageModel, **settings: Any) -> fi.Engine:
    engine = fi.Engine(model, **settings)
    assert isinstance(engine.batch, GpuBatch)
    return engine


def prompt_of(n: int, seed: int, vocab: int = 29) -> Tensor:
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def check(model: fi.LanguageModel, request: Request, prompt: Tensor) -> None:
    """The float64 forward's tokens, ties aside; all that were asked for unless the request was cancelled."""
    tokens = torch.tensor(request.tokens, dtype=torch.long, device=CUDA)
    assert len(tokens) == request.max_new_tokens or request.status is Status.CANCELLED
    if not len(tokens):
        return
    twins = {}
    for dtype in (torch.float64, torch.float32):
        twins[dtype] = fi.LanguageModel(model.config).to(CUDA, dtype).eval().requires_grad_(False)
        twins[dtype].load_state_dict(model.state_dict())
    sequence = torch.cat([prompt.to(CUDA), tokens])[None, :-1]
    exact = twins[torch.float64](sequence)[:, len(prompt) - 1 :]
    wrong = (exact[0].argmax(-1) != tokens).nonzero()[:, 0].tolist()
    if wrong:
        ties = {tie.position for tie in find_ties(twins[torch.float32](sequence)[:, len(prompt) - 1 :], exact)}
        assert not [place for place in wrong if place not in ties]


def play(
    engine: fi.Engine, count: int, prompts: int, longest: int, vocab: int, chance: float = 0.6
) -> list[tuple[Request, Tensor]]:
    """Requests of random lengths that come at random steps; every fifth is cancelled on the way."""
    draw, made, cancels = random.Random(count), list[tuple[Request, Tensor]](), list[tuple[int, Request]]()
    step = 0
    while len(made) < count or not engine.idle:
        while len(made) < count and draw.random() < chance:
            prompt = prompt_of(draw.randint(1, prompts), len(made), vocab)
            made.append((engine.submit(prompt, max_new_tokens=draw.randint(1, longest)), prompt))
            if len(made) % 5 == 0:
                cancels.append((step + draw.randint(1, 20), made[-1][0]))
        for _, request in [each for each in cancels if each[0] == step]:
            engine.cancel(request)
        engine.step()
        step += 1
    return made


def test_random_traffic() -> None:
    """More positions than the ring has, with late squares of three sides."""
    model = hyena()
    engine = engine_of(model, slots=8, new_tokens=700, length=1400)
    made = play(engine, 120, 600, 700, 500)
    assert engine.clock > engine.batch.ring
    assert engine.batch.late == 0
    for request, prompt in made:
        check(model, request, prompt)
    assert len({token for request, _ in made for token in request.tokens}) > 50


def test_one_slot() -> None:
    model = hyena()
    engine = engine_of(model, slots=1, new_tokens=300, length=700)
    for request, prompt in play(engine, 8, 400, 300, 500):
        check(model, request, prompt)


def test_few_new_tokens_need_no_large_tiles() -> None:
    model = hyena()
    engine = engine_of(model, slots=5, new_tokens=40, length=700)
    assert not engine.batch.groups.sizes
    for request, prompt in play(engine, 160, 600, 40, 500):
        check(model, request, prompt)
    assert engine.clock > engine.batch.ring


@pytest.mark.parametrize("family", ["striped-hyena", "h3-conv", "stu", "multi-hyena", "s4d"])
def test_random_traffic_of_other_families(family: str) -> None:
    model = family_model(family, length=700).to(CUDA)
    engine = engine_of(model, slots=3, new_tokens=300, length=600)
    made = play(engine, 50, 250, 300, 29)
    assert engine.clock > engine.batch.ring
    for request, prompt in made:
        check(model, request, prompt)


def test_prompts_read_in_pieces_and_prefixes() -> None:
    model = hyena()
    engine = engine_of(model, slots=4, new_tokens=100, length=1400, prefill=128)
    prefix = engine.prefix(prompt_of(300, 1, 500))
    requests = [engine.submit(prompt_of(40, n, 500), prefix=prefix, max_new_tokens=100) for n in range(6)]
    engine.run()
    for n, request in enumerate(requests):
        check(model, request, torch.cat([prompt_of(300, 1, 500), prompt_of(40, n, 500)]))


def test_a_stop_a_nan_and_a_draw_beside_others() -> None:
    model = hyena()
    model.embedding.weight[499], model.head.weight[499] = float("nan"), 0
    prompt, others = prompt_of(50, 3, 490), [prompt_of(20, n, 490) for n in range(2)]
    engine = engine_of(model, slots=6, new_tokens=300, length=700)
    greedy = {"max_new_tokens": 200}
    alone = engine.submit(prompt, **greedy)
    engine.run()
    at = next(i for i, token in enumerate(alone.tokens) if i > 20 and token not in alone.tokens[:i])
    stopped = engine.submit(prompt, **greedy, stop_tokens=[alone.tokens[at]])
    beside = [engine.submit(other, **greedy) for other in others]
    bad = engine.submit(prompt, max_new_tokens=50, allowed=[499])
    drawn = engine.submit(prompt, max_new_tokens=60, temperature=0.8, top_k=1, seed=1)
    engine.run()
    assert stopped.tokens == alone.tokens[: at + 1]
    assert isinstance(bad.error, NumericsError)
    assert drawn.tokens == alone.tokens[:60]
    model.embedding.weight[499] = 0
    for request, other in [(alone, prompt), *zip(beside, others, strict=True)]:
        check(model, request, other)


def test_requests_draw_what_generate_draws() -> None:
    """Each by its own settings, beside others that come and go."""
    model, kinds = hyena(), (
        {"temperature": 0.9, "seed": 1},
        {"temperature": 1.0, "top_k": 20, "seed": 2},
        {"temperature": 1.2, "top_p": 0.8, "min_p": 0.01, "seed": 3},
        {"temperature": 0.7, "repetition_penalty": 1.3, "seed": 4},
        {"allowed": range(100, 140), "repetition_penalty": 2.0},
        {},
    )  # fmt: skip
    engine = engine_of(model, slots=4, new_tokens=300, length=700)
    made = [(prompt_of(5 + 9 * n, n, 500), kinds[n % len(kinds)], 60 + 7 * n) for n in range(18)]
    requests = [engine.submit(prompt, max_new_tokens=new, **settings) for prompt, settings, new in made]
    engine.run()
    for request, (prompt, settings, new) in zip(requests, made, strict=True):
        assert request.tokens == fi.generate(model, prompt[None], max_new_tokens=new, **settings)[0].tolist()


def test_a_batch_that_cannot_fit_is_refused() -> None:
    with pytest.raises(PlanError, match="slots would fit"):
        fi.Engine(hyena(), slots=100_000, new_tokens=700, length=1400)
