"""Rows that come and go on a GPU's clock, through Triton's interpreter: each gets the tokens that it gets alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import interpreted  # noqa: F401

# isort: split

import flash_inference as fi
from family_models import family_model
from flash_inference.engine import batch as batches
from flash_inference.engine.batch_gpu import Flight, GpuBatch
from flash_inference.engine.graphs import stream_gpu
from flash_inference.engine.request import Request, Status
from flash_inference.engine.sampling import Sampler, Sampling
from flash_inference.errors import NumericsError, PlanError, StateError, TilingError
from flash_inference.models import gpu
from flash_inference.models.gpu import GRAPH, GpuDecoder
from flash_inference.models.long_conv import LongConvConfig
from flash_inference.ops.decode_step.triton_batch import BatchShape, BatchShapes
from flash_inference.ops.tile_conv.fft_rows import TileFFT
from flash_inference.testing import fft_bound, greedy_differences, random_model, tile_conv_oracle
from flash_inference.tiling import Relaxed, schedule
from flash_inference.tiling.schedule import Pricing

NAN, EPS = float("nan"), torch.finfo(torch.float32).eps
slow = pytest.mark.slow
NARROW, WIDE = BatchShape(8, 2, 8), BatchShape(16, 1, 8)
SMALL = BatchShapes(NARROW, NARROW, WIDE, NARROW, WIDE)


class LateBatch(GpuBatch):
    """The host sees a graph's tokens when two more are launched, as on a device."""

    def _is_done(self, flight: Flight) -> bool:
        return len(self._flights) > 2


def model_of(layers: int = 1, length: int = 200, **settings: Any) -> fi.LanguageModel:
    return random_model(2, layers=layers, vocab_size=29, width=12, length=length, tied=False, seed=4, **settings)


def one_layer(length: int) -> fi.LanguageModel:
    """16 channels by its own modules: the interpreter runs few kernels. Its filters make tokens depend on the past."""
    taps = fi.FilterConfig("squashed", options={"threshold": 0.0})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = fi.LanguageModel(LongConvConfig(29, 16, 1, length, filter=taps, tied=False)).eval()
        for name, weight in model.requires_grad_(False).named_parameters():
            if "filter" in name:
                weight.mul_(10)
            elif weight.ndim > 1:
                weight.normal_(std=1.0 if 29 in weight.shape else 0.6)
            elif name.endswith("bias"):
                weight.normal_(std=0.2)
    return model


def engine_of(
    model: fi.LanguageModel, slots: int, new: int, length: int, near: int = 16, pricing: Pricing | None = None
) -> fi.Engine:
    """An engine on what its kernels do through the interpreter."""
    decoder = GpuDecoder(
        model, length, near=near, batch=slots, batch_shapes=SMALL, lives=new, pricing=pricing
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "open_batch", lambda *args: LateBatch(decoder, 1 << 40))
        return fi.Engine(model, slots=slots, new_tokens=new, length=length)


def direct_sums(history: Tensor, rho: Tensor, sources: range, targets: range, clock: Tensor, batch: int = 1) -> None:
    """What `tile_rows` computes, which has tests of its own, faster than the interpreter does."""
    now = int(clock[0])
    s, t = (torch.arange(now + some.start, now + some.stop) for some in (sources, targets))
    taps = rho[t[:, None] - s].repeat_interleave(batch, dim=2)
    history[t] += (taps * history[s]).sum(1)


def plain_turn(
    fft: TileFFT, given: Tensor, sources: range, out: Tensor, targets: range, channels: range, batch: int,
    ring: int | None = None, since: Tensor | None = None, scratch: Tensor | None = None, more: bool = False,
) -> None:  # fmt: skip
    """What TileFFT computes, likewise."""
    S, T, n = len(sources), len(targets), 4 * fft.size
    lanes = slice(channels.start * batch, channels.stop * batch)
    read, write = (torch.tensor([i % ring if ring else i for i in some]) for some in (sources, targets))
    y = given[read, lanes]
    if since is not None:
        early = torch.arange(sources.start, sources.stop)[:, None] < since.repeat(len(channels))
        y = y.masked_fill(early, 0)
    rho = fft.taps(fft.lag, fft.lag + 2 * fft.size, channels).repeat_interleave(batch, dim=0)
    z = torch.fft.irfft(torch.fft.rfft(y.T, n=n) * torch.fft.rfft(rho, n=n), n=n)
    out[write, lanes] += z[:, S : S + T].T


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares and circles by PyTorch."""
    monkeypatch.setattr(gpu, "tile_rows", direct_sums)
    monkeypatch.setattr(TileFFT, "_turn", plain_turn)


def prompt_of(n: int, seed: int) -> Tensor:
    return torch.randint(29, (n,), generator=torch.Generator().manual_seed(seed))


def check(model: fi.LanguageModel, request: Request, prompt: Tensor, whole: bool = True) -> None:
    """A request's tokens are those of the full recompute, ties aside."""
    tokens = torch.tensor(request.tokens, dtype=torch.long)
    assert not whole or len(tokens) == request.max_new_tokens
    assert not len(tokens) or not greedy_differences(model, prompt[None], tokens[None])[0]


def play(engine: fi.Engine, seed: int, count: int, longest: int) -> list[tuple[Request, Tensor]]:
    """Requests of random lengths that come at random steps; every fifth is cancelled on the way."""
    draw, made, cancels = random.Random(seed), list[tuple[Request, Tensor]](), list[tuple[int, Request]]()
    step = 0
    while len(made) < count or not engine.idle:
        while len(made) < count and draw.random() < 0.6:
            prompt = prompt_of(draw.randint(1, 40), len(made))
            request = engine.submit(prompt, max_new_tokens=draw.randint(1, longest))
            made.append((request, prompt))
            if len(made) % 5 == 0:
                cancels.append((step + draw.randint(1, 3), request))
        for _, request in [each for each in cancels if each[0] == step]:
            engine.cancel(request)
        engine.step()
        step += 1
    return made


@pytest.mark.parametrize(
    "family", ["striped-hyena", "s4d", *(pytest.param(name, marks=slow) for name in ("stu", "h3-conv", "multi-hyena"))]
)
def test_random_traffic(family: str) -> None:
    """The ring comes around, and with it the caches that are laid out by the clock."""
    model = family_model(family)
    engine = engine_of(model, 2, 32, 90)
    made = play(engine, 2, 8, 32)
    assert engine.clock > engine.batch.ring
    for request, prompt in made:
        check(model, request, prompt, request.status is Status.FINISHED)


@pytest.mark.usefixtures("quick")
def test_the_ring_comes_around_again() -> None:
    model = one_layer(120)
    engine = engine_of(model, 2, 60, 100)
    made = play(engine, 4, 26, 60)
    assert engine.clock > 2 * engine.batch.ring + 32
    for request, prompt in made:
        check(model, request, prompt, request.status is Status.FINISHED)


@slow
def test_random_traffic_of_the_fused_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "FEWEST", 3)
    model = model_of(length=120)
    engine = engine_of(model, 3, 60, 100)
    assert [tiling.shift for tiling in engine.batch.groups.tilings] == [0, 2, 1, 3]
    made = play(engine, 1, 14, 60)
    assert engine.clock > engine.batch.ring
    for request, prompt in made:
        check(model, request, prompt, request.status is Status.FINISHED)
    assert {request.status for request, _ in made} == {Status.FINISHED, Status.CANCELLED}


@pytest.mark.usefixtures("quick")
def test_rows_join_and_leave_while_tiles_are_half_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of 64 and 128 whose chunks wait for two graphs, of groups on shifted clocks, in a ring of 384."""
    monkeypatch.setattr(schedule, "FEWEST", 8)
    model = one_layer(220)
    engine, waiting = engine_of(model, 3, 100, 200, near=64, pricing=Pricing(target=0.001)), list[int]()
    engine.batch.schedule.margin, enter = 0.1, engine.batch.enter

    def noted(row: int, request: Request) -> None:
        tiles = {(chunk.sources, chunk.targets) for chunk in engine.batch.schedule._heap}
        waiting.append(sum(sources.start < engine.clock < targets.stop for sources, targets in tiles))
        enter(row, request)

    monkeypatch.setattr(engine.batch, "enter", noted)
    made = play(engine, 3, 26, 100)
    assert engine.clock > engine.batch.ring
    assert sum(waiting) > 5
    for request, prompt in made:
        check(model, request, prompt, request.status is Status.FINISHED)
    runs = {tuple(request.tokens[i : i + 4]) for request, _ in made for i in range(len(request.tokens) - 4)}
    assert len(runs) > 500


def test_a_row_of_the_fused_steps_joins_another() -> None:
    """The rows that run are embedded again, to the same numbers; a prompt of one token, and a row without steps."""
    model = model_of(length=60)
    engine = engine_of(model, 2, 20, 60)
    prompts = [prompt_of(n, n) for n in (5, 1, 17)]
    first = engine.submit(prompts[0], max_new_tokens=20)
    engine.step()
    others = [engine.submit(prompt, max_new_tokens=new) for prompt, new in zip(prompts[1:], (9, 1), strict=True)]
    engine.run()
    assert [request.joined for request in (first, *others)] == [0, GRAPH, None]
    for request, prompt in zip((first, *others), prompts, strict=True):
        check(model, request, prompt)


def test_tokens_behind_a_stop_are_dropped_and_the_slot_is_free() -> None:
    model, prompt = family_model("s4d"), prompt_of(6, 3)
    alone = fi.generate(model, prompt, max_new_tokens=30)[0].tolist()
    at = next(i for i, token in enumerate(alone) if i > 3 and token not in alone[:i])
    engine = engine_of(model, 1, 64, 100)
    request = engine.submit(prompt, max_new_tokens=64, stop_tokens=[alone[at]])
    after = engine.submit(prompt_of(3, 1), max_new_tokens=5)
    engine.run()
    assert request.tokens == alone[: at + 1]
    assert after.joined is not None
    assert after.joined <= 4 * GRAPH
    check(model, after, prompt_of(3, 1))
    assert engine.idle
    assert not engine.running


@pytest.mark.usefixtures("quick")
def test_a_row_that_becomes_nan_ends_with_an_error_of_its_own() -> None:
    """Its neighbours' tokens are unchanged, and so are those of the next one in its row."""
    model = one_layer(120)
    prompts = [prompt_of(4, 1), torch.tensor([9]), prompt_of(7, 2)]
    model.embedding.weight[28] = NAN
    alone = engine_of(model, 2, 24, 100)
    requests = [alone.submit(prompt % 28, max_new_tokens=24, allowed=range(28)) for prompt in prompts]
    alone.run()
    engine = engine_of(model, 2, 24, 100)
    good = engine.submit(prompts[0] % 28, max_new_tokens=24, allowed=range(28))
    bad = engine.submit(prompts[1], max_new_tokens=24, allowed=[28])
    later = engine.submit(prompts[2] % 28, max_new_tokens=24, allowed=range(28))
    engine.run()
    assert bad.status is Status.FAILED
    assert isinstance(bad.error, NumericsError)
    assert f"request {bad.number} are not finite after 1 new tokens" in str(bad.error)
    assert good.tokens == requests[0].tokens
    assert later.row is None
    assert later.tokens == requests[2].tokens


@pytest.mark.usefixtures("quick")
def test_requests_draw_by_their_own_samplers() -> None:
    """A request that samples beside a greedy one, which joined before and goes on after it."""
    model = one_layer(120)
    settings = {"temperature": 0.9, "top_k": 12, "repetition_penalty": 1.2, "seed": 5}
    engine = engine_of(model, 2, 60, 100)
    greedy = engine.submit(prompt_of(4, 1), max_new_tokens=60)
    engine.step()
    drawn = engine.submit(prompt_of(9, 2), max_new_tokens=20, **settings)
    engine.run()
    check(model, greedy, prompt_of(4, 1))
    sampler = Sampler(Sampling(**settings), 1, 29, seen=[prompt_of(9, 2)])
    alone = stream_gpu(GpuDecoder(model, 40, near=16), prompt_of(9, 2)[None], sampler, 20, None)
    assert drawn.tokens == [int(tokens) for tokens in alone]


@pytest.mark.usefixtures("quick")
def test_a_prefix_is_read_once() -> None:
    model = one_layer(120)
    engine = engine_of(model, 2, 20, 100)
    prefix = engine.prefix(prompt_of(30, 4))
    requests = [engine.submit(prompt_of(3, n), prefix=prefix, max_new_tokens=20) for n in range(3)]
    engine.run()
    for n, request in enumerate(requests):
        check(model, request, torch.cat([prompt_of(30, 4), prompt_of(3, n)]))


@pytest.mark.usefixtures("quick")
def test_what_an_engine_on_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer(120)
    engine = engine_of(model, 1, 20, 100)
    first, second = (engine.submit(prompt_of(4, n), max_new_tokens=20) for n in range(2))
    engine.step()
    with pytest.raises(StateError, match="request 1 has a row on a GPU"):
        engine.pause(first)
    engine.pause(second)
    engine.run()
    assert second.status is Status.PAUSED
    engine.resume(second)
    engine.run()
    check(model, second, prompt_of(4, 1))
    monkeypatch.setattr(batches, "on_graphs", lambda model: True)
    with pytest.raises(TilingError, match="an engine runs on its own tiling"):
        fi.Engine(model, slots=1, new_tokens=20, tiling=Relaxed(None, taps=32))
    with pytest.raises(PlanError, match=r"40000 slots for 20 new tokens each need .* (19|20)\d\d\d slots would fit"):
        fi.Engine(model, slots=40_000, new_tokens=20, memory=needed(model, 20_000))
    assert fi.Engine(model, slots=2, new_tokens=20, memory=1 << 40).batch.ring == 128


def needed(model: fi.LanguageModel, slots: int) -> int:
    """Bytes for so many slots, as a refusal tells them."""
    with pytest.raises(PlanError) as refused:
        fi.Engine(model, slots=slots, new_tokens=20, memory=1)
    return int(float(str(refused.value).split("need ")[1].split()[0]) * 2**30)


@pytest.mark.parametrize(("prompt", "new"), [(1, 1), (1, 60), (5, 3), (40, 50), (70, 60), (100, 7)])
def test_what_a_prompt_owes_is_its_direct_sum(prompt: int, new: int) -> None:
    """By taps near the prompt, by kept spectra behind, by taps alone where no circle holds it."""
    decoder = GpuDecoder(one_layer(200), 200, near=16, lives=60, spectra_bytes=1 << 20)
    assert [fft.kept for fft in decoder.ffts.values()] == [True] * 3
    inputs = torch.randn(16, prompt)
    owed = decoder.owed(inputs, new)
    rho = decoder.padded(0, prompt + new, range(16))
    exact = tile_conv_oracle(inputs.T[:, None], rho, 1, new)
    bound = 2 * fft_bound(inputs.T[:, None], rho, 0, 256, EPS)
    assert ((owed[:, None] - exact).abs() <= bound).all()
