"""Decoding changes no number: cached steps equal the full forward, for any tiling, prompt, batch and split."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_inference import FilterConfig, LanguageModel, generate
from flash_inference.engine.decode import decode, default_tiling
from flash_inference.mixers.stack import STAGE
from flash_inference.models.decoder import Decoder
from flash_inference.testing import greedy_differences, model_oracle, random_model
from flash_inference.testing.strategies import KINDS, chunks, lengths, tilings
from flash_inference.tiling import Prompted, Separated, Spread, Tiling

EXACT = 1e-10
DISTINCT = 8
LENGTH, STEPS = 2048, 4096
SEEDS = range(20)
PROMPTS = range(258)

orders = pytest.mark.parametrize("order", [2, 3, 4])
slow = pytest.mark.slow


def each(values: Iterator[int] | range, quick: set[int]) -> list:
    """All values, those that are not quick marked slow."""
    return [value if value in quick else pytest.param(value, marks=slow) for value in values]


def prompt_of(length: int, batch: int = 1, vocab: int = 64) -> Tensor:
    return torch.randint(vocab, (batch, length))


def decoded(
    decoder: Decoder, prompt: Tensor, n: int, tiling: Tiling | None = None, beside: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, n], and the logits [B, n, V] that they were chosen from."""
    logits: list[Tensor] = []

    def choose(row: Tensor) -> Tensor:
        logits.append(row.clone())
        helpers.update(thread.name for thread in threading.enumerate() if thread.name.startswith("flash-inference"))
        return row.argmax(-1)

    helpers: set[str] = set()
    tokens = list(decode(decoder, prompt, choose, max_new_tokens=n, tiling=tiling, beside=beside))
    if beside is not None and tiling is not None:
        staged = tiling.block if tiling.block > 1 else STAGE
        assert bool(helpers) == (beside and bool(tiling.slacks) and min(tiling.slacks) >= staged)
    return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)


def check_double(
    model: LanguageModel, decoder: Decoder, prompt: Tensor, n: int, tiling: Tiling | None = None
) -> Tensor:
    """Decodes in float64 and compares every step's logits with one full forward."""
    tokens, logits = decoded(decoder, prompt, n, tiling)
    full = model(torch.cat([prompt, tokens], dim=1)[:, :-1])[:, prompt.shape[1] - 1 :]
    assert (logits - full).abs().max() <= EXACT
    assert torch.equal(tokens, full.argmax(-1))
    return tokens


def check_greedy(model: LanguageModel, prompt: Tensor, tokens: Tensor) -> None:
    """Greedy tokens equal the recompute; ties are listed as warnings, in pytest's summary."""
    differences, ties = greedy_differences(model, prompt, tokens)
    assert not differences
    for tie in ties:
        warnings.warn(f"tie: prompt of {prompt.shape[1]}, {tie}", stacklevel=2)


def distinct(tokens: Tensor) -> int:
    return min(len(row.unique()) for row in tokens)


# ------------------------------------------------------------------------------------------------------------ float64


@orders
@pytest.mark.parametrize("kind", each(["default", *KINDS], {"default", "Relaxed", "Spread-16-8-16"}))
def test_float64_decode_is_the_full_forward(order: int, kind: str) -> None:
    model = random_model(order, seed=order, dtype=torch.float64, length=LENGTH + 1)
    tiling = None if kind == "default" else KINDS[kind](LENGTH, None)
    tokens = check_double(model, model.decoder(), prompt_of(1), LENGTH, tiling)
    assert distinct(tokens) >= DISTINCT


@orders
@pytest.mark.parametrize("filter", ["implicit", "explicit", "unmodulated"])
@pytest.mark.parametrize("batch", [1, 3])
def test_float64_decode_of_every_filter_and_batch(order: int, filter: str, batch: int) -> None:
    config = FilterConfig(kind=filter.replace("unmodulated", "implicit"), width=16, modulate=filter != "unmodulated")
    model = random_model(order, seed=1, dtype=torch.float64, filter=config, length=300, short_taps=order)
    check_double(model, model.decoder(), prompt_of(21, batch), 200)


@orders
def test_float64_decode_is_the_definition(order: int) -> None:
    model = random_model(order, seed=2, dtype=torch.float64, length=300, tied=order == 3)
    prompt = prompt_of(30, 2)
    tokens, logits = decoded(model.decoder(), prompt, 150)
    exact = model_oracle(model, torch.cat([prompt, tokens], dim=1)[:, :-1])[:, 29:]
    assert (logits - exact).abs().max() <= EXACT


@pytest.mark.parametrize("short_taps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("prompt", [1, 2, 3, 6])
def test_short_convolutions_of_any_width(short_taps: int, prompt: int) -> None:
    model = random_model(3, dtype=torch.float64, short_taps=short_taps, length=64)
    for fused in (True, False):
        decoder = Decoder(model, 64)
        decoder.fused = decoder.fused if fused else None
        check_double(model, decoder, prompt_of(prompt, 2), 40)


@settings(max_examples=60)
@given(data=st.data())
def test_any_tiling_and_any_split(data: st.DataObject) -> None:
    """Teacher-forced in random chunks, with random starts: every logit equals the full forward of each row alone."""
    torch.manual_seed(0)
    length = data.draw(lengths(160), "length")
    model = random_model(data.draw(st.sampled_from((2, 3, 4)), "order"), dtype=torch.float64, length=160, width=6)
    batch = data.draw(st.integers(1, 3), "batch")
    start = data.draw(st.none() | st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch), "start")
    decoder = Decoder(model, length)
    if data.draw(st.booleans(), "through the modules"):
        decoder.fused = None
    tokens = prompt_of(length, batch)
    begun = None if start is None else torch.tensor(start)
    state = decoder.init(batch, data.draw(tilings(length), "tiling"), start=begun)
    outputs, at = [], 0
    for n in data.draw(chunks(length), "chunks"):
        outputs.append(decoder.extend(state, tokens[:, at : at + n], every=True))
        at += n
    logits = torch.cat(outputs, dim=1)
    assert (state.clock, state.batch) == (length, batch)
    for row, s in enumerate(start or [0] * batch):
        alone = model(tokens[row : row + 1, s:])
        assert (logits[row : row + 1, s:] - alone).abs().max() <= EXACT


@orders
@pytest.mark.parametrize("fused", [True, False], ids=["numpy", "modules"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_both_ways_to_step(order: int, fused: bool, dtype: torch.dtype) -> None:
    model = random_model(order, seed=3, dtype=dtype, length=400)
    decoder = Decoder(model, 400)
    assert decoder.fused is not None
    if not fused:
        decoder.fused = None
    for batch, length in ((1, 1), (1, 33), (5, 40)):
        prompt = prompt_of(length, batch)
        if dtype == torch.float64:
            check_double(model, decoder, prompt, 300)
        else:
            check_greedy(model, prompt, decoded(decoder, prompt, 300)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_history_in_short_floats_stays_close(dtype: torch.dtype) -> None:
    """Stored history of eps more than float32's: logits move, but by no more than a few eps of their size a layer."""
    model = random_model(2, length=300)
    decoder, tokens = Decoder(model, 300), prompt_of(300, 2)
    states = [decoder.init(2, default_tiling(300), dtype=kind) for kind in (None, dtype)]
    exact, short = (
        torch.cat([decoder.extend(state, tokens[:, t : t + 1], every=True) for t in range(300)], 1) for state in states
    )
    assert states[1].stack.history.dtype == dtype
    change = (short - exact).norm() / exact.norm()
    assert 0 < change <= 300**0.5 * model.config.layers * torch.finfo(dtype).eps


# ------------------------------------------------------------------------------------------------------------ float32


@orders
@pytest.mark.parametrize("seed", each(SEEDS, {0}))
def test_greedy_tokens_for_4096_steps(order: int, seed: int) -> None:
    model = random_model(order, seed=seed, length=STEPS + 32)
    prompt = prompt_of(1 + seed)
    tokens = generate(model, prompt, max_new_tokens=STEPS)
    assert tokens.shape == (1, STEPS)
    assert distinct(tokens) >= DISTINCT
    check_greedy(model, prompt, tokens)


@pytest.mark.parametrize("length", each(PROMPTS, {*range(41), 63, 64, 65, 127, 128, 129, 251, 255, 256, 257}))
def test_greedy_tokens_after_every_prompt(length: int) -> None:
    """An empty prompt begins with the start token."""
    prompt = prompt_of(length)
    for seed in range(length, length + 5):
        model = random_model(2 + length % 3, seed=seed, length=1024)
        tokens = generate(model, prompt, max_new_tokens=300)
        check_greedy(model, prompt if length else torch.tensor([[model.config.start_token]]), tokens)
        if distinct(tokens) >= DISTINCT:
            return
    pytest.fail(f"no model of five makes {DISTINCT} distinct tokens")


LONG_AFTER = {0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257}


@slow
@pytest.mark.parametrize("length", PROMPTS)
def test_long_greedy_runs_after_every_prompt(length: int) -> None:
    """Long enough for the tiling of long runs; 4,096 steps after some."""
    model = random_model(2 + length % 3, seed=100 + length, length=STEPS + 260)
    prompt = prompt_of(length)
    tokens = generate(model, prompt, max_new_tokens=STEPS if length in LONG_AFTER else 1100)
    check_greedy(model, prompt if length else torch.tensor([[model.config.start_token]]), tokens)


@orders
def test_greedy_tokens_of_every_tiling(order: int) -> None:
    """float32 tokens equal the recompute whatever the tiling; float64 tokens are the same for all."""
    single, double = (random_model(order, seed=5, dtype=dtype, length=420) for dtype in (torch.float32, torch.float64))
    prompt, n = prompt_of(45, 2), 200
    expected = generate(double, prompt, max_new_tokens=n)
    assert distinct(expected) >= DISTINCT
    for make in KINDS.values():
        for tiling in (make(45 + n - 1, None), Prompted(make(n - 1, None), 45)):
            assert torch.equal(generate(double, prompt, max_new_tokens=n, tiling=tiling), expected)
            check_greedy(single, prompt, generate(single, prompt, max_new_tokens=n, tiling=tiling))


# -------------------------------------------------------------------------------------------------- batches and threads


@orders
@pytest.mark.parametrize("batch", [2, 7, pytest.param(32, marks=slow)])
def test_a_row_does_not_depend_on_its_neighbours(order: int, batch: int) -> None:
    model = random_model(order, seed=6, dtype=torch.float64, length=300)
    prompt = prompt_of(20, batch)
    tokens, logits = decoded(model.decoder(), prompt, 200)
    for row in range(batch):
        alone, own = decoded(model.decoder(), prompt[row : row + 1], 200)
        assert torch.equal(tokens[row : row + 1], alone)
        assert (logits[row : row + 1] - own).abs().max() <= EXACT


@pytest.mark.parametrize(
    "make",
    [
        lambda n: Spread(Separated(n, 8, 4), 4),
        lambda n: Spread(Separated(n, 16, 8), 16),
        lambda n: Separated(n, 16, 8),
        lambda n: default_tiling(max(n, 1100)),
    ],
    ids=["spread-8-4-4", "spread-16-8-16", "separated", "default"],
)
def test_paying_beside_changes_no_number(make: Callable[[int], Tiling]) -> None:
    model = random_model(3, seed=7, length=1300)
    prompt, n = prompt_of(37, 4), 500
    tiling = Prompted(make(n - 1), 37)
    (a, la), (b, lb) = (decoded(model.decoder(), prompt, n, tiling, beside) for beside in (False, True))
    assert torch.equal(a, b)
    assert torch.equal(la, lb)
    check_greedy(model, prompt, b)


def test_paying_beside_leaves_the_callers_threads_alone() -> None:
    model, before = random_model(3, length=100), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        decoded(model.decoder(), prompt_of(4, 4), 40, Prompted(Spread(Separated(39, 8, 4), 4), 4), beside=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind](300, None).slacks] + ["default"])
@pytest.mark.parametrize("prompted", [True, False], ids=["prompted", "plain"])
def test_paying_beside_is_exact_however_threads_interleave(kind: str, prompted: bool) -> None:
    """Python switches threads as often as it can; every logit still equals the full forward."""
    model = random_model(3, seed=7, dtype=torch.float64, length=800)

    def make(length: int) -> Tiling:
        return Spread(Separated(length, 64, 32), 64) if kind == "default" else KINDS[kind](length, None)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(4):
            prompt, n = prompt_of(37, 4), 400
            tiling = Prompted(make(n - 1), 37) if prompted else make(37 + n - 1)
            tokens, logits = decoded(model.decoder(), prompt, n, tiling, beside=True)
            full = model(torch.cat([prompt, tokens], dim=1)[:, :-1])[:, 36:]
            wrong = ((logits - full).abs().amax((0, 2)) > EXACT).nonzero()
            assert not len(wrong), f"first wrong step: {int(wrong[0])}"
    finally:
        sys.setswitchinterval(interval)
