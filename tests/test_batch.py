"""Continuous batching: each request computes what it computes alone, whoever else comes, goes or fails."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_inference import LanguageModel, generate
from flash_inference.engine.batch import PATIENCE, Engine
from flash_inference.engine.batch_host import endless
from flash_inference.engine.plan import WORKSPACE, filter_bytes
from flash_inference.engine.request import Request, Status
from flash_inference.errors import (
    LengthError,
    NumericsError,
    PlanError,
    SamplingError,
    ShapeError,
    StateError,
    TilingError,
    TokenError,
)
from flash_inference.mixers.rows import inputs_of
from flash_inference.models.decoder import Decoder, ModelState
from flash_inference.models.rows import fork, leave, lengthened, row_bytes, slot_bytes
from flash_inference.models.snapshot import load_state, save_state
from flash_inference.ops.decode_step.numpy import alike
from flash_inference.testing import random_model
from flash_inference.tiling import Blocked, Relaxed, Separated, Spread

EXACT = 1e-9
SLOTS, NEW, LENGTH = 3, 30, 64


def mixed_model() -> LanguageModel:
    """Every kind of mixer; its widths fill the kernels' vectors: torch's products depend on a row's place otherwise."""
    from test_families import ToyConfig

    generator = torch.Generator().manual_seed(1)
    config = ToyConfig(32, 16, 5, LENGTH, pattern=("modal", "hyena", "cache", "fir", "window"), tied=False)
    model = LanguageModel(config).double().eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if not any(part in name for part in ("rho", "poles")):
            scale = 1.0 if weight.ndim < 2 else weight.shape[-1] ** -0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return model


MODELS = {"hyena": random_model(3, vocab_size=32, length=LENGTH, dtype=torch.float64), "mixed": mixed_model()}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


class Recorder:
    """A sampler that keeps the logits that it was shown."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.sampling, self.logits = sampler, SimpleNamespace(plain=False), list[Tensor]()

    def __call__(self, logits: Tensor) -> Tensor:
        self.logits.append(logits[0].clone())
        return self.sampler(logits)


def submit(engine: Engine, prompt: Tensor | None, **settings: Any) -> Request:
    request = engine.submit(prompt, **settings)
    request.sampler = Recorder(request.sampler)  # type: ignore[assignment]
    return request


def logits_of(request: Request) -> Tensor:
    return torch.stack(request.sampler.logits)  # type: ignore[attr-defined]


def prompt_of(n: int, seed: int) -> Tensor:
    return torch.randint(32, (n,), generator=torch.Generator().manual_seed(seed))


def check(model: LanguageModel, request: Request, prompt: Tensor) -> None:
    """The logits are those of one forward over prompt and tokens, which shares no code with the engine."""
    whole = torch.cat([prompt, torch.tensor(request.tokens[:-1], dtype=torch.long)])
    exact = model(whole[None])[0, len(prompt) - 1 :]
    assert (logits_of(request) - exact).abs().max() <= EXACT
    if request.sampler.sampler.sampling.plain:  # type: ignore[attr-defined]
        assert exact.argmax(-1).tolist() == request.tokens


def move_clock(engine: Engine, clock: int) -> None:
    """Moves the clock on to `clock` modulo the period with requests that end before."""
    while (clock - engine.clock) % engine.period:
        filler = engine.submit([1], max_new_tokens=engine.new_tokens)
        while not filler.ended and (clock - engine.clock) % engine.period:
            engine.step()
        engine.cancel(filler)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 34), st.integers(1, NEW), st.sampled_from([0.0, 0.8])),
        st.tuples(st.just("step"), st.integers(1, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("pause"), st.integers(0, 20)),
        st.tuples(st.just("resume"), st.integers(0, 20)),
    ),
    min_size=4,
    max_size=25,
)
TILINGS = {
    "blocked": Blocked(None, taps=32, block=32),
    "relaxed": Relaxed(None, taps=32),
    "spread": Spread(Separated(None, near=4, block=4, taps=32), every=2),
}


def play(engine: Engine, script: list[Any]) -> tuple[list[tuple[Request, Tensor, dict[str, Any]]], set[Request]]:
    """Runs a script of joins, leaves and steps to its end; the requests, and those that were paused."""
    made: list[tuple[Request, Tensor, dict[str, Any]]] = []
    paused: set[Request] = set()
    for name, *values in script:
        if name == "submit":
            asked = {"max_new_tokens": values[1], "temperature": values[2], "seed": len(made)}
            prompt = prompt_of(values[0], len(made))
            made.append((submit(engine, prompt, **asked), prompt, asked))
        elif name == "step":
            for _ in range(values[0]):
                engine.step()
        elif made:
            request = made[values[0] % len(made)][0]
            if name == "cancel":
                engine.cancel(request)
            elif name == "pause" and request.status in (Status.WAITING, Status.RUNNING):
                engine.pause(request)
                paused.add(request)
            elif name == "resume" and request.status is Status.PAUSED:
                engine.resume(request)
    for request, _, _ in made:
        if request.status is Status.PAUSED:
            engine.resume(request)
    engine.run()
    return made, paused


@models
@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS.keys())
@settings(max_examples=6)
@given(script=operations)
def test_a_request_computes_what_it_computes_alone(model: LanguageModel, tiling: Any, script: list[Any]) -> None:
    engine = Engine(model, slots=SLOTS, new_tokens=NEW, length=LENGTH, prefill=16, tiling=tiling)
    empty = engine.nbytes
    made, paused = play(engine, script)
    assert engine.nbytes == empty
    for request, prompt, asked in made:
        if request.status is Status.CANCELLED:
            continue
        assert request.status is Status.FINISHED
        assert len(request.tokens) == asked["max_new_tokens"]
        check(model, request, prompt)
        if request not in paused and request.joined is not None:
            other = Engine(model, slots=SLOTS, new_tokens=NEW, length=LENGTH, prefill=16, tiling=tiling)
            move_clock(other, request.joined)
            alone = submit(other, prompt, **asked)
            other.run()
            assert alone.tokens == request.tokens
            assert torch.equal(logits_of(alone), logits_of(request))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_of_a_product_are_padded_only_where_that_makes_them_alike(dtype: str) -> None:
    """Not all of BLAS's kernels can: with those rows are as many as were asked for."""
    random = np.random.default_rng(1)
    row, matrix = (random.standard_normal((n, 40)).astype(dtype) for n in (1, 40))

    def same(rows: int) -> bool:
        made = np.dot(np.repeat(row, rows, axis=0), matrix)
        return bool((made == made[0]).all())

    for batch in range(1, 34):
        rows = alike(batch, 40, dtype)
        assert batch <= rows <= -(-batch // 8) * 8
        assert same(rows) or rows == batch
        assert rows == batch or not same(batch)


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_full_batch_is_each_row_alone_bit_for_bit_in_any_row(model: LanguageModel, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).to(dtype)
    asked = [(prompt_of(1 + 5 * n % 31, n), 1 + 7 * n % NEW) for n in range(8)]
    runs = []
    for order in (range(8), [5, 2, 7, 0, 3, 6, 1, 4]):
        engine = Engine(model, slots=8, new_tokens=NEW, length=LENGTH)
        requests = {n: submit(engine, asked[n][0], max_new_tokens=asked[n][1]) for n in order}
        engine.run()
        runs.append(requests)
    for n, (prompt, new) in enumerate(asked):
        engine = Engine(model, slots=8, new_tokens=NEW, length=LENGTH)
        alone = submit(engine, prompt, max_new_tokens=new)
        engine.run()
        for requests in runs:
            assert torch.equal(logits_of(alone), logits_of(requests[n]))


@models
def test_engines_of_any_number_of_slots_give_the_tokens_of_generate(model: LanguageModel) -> None:
    prompt = prompt_of(9, 0)
    settings_ = {"max_new_tokens": 20, "temperature": 0.9, "top_k": 12, "repetition_penalty": 1.2, "seed": 5}
    expected = generate(model, prompt, **settings_)[0].tolist()
    for slots in (1, 2, 7, 32):
        engine = Engine(model, slots=slots, new_tokens=NEW, length=LENGTH)
        others = [engine.submit(prompt_of(n, n), max_new_tokens=25) for n in range(1, slots)]
        request = submit(engine, prompt, **settings_)
        engine.run()
        assert request.tokens == expected
        check(model, request, prompt)
        assert all(other.status is Status.FINISHED for other in others)


def test_one_hundred_requests_at_any_clock_have_the_tokens_of_the_full_recompute() -> None:
    model = MODELS["hyena"]
    engine = Engine(model, slots=7, new_tokens=NEW, length=LENGTH)
    requests = []
    for n in range(100):
        prompt = prompt_of(1 + n * 13 % 34, n)
        requests.append((submit(engine, prompt, max_new_tokens=1 + n * 7 % NEW), prompt))
        for _ in range(n % 5):
            engine.step()
    engine.run()
    for request, prompt in requests:
        check(model, request, prompt)


def test_long_rows_with_tiles_clipped_to_their_lives_are_exact() -> None:
    model = random_model(vocab_size=32, width=8, length=1500, dtype=torch.float64)
    for tiling in (None, Spread(Separated(None, near=32, block=32, taps=512), every=8)):
        engine = Engine(model, slots=3, new_tokens=500, length=1500, tiling=tiling)
        requests = []
        for n, (size, new) in enumerate([(5, 500), (700, 90), (40, 300), (1, 450), (300, 200)]):
            prompt = prompt_of(size, n)
            requests.append((submit(engine, prompt, max_new_tokens=new), prompt))
            for _ in range(37 * n):
                engine.step()
        engine.run()
        for request, prompt in requests:
            check(model, request, prompt)


def test_rows_end_by_their_own_stops_and_settings() -> None:
    model = MODELS["hyena"]
    engine = Engine(model, slots=4, new_tokens=NEW, length=LENGTH)
    kinds: list[dict[str, Any]] = [
        {"max_new_tokens": 20, "temperature": 1.0, "seed": 1, "stop_tokens": [3, 4, 5, 6]},
        {"max_new_tokens": 1},
        {"max_new_tokens": 25, "allowed": [7, 9, 11], "temperature": 2.0, "seed": 2},
        {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.8, "min_p": 0.01, "seed": 3},
        {"max_new_tokens": 30, "temperature": 1.0, "seed": 9, "stop": [chr(n) for n in range(5)]},
    ]
    requests = [engine.submit(prompt_of(4, n), **kind) for n, kind in enumerate(kinds)]
    events = list(engine)
    for n, (request, kind) in enumerate(zip(requests, kinds, strict=True)):
        want = generate(model, prompt_of(4, n), **kind)[0].tolist()
        assert request.tokens == want[: len(request.tokens)]
        assert len(request.tokens) == len(want)
        mine = [event for event in events if event.request is request]
        assert [event.token for event in mine] == request.tokens
        assert [event.ended for event in mine] == [False] * (len(mine) - 1) + [True]
    assert engine.idle
    assert engine.step() == []


def test_turns_are_priorities_first_then_order_and_nobody_waits_for_ever() -> None:
    engine = Engine(MODELS["hyena"], slots=1, new_tokens=NEW, length=LENGTH)
    requests = [engine.submit([n], max_new_tokens=2, priority=p) for n, p in enumerate([0, 0, 1, -1, 1])]
    ended = [event.request for event in engine if event.ended]
    assert ended == [requests[n] for n in (2, 4, 0, 1, 3)]
    late = engine.submit([1], max_new_tokens=2)
    engine.steps += PATIENCE + 1
    urgent = engine.submit([1], max_new_tokens=2, priority=1)
    assert [event.request for event in engine if event.ended] == [late, urgent]


@models
def test_a_long_prompt_is_read_beside_the_rows_within_its_budget(model: LanguageModel) -> None:
    engine = Engine(model, slots=2, new_tokens=NEW, length=LENGTH, prefill=4)
    first = submit(engine, prompt_of(3, 0), max_new_tokens=25)
    engine.step()
    second, clock = submit(engine, prompt_of(30, 1), max_new_tokens=5), engine.clock
    for n in range(1, 8):
        assert len(engine.step()) == 1
        assert second.prefix is not None
        assert second.prefix.state.clock == 4 * n
    assert {event.request for event in engine.step()} == {first, second}
    assert second.joined == clock + 7
    engine.run()
    check(model, first, prompt_of(3, 0))
    check(model, second, prompt_of(30, 1))


@models
def test_a_prefix_is_read_once_for_all_that_begin_with_it(model: LanguageModel) -> None:
    engine = Engine(model, slots=3, new_tokens=NEW, length=LENGTH)
    read, extend = [], engine.batch.reader.extend
    prefix = engine.prefix(prompt_of(20, 0))

    def counted(state: Any, tokens: Tensor) -> Tensor:
        read.append(tokens.shape[1] if state is not engine.batch.state else 0)
        return extend(state, tokens)

    engine.batch.reader = engine.queue.decoder = copy.copy(engine.batch.reader)
    engine.batch.reader.extend = counted  # type: ignore[method-assign]
    suffixes = [None, None, prompt_of(5, 1), prompt_of(1, 2), None, prompt_of(9, 3)]
    requests = [submit(engine, suffix, max_new_tokens=12, prefix=prefix) for suffix in suffixes]
    engine.run()
    assert sum(read) == 20 + 5 + 1 + 9
    for request, suffix in zip(requests, suffixes, strict=True):
        check(model, request, torch.cat([prompt_of(20, 0), *([] if suffix is None else [suffix])]))
    held = engine.nbytes - engine.batch.state.nbytes
    assert held == row_bytes(model, 20) == prefix.nbytes
    del prefix
    gc.collect()
    assert engine.nbytes == engine.batch.state.nbytes
    with pytest.raises(StateError, match=r"the prefix is another engine's; make it with this engine's prefix\(\)\."):
        engine.submit([1], max_new_tokens=2, prefix=Engine(model, slots=1, new_tokens=2, length=8).prefix([1]))


def poisoned(model: LanguageModel) -> LanguageModel:
    model = copy.deepcopy(model)
    model.embedding.weight[31] = torch.nan
    return model


@models
def test_a_row_with_nan_ends_alone_and_its_neighbours_are_unchanged(model: LanguageModel) -> None:
    model, runs = poisoned(model), []
    prompts = [prompt_of(n, n).clamp(max=30) for n in (4, 9, 17)]
    settings_ = {"max_new_tokens": 25, "allowed": range(31), "temperature": 0.5, "seed": 1}
    for bad in (True, False):
        engine = Engine(model, slots=4, new_tokens=NEW, length=LENGTH)
        requests = [submit(engine, prompts[0], **settings_)]
        if bad:
            failing = [engine.submit([1], max_new_tokens=9, allowed=[31]), engine.submit([31], max_new_tokens=9)]
        requests += [submit(engine, prompt, **settings_) for prompt in prompts[1:]]
        engine.run()
        later = submit(engine, prompts[0], **settings_)
        engine.run()
        runs.append([*requests, later])
        if bad:
            assert [request.status for request in failing] == [Status.FAILED] * 2
            assert [request.tokens for request in failing] == [[31], []]
            for request, words in zip(failing, ("request 2 are not finite after 1 new", "a prompt of 1"), strict=True):
                assert isinstance(request.error, NumericsError)
                assert words in str(request.error)
    for one, other in zip(*runs, strict=True):
        assert one.joined == other.joined
        assert one.tokens == other.tokens
        assert torch.equal(logits_of(one), logits_of(other))


def tensor_bytes() -> int:
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_a_thousand_cancels_leave_memory_flat() -> None:
    model = random_model(vocab_size=32, width=4, layers=1, length=LENGTH, dtype=torch.float64)
    n = torch.Generator().manual_seed(0)
    engine = Engine(model, slots=4, new_tokens=NEW, length=LENGTH)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=n))

    def traffic(cancels: int) -> int:
        alive: list[Request] = []
        for _ in range(cancels):
            alive.append(engine.submit(prompt_of(1 + draw(20), 0), max_new_tokens=1 + draw(NEW)))
            for _ in range(draw(2)):
                engine.step()
            request = alive.pop(draw(len(alive)))
            row = request.row
            engine.cancel(request)
            assert request.row is None
            assert row is None or engine.batch.requests[row] is None
        for request in alive:
            engine.cancel(request)
        engine.run()
        return engine.nbytes

    held = traffic(50)
    before = tensor_bytes()
    assert traffic(1000) == held == engine.batch.state.nbytes
    assert tensor_bytes() <= before


def test_what_cannot_fit_is_refused_before_anything_is_allocated_and_the_others_go_on() -> None:
    model, tokens = MODELS["hyena"], []
    fixed = WORKSPACE + filter_bytes(model, LENGTH, endless(NEW)) + 2 * slot_bytes(model, endless(NEW), LENGTH)
    room = row_bytes(model, 20) + 64 * 8 * NEW
    for refused in (False, True):
        engine = Engine(model, slots=2, new_tokens=NEW, length=LENGTH, memory=fixed + room)
        request = submit(engine, prompt_of(5, 0), max_new_tokens=20)
        engine.step()
        held = engine.nbytes
        if refused:
            with pytest.raises(PlanError, match=r"a prompt of 50 tokens with 9 new ones needs .* About \d+ prompt"):
                engine.submit(prompt_of(50, 0), max_new_tokens=9)
            with pytest.raises(
                LengthError, match=r"5 prompt tokens and 31 new ones .* has room for 30 new ones, 64 in"
            ):
                engine.submit(prompt_of(5, 0), max_new_tokens=31)
            bad: Any
            for bad, error in (([99], TokenError), ([[1], [2]], ShapeError)):
                with pytest.raises(error):
                    engine.submit(bad, max_new_tokens=2)
            with pytest.raises(SamplingError):
                engine.submit([1], max_new_tokens=2, top_k=0)
            assert engine.nbytes == held
        engine.run()
        tokens.append((request.tokens, logits_of(request)))
    assert tokens[0][0] == tokens[1][0]
    assert torch.equal(tokens[0][1], tokens[1][1])
    with pytest.raises(
        PlanError, match=r"2 slots for 30 new tokens each need .* 1 slots would fit, or more with fewer"
    ):
        Engine(model, slots=2, new_tokens=NEW, length=LENGTH, memory=fixed - 1)
    with pytest.raises(ShapeError, match=r"slots is 0 and prefill is None; expected at least 1 of each\."):
        Engine(model, slots=0, new_tokens=NEW)
    with pytest.raises(LengthError, match=r"pays lags below 16; rows of 30 new tokens need as many\. Build it with"):
        Engine(model, slots=1, new_tokens=NEW, tiling=Blocked(None, taps=16))
    with pytest.raises(TilingError, match=r"ends; rows that come and go need one without"):
        Engine(model, slots=1, new_tokens=NEW, tiling=Blocked(64))


def test_requests_wait_for_the_bytes_that_others_hold() -> None:
    model = MODELS["hyena"]
    fixed = WORKSPACE + filter_bytes(model, LENGTH, endless(NEW)) + 3 * slot_bytes(model, endless(NEW), LENGTH)
    room = row_bytes(model, 30) + 64 * 8 * NEW
    engine = Engine(model, slots=3, new_tokens=NEW, length=LENGTH, memory=fixed + room)
    requests = [submit(engine, prompt_of(30, n), max_new_tokens=5) for n in range(4)]
    while not engine.idle:
        engine.step()
        assert len(engine.running) <= 1
        assert engine.nbytes - engine.batch.state.nbytes <= room
    for n, request in enumerate(requests):
        check(model, request, prompt_of(30, n))
    prefix = engine.prefix(prompt_of(25, 0))
    engine.submit(None, max_new_tokens=2, prefix=prefix)
    engine.run()
    starved = engine.submit(prompt_of(30, 0), max_new_tokens=5)
    engine.run()
    assert isinstance(starved.error, PlanError)
    assert "has no room: prefixes that are kept and paused requests hold" in str(starved.error)


@models
def test_bytes_are_known_before_they_are_taken(model: LanguageModel) -> None:
    engine = Engine(model, slots=2, new_tokens=NEW, length=LENGTH)
    assert engine.batch.state.nbytes == 2 * slot_bytes(model, engine.batch.tiling, LENGTH)
    for positions in (1, 32, 33):
        assert engine.batch.reader.init(1, Blocked(positions)).nbytes == row_bytes(model, positions)


@models
def test_a_paused_request_rejoins_and_one_that_waits_may_pause(model: LanguageModel) -> None:
    engine = Engine(model, slots=1, new_tokens=NEW, length=LENGTH)
    first, second = (submit(engine, prompt_of(11, n), max_new_tokens=25) for n in range(2))
    for _ in range(6):
        engine.step()
    engine.pause(first)
    engine.pause(second)
    with pytest.raises(StateError, match=r"request 1 is paused; only one that waits or runs can pause\."):
        engine.pause(first)
    engine.resume(second)
    engine.run()
    engine.resume(first)
    for _ in range(5):
        engine.step()
    engine.pause(first)
    engine.resume(first)
    engine.run()
    check(model, first, prompt_of(11, 0))
    check(model, second, prompt_of(11, 1))
    with pytest.raises(StateError, match=r"request 1 is finished; only a paused one can resume\."):
        engine.resume(first)
    engine.cancel(first)
    assert first.status is Status.FINISHED


@models
@settings(max_examples=4)
@given(at=st.integers(1, 20), rows=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_forked_rows_go_their_own_ways(model: LanguageModel, at: int, rows: list[int]) -> None:
    decoder, tokens = model.decoder(), torch.stack([prompt_of(LENGTH, n) for n in range(3)])
    state = decoder.init(3, Blocked(LENGTH, block=4))
    decoder.extend(state, tokens[:, :at])
    for t in range(at, at + 5):
        decoder.extend(state, tokens[:, t : t + 1])
    branch, at = fork(decoder, state, rows), at + 5
    others = torch.stack([prompt_of(LENGTH, 10 + n) for n in range(len(rows))])
    whole = torch.cat([tokens[rows, :at], others[:, at:]], 1)
    for t in range(at, at + 20):
        logits = decoder.extend(branch, whole[:, t : t + 1])
        assert (logits - model(whole[:, : t + 1])[:, -1]).abs().max() <= EXACT
        logits = decoder.extend(state, tokens[:, t : t + 1])
        assert (logits - model(tokens[:, : t + 1])[:, -1]).abs().max() <= EXACT
    with pytest.raises(ShapeError, match=r"rows are \[3\]; expected some of 0 \.\. 2"):
        fork(decoder, state, [3])


@models
@settings(max_examples=4)
@given(at=st.integers(1, 30), way=st.sampled_from(["restored", "forked", "cloned"]))
def test_an_engine_goes_on_bit_for_bit_from_a_restored_or_forked_state(
    model: LanguageModel, tmp_path_factory: pytest.TempPathFactory, at: int, way: str
) -> None:
    runs = []
    for changed in (False, True):
        engine = Engine(model, slots=SLOTS, new_tokens=NEW, length=LENGTH)
        requests = [submit(engine, prompt_of(3 + 9 * n, n), max_new_tokens=9 + 4 * n) for n in range(5)]
        for _ in range(at):
            engine.step()
        if changed and way == "restored":
            path = tmp_path_factory.mktemp("state") / "state"
            save_state(engine.batch.reader, engine.batch.state, path)
            engine.batch.state = load_state(engine.batch.reader, path)
        elif changed and way == "cloned":
            left, engine.batch.state = engine.batch.state, engine.batch.reader.clone(engine.batch.state)
            left.start.zero_()
        elif changed:
            engine.batch.state = fork(engine.batch.reader, engine.batch.state, range(SLOTS))
        engine.run()
        runs.append([(request.tokens, logits_of(request)) for request in requests])
    for (tokens, logits), (other_tokens, other_logits) in zip(*runs, strict=True):
        assert tokens == other_tokens
        assert torch.equal(logits, other_logits)


def test_a_corrupted_state_is_refused_by_name(tmp_path: Any) -> None:
    engine = Engine(MODELS["hyena"], slots=SLOTS, new_tokens=NEW, length=LENGTH)
    engine.submit([1, 2], max_new_tokens=9)
    engine.step()
    path = tmp_path / "rows.state"
    save_state(engine.batch.reader, engine.batch.state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"rows\.state is damaged: its sha256 is not the one written in it"):
        load_state(engine.batch.reader, path)


@models
def test_a_row_that_leaves_is_what_it_would_be_alone(model: LanguageModel) -> None:
    engine = Engine(model, slots=2, new_tokens=NEW, length=LENGTH)
    request = submit(engine, prompt_of(7, 0), max_new_tokens=25)
    for _ in range(12):
        engine.step()
    decoder = engine.batch.reader
    assert request.prefix is not None
    out = leave(decoder, engine.batch.state, request.row, request.prefix.state)
    tokens = torch.cat([prompt_of(7, 0), torch.tensor(request.tokens[:-1])])
    alone = decoder.init(1, Blocked(len(tokens)))
    decoder.extend(alone, tokens[None])
    every = range(len(tokens))
    assert out.clock == len(tokens)
    difference = inputs_of(decoder.stack, out.stack, 0, every) - inputs_of(decoder.stack, alone.stack, 0, every)
    assert difference.abs().max() <= EXACT
    whole = torch.cat([tokens, prompt_of(20, 5)])
    more, at = lengthened(decoder, out, len(whole)), len(tokens)
    for n in (1, 1, 7, 1, 10):
        logits = decoder.extend(more, whole[None, at : at + n])
        at += n
        assert (logits - model(whole[None, :at])[:, -1]).abs().max() <= EXACT


@pytest.mark.slow
def test_an_engine_runs_for_ever_in_fixed_memory() -> None:
    """Random traffic over many turns of the ring; every hundredth request is checked against the full recompute."""
    model = random_model(vocab_size=32, width=4, layers=1, length=LENGTH, dtype=torch.float64)
    engine, n = Engine(model, slots=3, new_tokens=NEW, length=LENGTH), torch.Generator().manual_seed(0)
    begun, watched, count, memory = engine.clock, [], 0, []
    while engine.clock - begun < 100_000:
        size, new, gap, kind = torch.randint(1, 30, (4,), generator=n).tolist()
        prompt = prompt_of(size, count)
        request = submit(engine, prompt, max_new_tokens=new)
        count += 1
        if count % 100 == 0:
            watched.append((request, prompt))
        elif kind == 1:
            engine.step()
            engine.cancel(request)
        for _ in range(gap):
            engine.step()
        while len(engine.queue) > 20:
            engine.step()
        if count % 1_000 == 0:
            engine.run()
            for request, prompt in watched:
                check(model, request, prompt)
            watched, request, prompt = [], None, None
            memory.append(tensor_bytes())
    assert len(memory) >= 5
    assert len(set(memory)) == 1


def test_steps_beside_blas_keep_pytorch_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pools of threads on the same cores wait for each other; the caller's setting comes back."""
    model, seen = random_model(2, layers=1, vocab_size=31, width=8, length=60), list[tuple[int, int]]()
    extend = Decoder.extend

    def noted(decoder: Decoder, state: ModelState, tokens: Tensor, *, every: bool = False) -> Tensor:
        if tokens.shape[1] == 1 and state.step is not None and state.clock >= 4:
            seen.append((len(tokens), torch.get_num_threads()))
        return extend(decoder, state, tokens, every=every)

    monkeypatch.setattr(Decoder, "extend", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for rows in (1, 3):
            generate(model, [[1, 2, 3, 4]] * rows, max_new_tokens=9)
        engine = Engine(model, slots=2, new_tokens=9, length=40)
        engine.submit([1, 2, 3, 4, 5], max_new_tokens=9)
        engine.run()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {(1, 2), (3, 1), (2, 1)} == set(seen)
