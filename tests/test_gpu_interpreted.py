"""The GPU's steps, draws and loop on a CPU, through Triton's interpreter: every number, at sizes that it bears."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

import interpreted  # noqa: F401

# isort: split

from flash_inference import FilterConfig, LanguageModel
from flash_inference.engine.device_sampling import DeviceSampler
from flash_inference.engine.graphs import GpuLoop, decode_gpu, stream_gpu
from flash_inference.engine.sampling import Sampler, Sampling
from flash_inference.errors import LengthError, NumericsError, TilingError
from flash_inference.models import gpu, hyena
from flash_inference.models.gpu import GpuDecoder, gpu_decoder
from flash_inference.ops.causal_conv import causal_conv
from flash_inference.ops.decode_step.triton import Shapes
from flash_inference.ops.decode_step.triton_batch import BatchShape, BatchShapes, GpuBatchStep
from flash_inference.ops.decode_step.triton_few import FEW as FEW_ROWS
from flash_inference.ops.decode_step.triton_few import FewShapes, GpuFewStep
from flash_inference.ops.noise import exponential, stream
from flash_inference.ops.noise.triton import exponential_rows
from flash_inference.testing import (
    greedy_differences,
    random_model,
)
from flash_inference.testing.ties import FACTOR
from flash_inference.tiling import (
    Blocked,
    Relaxed,
    schedule,
)

EPS = torch.finfo(torch.float32).eps
NAN = float("nan")
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("nan_memory")
SOME = Shapes(mix=(8, 1), out=(8, 2), fc1=(32, 1), fc2=(8, 4), head=(16, 2))
FEW = Shapes(mix=(16, 2), out=(16, 1), fc1=(64, 2), fc2=(16, 1), head=(32, 1))
"""One large program a kernel: the interpreter runs them one by one."""


# ---------------------------------------------------------------------------------------------------------- the step


def model_of(order: int = 2, layers: int = 1, vocab: int = 29, width: int = 12, **settings: object) -> LanguageModel:
    """Small, with a seed whose greedy runs keep changing."""
    settings = {"length": 160, "tied": False, "seed": 2 + order, **settings}
    return random_model(order, layers=layers, vocab_size=vocab, width=width, **settings)


def exact_model(model: LanguageModel) -> LanguageModel:
    twin = LanguageModel(model.config).double().eval().requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    return twin


def tolerance(model: LanguageModel, tokens: Tensor, exact: Tensor) -> Tensor:
    """How far logits may lie from `exact`: as far as a tie's gap, from the float32 forward's own largest error."""
    return FACTOR * (model(tokens).double() - exact).abs().max()


def check_step(
    model: LanguageModel, shapes: Shapes | None = SOME, prompt: int = 1, steps: int = 5, least: float = 0.0
) -> None:
    """Given tokens, position after position from the middle of nothing: logits of the float64 forward."""
    decoder = GpuDecoder(model, 64, near=16, shapes=shapes)
    tokens = torch.randint(model.config.vocab_size, (prompt + steps,))
    exact = exact_model(model)(tokens[None])[0]
    bound = max(tolerance(model, tokens[None], exact), torch.tensor(least))
    run, step = decoder.init(prompt, steps), decoder.step.fork()
    first = decoder.prefill(run, tokens[:prompt])
    assert (first - exact[prompt - 1]).abs().max() <= bound
    for offset in range(steps):
        step.start(decoder.exact.embedding.weight[tokens[prompt + offset]][None])
        step.logits.fill_(NAN)
        step.forward(run.history, run.pending, run.clock, offset)
        assert (step.logits - exact[prompt + offset]).abs().max() <= bound


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("short_taps", [1, 2, 3, 4])
def test_one_token_logits(order: int, short_taps: int) -> None:
    check_step(model_of(order, short_taps=short_taps, layers=1 + (short_taps == 3)))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [64, 256, 500, 512, 768, 1000, 1536, 4096, 8192])
def test_a_programs_weights_fit_its_registers(width: int, itemsize: int) -> None:
    for shapes in (Shapes.fit(width, 4 * width, itemsize), FewShapes.fit(width, 4 * width, itemsize)):
        kernels = [(shapes.out, width), (shapes.fc1, width), (shapes.fc2, 4 * width), (shapes.head, width)]
        for (rows, warps), inputs in kernels:
            assert rows * inputs * itemsize <= 255 * 4 * 32 * warps
    assert Shapes.fit(768, 3072) == Shapes()
    assert FewShapes.fit(768, 3072) == FewShapes()


@slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("width", [1, 9, 24])
def test_one_token_logits_of_odd_widths(width: int, tied: bool) -> None:
    model = model_of(width=width, tied=tied, inner=width + 6)
    # One channel has no deviation: what W z is off by is divided by the root of eps alone.
    least = 4 * 2**-24 / model.config.norm_eps**0.5 if width == 1 else 0.0
    check_step(model, shapes=None, steps=3, least=least)


@slow
def test_one_token_logits_of_widths_past_a_piece() -> None:
    check_step(model_of(width=260, inner=1100, vocab=270), steps=2)


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_one_token_logits_of_either_filter(kind: str) -> None:
    check_step(model_of(filter=FilterConfig(kind=kind, width=8)), prompt=20, steps=2)


def streamed(decoder: GpuDecoder) -> list[torch.dtype]:
    """The types of all matrices that a step reads."""
    layers = [layer.__getattribute__(n)[0] for layer in decoder.step.layers for n in ("mix", "out")]
    layers += [layer.__getattribute__(n)[0] for layer in decoder.step.layers for n in ("fc1", "fc2")]
    return [weight.dtype for weight in [*layers, decoder.step.head[0]]]


def test_weights_are_streamed_as_bfloat16_where_that_changes_nothing() -> None:
    model = model_of()
    assert set(streamed(GpuDecoder(model, 32, near=16))) == {torch.float32}
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    assert set(streamed(GpuDecoder(model, 32, near=16))) == {torch.bfloat16}
    check_step(model)
    model.blocks[0].mlp.fc1.weight[0, 0] += 2**-20
    types = streamed(GpuDecoder(model, 32, near=16))
    assert types.count(torch.float32) == 1
    check_step(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_run_in_float32(dtype: torch.dtype) -> None:
    """Their decode is the float64 forward of the same numbers, to float32's rounding."""
    model = model_of(dtype=dtype)
    wide = exact_model(model).float()
    tokens = torch.randint(29, (4,))
    exact = exact_model(model)(tokens[None])[0]
    loop = GpuLoop(GpuDecoder(model, 32, near=16, shapes=FEW), tokens[:1], 4)
    bound = tolerance(wide, tokens[None], exact)
    assert (loop.logits - exact[0]).abs().max() <= bound
    for i in range(1, 4):
        assert (loop.advance(tokens[i : i + 1])[0] - exact[i]).abs().max() <= bound


# ---------------------------------------------------------------------------------------------------------- the loop


def stored_forward(model: LanguageModel, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The float64 forward whose mixers read inputs, and keep sums, rounded once to `dtype`."""

    def rounded(y: Tensor, rho: Tensor) -> Tensor:
        stored = y.to(dtype).to(y.dtype)
        past = causal_conv(stored, rho) - rho[..., :1] * stored
        return past.to(dtype).to(y.dtype) + rho[..., :1] * y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hyena, "causal_conv", rounded)
        return exact_model(model)(tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=slow)], ids=["bf16", "f16"])
@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=slow)])
def test_a_history_of_16_bits_errs_as_its_rounding(dtype: torch.dtype, batch: int) -> None:
    """A sum is rounded once for every tile that adds to it: by squares, by FFT, and by the prompt."""
    model, new = model_of(length=120), 38
    tokens = torch.randint(29, (batch, 5 + new))
    exact = exact_model(model)(tokens)
    bound = FACTOR * (stored_forward(model, tokens, dtype) - exact).abs().max()
    decoder = GpuDecoder(model, 80, near=16, shapes=FEW, batch=batch, batch_shapes=SMALL, dtype=dtype)
    loop = GpuLoop(decoder, list(tokens[:, :5]), new)
    assert loop.run.history.dtype == dtype
    got = [loop.logits.clone(), *(loop.advance(tokens[:, i]).clone() for i in range(5, 5 + new - 1))]
    error = (torch.stack(got, dim=1) - exact[:, 4:-1]).abs().max()
    assert tolerance(model, tokens, exact) < error <= bound


def greedy(model: LanguageModel, prompt: Tensor, new: int, *, latency: str = "bounded", near: int = 16) -> Tensor:
    decoder = GpuDecoder(model, len(prompt) + new - 1, near=near, latency=latency, shapes=FEW)
    return torch.tensor(list(GpuLoop(decoder, prompt, new)))


def check_greedy(model: LanguageModel, prompt: Tensor, tokens: Tensor, distinct: int = 8) -> None:
    differences, _ = greedy_differences(model, prompt[None], tokens[None])
    assert not differences
    assert len(tokens.unique()) >= distinct


NEW = 49
"""A token of the prompt and three graphs: squares, and a large tile by FFT."""


@pytest.mark.parametrize("length", [16, *(pytest.param(each, marks=slow) for each in (1, 3, 40))])
def test_greedy_is_the_full_recompute(length: int) -> None:
    model, prompt = model_of(), torch.randint(29, (length,))
    check_greedy(model, prompt, greedy(model, prompt, NEW))


@slow
@pytest.mark.parametrize(
    "length", [each if each == 17 else pytest.param(each, marks=slow) for each in (1, 3, 16, 17, 40)]
)
def test_both_latencies_give_the_same_tokens(length: int) -> None:
    model, prompt = model_of(), torch.randint(29, (length,))
    bounded, relaxed = (greedy(model, prompt, NEW, latency=latency) for latency in ("bounded", "relaxed"))
    check_greedy(model, prompt, relaxed)
    assert torch.equal(bounded, relaxed)


@slow
@pytest.mark.parametrize(("order", "length", "latency"), [(2, 1, "bounded"), (3, 17, "relaxed"), (3, 35, "bounded")])
def test_greedy_through_several_levels(order: int, length: int, latency: str) -> None:
    model, prompt = model_of(order, layers=2, length=320), torch.randint(29, (length,))
    check_greedy(model, prompt, greedy(model, prompt, 145, latency=latency))


@slow
@pytest.mark.parametrize("length", [5, 35])
def test_groups_of_channels_on_shifted_clocks(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 channels in 4 groups: late squares of every group, one larger than the rest of the run."""
    monkeypatch.setattr(schedule, "FEWEST", 3)
    model, prompt = model_of(), torch.randint(29, (length,))
    decoder = GpuDecoder(model, 150, near=16, shapes=FEW)
    loop = GpuLoop(decoder, prompt, 114)
    assert [tiling.shift for tiling in loop.groups.tilings] == [0, 2, 1, 3]
    check_greedy(model, prompt, torch.tensor(list(loop)))


@slow
def test_spectra_are_made_when_tiles_need_them() -> None:
    model, prompt = model_of(), torch.randint(29, (5,))
    decoder = GpuDecoder(model, 120, near=16, shapes=FEW, spectra_bytes=0)
    assert decoder.ffts
    assert not any(fft.kept for fft in decoder.ffts.values())
    check_greedy(model, prompt, torch.tensor(list(GpuLoop(decoder, prompt, 100))))


@slow
def test_tokens_given_one_by_one_are_those_of_the_graphs() -> None:
    model, prompt = model_of(), torch.randint(29, (1, 5))
    decoder = GpuDecoder(model, 60, near=16, shapes=FEW)
    tokens = torch.stack(list(decode_gpu(decoder, prompt, lambda logits: logits.argmax(-1), 49, None)), dim=1)
    check_greedy(model, prompt[0], tokens[0])
    assert torch.equal(torch.tensor(list(GpuLoop(decoder, prompt[0], 49))), tokens[0])


@slow
def test_rows_given_together_run_one_after_another() -> None:
    model, prompt = model_of(), torch.randint(29, (2, 5))
    decoder = GpuDecoder(model, 30, near=16, shapes=FEW)
    tokens = torch.stack(list(decode_gpu(decoder, prompt, lambda logits: logits.argmax(-1), 18, None)), dim=1)
    for row in range(2):
        check_greedy(model, prompt[row], tokens[row], 4)


@slow
def test_tokens_given_one_by_one_on_the_relaxed_tiling() -> None:
    model, prompt = model_of(3), torch.randint(29, (1, 5))
    decoder = GpuDecoder(model, 90, near=16, latency="relaxed", shapes=FEW)
    steps = decode_gpu(decoder, prompt, lambda logits: logits.argmax(-1), 81, Relaxed(90))
    check_greedy(model, prompt[0], torch.cat(list(steps)))


@slow
def test_two_loops_share_a_decoder() -> None:
    model = model_of()
    decoder = GpuDecoder(model, 60, near=16, shapes=FEW)
    first, second = torch.randint(29, (3,)), torch.randint(29, (9,))
    together = list(zip(GpuLoop(decoder, first, 17), GpuLoop(decoder, second, 17), strict=True))
    check_greedy(model, first, torch.tensor(together)[:, 0], 4)
    check_greedy(model, second, torch.tensor(together)[:, 1], 4)


def test_one_new_token_needs_no_step() -> None:
    model, prompt = model_of(), torch.randint(29, (16,))
    decoder = GpuDecoder(model, 16, near=16)
    assert list(GpuLoop(decoder, prompt, 1)) == [int(model(prompt[None])[0, -1].argmax())]


def test_nan_weights() -> None:
    model = model_of()
    model.blocks[0].mlp.fc2.weight[0, 0] = NAN
    with pytest.raises(NumericsError, match="the logits after the prompt of row 0 are not finite"):
        GpuLoop(GpuDecoder(model, 32, near=16), torch.tensor([1]), 3)


@slow
@pytest.mark.parametrize("value", [NAN, pytest.param(float("inf"), marks=slow)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_logits_that_stop_being_finite(value: float) -> None:
    """The embedding of a token that comes up later: the loop names the position that read it."""
    model, prompt = model_of(), torch.tensor([1])
    tokens = greedy(model, prompt, 12).tolist()
    at = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and token != 1 and i > 2)
    model.embedding.weight[tokens[at]] = value
    decoder = GpuDecoder(model, 32, near=16, shapes=FEW)
    got: list[int] = []
    with pytest.raises(NumericsError, match=f"behind position {at} after the prompt are not finite"):  # noqa: PT012
        for token in GpuLoop(decoder, prompt, 12):
            got.append(token)
    assert got == tokens[: at + 1]
    sampler = Sampler(Sampling(temperature=1.0, top_k=1, seed=0), 1, 29, seen=prompt[None])
    with pytest.raises(NumericsError, match="not finite"):
        list(stream_gpu(decoder, prompt[None], sampler, 12, None))


def test_too_long() -> None:
    model = model_of(length=40)
    with pytest.raises(LengthError, match="41 positions were asked for; this model's filter allows 40"):
        GpuDecoder(model, 41)
    decoder = GpuDecoder(model, 20, near=16)
    with pytest.raises(LengthError, match="a prompt of 5 and 17 new tokens need 21 positions; the decoder has 20"):
        GpuLoop(decoder, torch.zeros(5, dtype=torch.long), 17)
    assert GpuLoop(decoder, torch.zeros(5, dtype=torch.long), 16).new == 16


def test_tilings_without_graphs() -> None:
    decoder = GpuDecoder(model_of(), 20, near=16)
    with pytest.raises(TilingError, match=r"Blocked.*on a GPU generation runs on its own bounded tiling"):
        next(decode_gpu(decoder, torch.tensor([[1]]), lambda logits: logits.argmax(-1), 3, Blocked(20)))


def test_a_decoder_is_kept_while_it_serves() -> None:
    model = model_of()
    kept = gpu_decoder(model, 30)
    assert gpu_decoder(model, 20) is kept
    assert gpu_decoder(model, 40) is not kept
    kept = gpu_decoder(model, 20)
    model.head.weight[0, 0] += 1
    other = gpu_decoder(model, 20)
    assert other is not kept
    assert gpu_decoder(model, 20, "relaxed") is not other
    assert gpu_decoder(model, 20, dtype=torch.bfloat16).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ sampling


def device_sampler(vocab: int, seen: Tensor | None = None, **settings: object) -> DeviceSampler:
    sampling = Sampling(**{"temperature": 1.0, "seed": 3, **settings})
    rows = [] if seen is None else [seen]
    return DeviceSampler.of(Sampler(sampling, 1, vocab, seen=rows), vocab, torch.device("cpu"))


def test_draws_stay_in_the_allowed_set() -> None:
    sampler = device_sampler(11, allowed=(2, 3, 7))
    draws = {int(sampler.draw(torch.randn(11))) for _ in range(200)}
    assert draws == {2, 3, 7}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_top_1_is_greedy(temperature: float) -> None:
    sampler = device_sampler(50, temperature=temperature, top_k=1)
    for _ in range(50):
        logits = torch.randn(50)
        assert int(sampler.draw(logits)) == int(logits.argmax())


def test_greedy_in_an_allowed_set() -> None:
    sampler = device_sampler(11, temperature=0.0, allowed=(2, 3, 7))
    for _ in range(20):
        logits = torch.randn(11)
        assert int(sampler.draw(logits)) == int(torch.tensor([2, 3, 7])[logits[[2, 3, 7]].argmax()])


def test_a_penalty_remembers_what_was_drawn() -> None:
    sampler = device_sampler(4, temperature=0.0, repetition_penalty=2.0, seen=torch.tensor([0]))
    logits = torch.tensor([2.5, 2.0, 1.5, -1.0])
    assert [int(sampler.draw(logits)) for _ in range(3)] == [1, 2, 0]
    below = device_sampler(3, temperature=0.0, repetition_penalty=2.0, seen=torch.tensor([0]))
    assert int(below.draw(torch.tensor([-1.0, -1.5, -9.0]))) == 1


def test_a_seed_repeats_its_draws() -> None:
    logits = torch.randn(40)
    first, second, other = (
        [int(sampler.draw(logits)) for _ in range(50)]
        for sampler in (device_sampler(40), device_sampler(40), device_sampler(40, seed=4))
    )
    assert first == second != other


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_draws_from_logits_that_are_not_finite(value: float) -> None:
    logits = torch.randn(9)
    logits[4] = value
    assert int(device_sampler(9).draw(logits)) == -2


CHANCE = 1e-6


def quantile(freedom: int) -> float:
    """The value that chi-square exceeds with probability CHANCE, by Wilson and Hilferty."""
    z = NormalDist().inv_cdf(1 - CHANCE)
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(sampler: DeviceSampler, logits: Tensor, chances: Tensor) -> float:
    draws = torch.cat([sampler.draw(logits) for _ in range(4000)])
    counts = torch.bincount(draws, minlength=len(logits)).double()
    assert not counts[chances == 0].any()
    expected = 4000 * chances[chances > 0]
    assert (expected >= 5).all()
    return float(((counts[chances > 0] - expected) ** 2 / expected).sum())


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_the_kernels_noise_is_the_noise() -> None:
    streams, drawn, _ = torch.tensor([[stream(3), 0, 7], [-(2**63), 5, 7], [2**63 - 1, 2**40, 7]]).unbind(1)
    wanted = exponential(streams, drawn, 1300)
    torch.testing.assert_close(exponential_rows(streams, drawn, 1300), wanted, rtol=1e-5, atol=0)


@slow
def test_frequencies() -> None:
    chances = torch.tensor([0.4, 0.3, 0.2, 0.09, 0.01], dtype=torch.float64)
    logits = chances.log().float() + 2
    assert chi_square(device_sampler(5), logits, chances) <= quantile(4)
    assert chi_square(device_sampler(5, temperature=0.5, seed=5), logits / 2, chances) <= quantile(4)
    three = torch.tensor([4, 3, 2, 0, 0]) / torch.tensor(9, dtype=torch.float64)
    assert chi_square(device_sampler(5, top_k=3), logits, three) <= quantile(2)
    wrong = torch.tensor([0.3, 0.4, 0.2, 0.09, 0.01], dtype=torch.float64)
    assert chi_square(device_sampler(5), logits, wrong) > quantile(4)


@slow
def test_a_drawn_run_is_drawn_from_the_models_logits() -> None:
    """Through the whole loop: top_k=1 gives the greedy tokens, and a seed repeats a run."""
    model, prompt = model_of(), torch.tensor([[3, 20, 7, 11]])
    decoder = GpuDecoder(model, 40, near=16, shapes=FEW)

    def drawn(**settings: object) -> list[int]:
        sampler = Sampler(Sampling(**settings), 1, 29, seen=prompt)
        return [int(token) for token in stream_gpu(decoder, prompt, sampler, 17, None)]

    best = drawn()
    check_greedy(model, prompt[0], torch.tensor(best), 4)
    assert drawn(temperature=0.7, top_k=1, seed=1) == best
    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1) != best
    settings = {"repetition_penalty": 2.0, "allowed": tuple(range(5, 25))}
    penalised = drawn(**settings)
    host = Sampler(Sampling(**settings), 1, 29, seen=prompt)
    logits = model(torch.cat([prompt[0], torch.tensor(penalised)])[None, :-1])[0, 3:]
    assert [int(host(row[None])) for row in logits] == penalised != best


# -------------------------------------------------------------------------------------------------------------- batches

NARROW = BatchShape(8, 2, 8)
WIDE = BatchShape(16, 1, 8)
SMALL = BatchShapes(NARROW, NARROW, WIDE, NARROW, WIDE)
TALL = BatchShapes(*(BatchShape(8, 2, 16) for _ in range(5)))
STEPS = {"few": (None, GpuFewStep), "eight": (SMALL, GpuBatchStep), "many": (TALL, GpuBatchStep)}
SOME_STEPS = ["eight", pytest.param("few", marks=slow), pytest.param("many", marks=slow)]


def exact_in_bfloat16(model: LanguageModel) -> LanguageModel:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "filter" not in name:
            parameter.copy_(parameter.bfloat16())
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", SOME_STEPS)
@pytest.mark.parametrize("short", [False, True], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("order", "width", "batch"), [(2, 10, 3), pytest.param(3, 20, 5, marks=slow), pytest.param(2, 36, 9, marks=slow)]
)
def test_a_batched_step_is_the_float64_forwards(order: int, width: int, batch: int, short: bool, name: str) -> None:
    shapes, kind = STEPS[name]
    # The interpreter takes its time for one channel a program.
    width, batch, vocabulary = (width, batch, 29) if shapes else (width // 3, min(batch, FEW_ROWS), 9)
    model = random_model(order, vocab_size=vocabulary, width=width, layers=2, length=40)
    model = exact_in_bfloat16(model) if short else model
    decoder = GpuDecoder(model, 40, near=16, batch=batch, batch_shapes=shapes)
    tokens = torch.randint(vocabulary, (batch, 8))
    loop = GpuLoop(decoder, tokens[:, :3], 8)
    assert type(loop.step) is kind
    exact = exact_model(model)(tokens)
    for place in range(3, 8):
        logits = loop.advance(tokens[:, place])
        for row in range(batch):
            bound = tolerance(model, tokens[row, None], exact[row])
            assert (logits[row] - exact[row, place]).abs().max() <= bound


@pytest.mark.parametrize("batch", [4, 16, 17, 64])
@pytest.mark.parametrize("width", [1, 200, 512, 768, 1536, 5000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_shapes_of_every_model_are_whole_eights(batch: int, width: int, itemsize: int) -> None:
    shapes = BatchShapes.fit(batch, width, itemsize)
    for shape in (shapes.mix._replace(rows=2 * shapes.mix.rows), shapes.out, shapes.fc1, shapes.fc2, shapes.head):
        assert shape.rows > 0 < shape.batch
        assert shape.rows % 8 == shape.batch % 8 == 0
        assert shape.warps <= 32


@slow
@pytest.mark.parametrize("short", [False, True], ids=["f32", "bf16"])
def test_a_batch_by_the_shapes_that_fit_it(short: bool) -> None:
    model = random_model(2, vocab_size=29, width=40, layers=1, length=60)
    model = exact_in_bfloat16(model) if short else model
    prompts = [torch.randint(29, (n,)) for n in (5, 1, 18, 7, 2)]
    loop = GpuLoop(GpuDecoder(model, 60, near=16, batch=5), prompts, 30)
    assert loop.step.shapes == BatchShapes.fit(5, 40, 2 if short else 4)
    rows = torch.stack([torch.tensor(tokens) for tokens in loop], dim=1)
    for prompt, tokens in zip(prompts, rows, strict=True):
        check_greedy(model, prompt, tokens, 4)


@slow
@pytest.mark.parametrize("latency", ["bounded", "relaxed"])
def test_ragged_rows_on_one_clock(latency: str) -> None:
    model = exact_in_bfloat16(random_model(2, vocab_size=29, width=10, layers=2, length=90))
    prompts = [torch.randint(29, (n,)) for n in (5, 1, 18)]
    decoder = GpuDecoder(model, 90, near=16, batch=3, batch_shapes=SMALL, latency=latency)
    rows = torch.stack([torch.tensor(tokens) for tokens in GpuLoop(decoder, prompts, 66)], dim=1)
    for prompt, tokens in zip(prompts, rows, strict=True):
        check_greedy(model, prompt, tokens, 4)


@slow
def test_a_batch_whose_squares_run_on_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MANY", 3)
    model, prompts = model_of(length=160), [torch.randint(29, (length,)) for length in (40, 3, 17)]
    decoder = GpuDecoder(model, 140, near=64, batch=3, batch_shapes=SMALL)
    rows = torch.stack([torch.tensor(tokens) for tokens in GpuLoop(decoder, prompts, 98)], dim=1)
    for prompt, tokens in zip(prompts, rows, strict=True):
        check_greedy(model, prompt, tokens, 4)


@pytest.mark.parametrize("name", SOME_STEPS)
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_row_that_stops_being_finite_is_named(value: float, name: str) -> None:
    width, vocabulary = (4, 20) if STEPS[name][0] else (2, 5)
    model = random_model(2, vocab_size=vocabulary, width=width, layers=1, length=40)
    prompts = torch.randint(1, vocabulary, (2, 3))
    decoder = GpuDecoder(model, 40, near=16, batch=2, batch_shapes=STEPS[name][0])
    loop = GpuLoop(decoder, prompts, 6)
    loop.step.start(torch.stack([torch.randn(width), torch.full((width,), value)]))
    with pytest.raises(NumericsError, match="row 1"):
        list(loop)


def test_rows_that_share_a_prompt_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(2, vocab_size=29, width=10, layers=1, length=40)
    decoder, read = GpuDecoder(model, 40, near=16, batch=3, batch_shapes=SMALL), []
    prefill = GpuDecoder.prefill
    monkeypatch.setattr(GpuDecoder, "prefill", lambda *args: read.append(args[-1]) or prefill(*args))
    one, two = torch.tensor([3, 1, 4]), torch.tensor([1, 5])
    loop = GpuLoop(decoder, [one, two, one], 4)
    assert read == [0, 1]
    assert torch.equal(loop.run.history[:, ::3], loop.run.history[:, 2::3])
    rows = torch.stack([torch.tensor(tokens) for tokens in loop], dim=1)
    assert torch.equal(rows[0], rows[2])
