"""Decoding on a GPU changes no number: long runs against float64, every way to run, and the library's own calls."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("gpu: no CUDA device here, or Triton's interpreter is on", allow_module_level=True)
pytest.importorskip("triton")

import flash_inference as fi
from flash_inference.engine.graphs import GpuLoop, decode_gpu
from flash_inference.engine.verify import verify
from flash_inference.errors import LengthError, NumericsError, PlanError, TilingError
from flash_inference.models import hyena
from flash_inference.models.gpu import GRAPH, GpuDecoder
from flash_inference.ops.causal_conv import causal_conv
from flash_inference.testing import find_ties, random_model
from flash_inference.testing.ties import FACTOR
from flash_inference.tiling import Blocked, Relaxed

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DISTINCT = 8
NAN = float("nan")


def gpu_model(
    order: int = 2, *, layers: int = 2, width: int = 256, vocab: int = 1000, length: int = 4096, short: bool = False,
    **settings: object,
) -> fi.LanguageModel:  # fmt: skip
    """On the GPU; `short` rounds every weight to bfloat16, so that matrices are streamed so."""
    model = random_model(
        order, layers=layers, width=width, vocab_size=vocab, length=length, tied=False,
        filter=fi.FilterConfig(width=16), **settings,
    )  # fmt: skip
    if short:
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.to(CUDA)


def twin(model: fi.LanguageModel, dtype: torch.dtype, device: torch.device = CUDA) -> fi.LanguageModel:
    """The same numbers in another type or place, without what the model keeps for decoding."""
    other = fi.LanguageModel(model.config).to(device, dtype).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def check_greedy(model: fi.LanguageModel, prompt: Tensor, tokens: Tensor) -> None:
    """Tokens [N] after prompt [P] are the float64 forward's, ties aside; a tie is measured with a float32 forward."""
    sequence = torch.cat([prompt.to(CUDA), tokens.to(CUDA)])[None, :-1]
    first = len(prompt) - 1
    exact = twin(model, torch.float64)(sequence)[:, first:]
    wrong = (exact[0].argmax(-1) != tokens.to(CUDA)).nonzero()[:, 0].tolist()
    ties = (
        {tie.position for tie in find_ties(twin(model, torch.float32)(sequence)[:, first:], exact)} if wrong else set()
    )
    assert not [place for place in wrong if place not in ties]
    assert len(tokens.unique()) >= DISTINCT


def agree(model: fi.LanguageModel, prompt: Tensor, one: Tensor, two: Tensor) -> None:
    """The same tokens; two ways to sum may part at a tie, from where on each must be right for itself."""
    check_greedy(model, prompt, one)
    if not torch.equal(one, two):
        check_greedy(model, prompt, two)


def run(decoder: GpuDecoder, prompt: Tensor, new: int, **settings: object) -> Tensor:
    return torch.tensor(list(GpuLoop(decoder, prompt, new, **settings)))


def prompt_of(length: int, vocab: int = 1000) -> Tensor:
    return torch.randint(vocab, (length,))


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("short", [False, True], ids=["f32", "bf16"])
def test_20000_tokens_are_the_float64_forwards(short: bool) -> None:
    model = gpu_model(3, layers=3, length=20_001, short=short)
    decoder = GpuDecoder(model, 20_001)
    assert (decoder.step.head[0].dtype == torch.bfloat16) == short
    prompt = prompt_of(1)
    loop = GpuLoop(decoder, prompt, 20_000)
    loop.prepare()
    tokens = torch.tensor(list(loop))
    assert loop.late == 0
    check_greedy(model, prompt, tokens)


@pytest.mark.parametrize("width", [768, 1536])
def test_wide_models(width: int) -> None:
    model, prompt = gpu_model(width=width, length=2048), prompt_of(33)
    check_greedy(model, prompt, run(GpuDecoder(model, 2000), prompt, 1900))


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 3, 16, 17, 40, 300, 1025])
def test_prompts_of_any_length(order: int, length: int) -> None:
    model, prompt = gpu_model(order, width=200), prompt_of(length)
    check_greedy(model, prompt, run(GpuDecoder(model, length + 1199), prompt, 1200))


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_short_taps_and_tied_heads(taps: int, tied: bool) -> None:
    model = random_model(2, width=72, vocab_size=300, length=1200, short_taps=taps, tied=tied).to(CUDA)
    prompt = prompt_of(5, 300)
    check_greedy(model, prompt, run(GpuDecoder(model, 1100), prompt, 1000))


@torch.no_grad()
def rows_of(decoder: GpuDecoder, prompts: list[Tensor], new: int) -> list[Tensor]:
    return list(torch.stack([torch.tensor(tokens) for tokens in GpuLoop(decoder, prompts, new)], dim=1))


@pytest.mark.parametrize("batch", [2, 7, 8, 17, 32, 40, 64])
@pytest.mark.parametrize("short", [False, True], ids=["f32", "bf16"])
def test_batches_of_ragged_rows(batch: int, short: bool) -> None:
    model = gpu_model(2 if batch % 2 else 3, width=200, short=short)
    prompts = [prompt_of(1 + 13 * row % 40) for row in range(batch)]
    decoder = GpuDecoder(model, 1500, batch=batch)
    for prompt, tokens in zip(prompts, rows_of(decoder, prompts, 1400), strict=True):
        check_greedy(model, prompt, tokens)


@pytest.mark.parametrize("width", [768, 1536])
def test_batches_of_wide_models(width: int) -> None:
    model, prompts = gpu_model(width=width, length=2048, short=True), [prompt_of(5) for _ in range(9)]
    for prompt, tokens in zip(prompts, rows_of(GpuDecoder(model, 900, batch=9), prompts, 800), strict=True):
        check_greedy(model, prompt, tokens)


def test_a_long_batch_pays_every_tile() -> None:
    model, prompts = gpu_model(width=128, length=8400), [prompt_of(3), prompt_of(150)]
    decoder = GpuDecoder(model, 8400, batch=2)
    for prompt, tokens in zip(prompts, rows_of(decoder, prompts, 8192), strict=True):
        check_greedy(model, prompt, tokens)


def test_a_batch_reads_nothing_before_it_is_written(nan_memory: None) -> None:
    model, prompts = gpu_model(3), [prompt_of(9), prompt_of(20)]
    for prompt, tokens in zip(prompts, rows_of(GpuDecoder(model, 700, batch=2), prompts, 600), strict=True):
        check_greedy(model, prompt, tokens)


def test_nothing_is_read_before_it_is_written(nan_memory: None) -> None:
    model, prompt = gpu_model(3), prompt_of(9)
    check_greedy(model, prompt, run(GpuDecoder(model, 2100), prompt, 2000))


def test_all_ways_to_run_give_the_same_tokens() -> None:
    """Bounded and relaxed, graphs and launches, dependent launches or not, spectra kept or made, other cuts."""
    model, prompt, new = gpu_model(3), prompt_of(20), 3000
    decoder = GpuDecoder(model, 3100)
    reference = run(decoder, prompt, new)
    check_greedy(model, prompt, reference)
    assert torch.equal(run(decoder, prompt, new), reference)
    assert torch.equal(run(decoder, prompt, new, graphs=False), reference)
    agree(model, prompt, run(GpuDecoder(model, 3100, pdl=False), prompt, new), reference)
    agree(model, prompt, run(GpuDecoder(model, 3100, latency="relaxed"), prompt, new), reference)
    agree(model, prompt, run(GpuDecoder(model, 3100, spectra_bytes=0), prompt, new), reference)
    agree(model, prompt, run(GpuDecoder(model, 3100, near=256), prompt, new), reference)
    agree(model, prompt, run(GpuDecoder(model, 4096), prompt, new), reference)


def test_two_loops_at_once() -> None:
    model, prompts = gpu_model(), (prompt_of(7), prompt_of(40))
    decoder = GpuDecoder(model, 1600)
    alone = [run(decoder, prompt, 1500) for prompt in prompts]
    loops = [GpuLoop(decoder, prompt, 1500) for prompt in prompts]
    together = torch.tensor(list(zip(*loops, strict=True)))
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[:, row], alone[row])
        check_greedy(model, prompt, alone[row])


@pytest.mark.parametrize("latency", ["bounded", "relaxed"])
def test_tokens_chosen_on_the_host(latency: str) -> None:
    """Two rows; logits at every step within the float32 forward's own error."""
    model, prompt, logits = gpu_model(3), torch.randint(1000, (2, 21)), []

    def choose(rows: Tensor) -> Tensor:
        logits.append(rows.clone())
        return rows.argmax(-1)

    tiling = None if latency == "bounded" else Relaxed(1100)
    decoder = GpuDecoder(model, 1100, latency=latency)
    tokens = torch.stack(list(decode_gpu(decoder, prompt, choose, 1000, tiling)), dim=1)
    sequence = torch.cat([prompt, tokens], dim=1)[:, :-1].to(CUDA)
    exact = twin(model, torch.float64)(sequence)[:, 20:]
    bound = FACTOR * (twin(model, torch.float32)(sequence)[:, 20:] - exact).abs().max()
    assert (torch.stack(logits, dim=1).to(CUDA) - exact).abs().max() <= bound
    for row in range(2):
        check_greedy(model, prompt[row], tokens[row])
        agree(model, prompt[row], run(decoder, prompt[row], 1000), tokens[row])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("latency", ["bounded", "relaxed"])
def test_graphs_of_one_position_change_no_bit(batch: int, latency: str) -> None:
    """Every offset and every side, over 600 given positions."""
    model, prompts = gpu_model(3), list(torch.randint(1000, (batch, 21)))
    decoder = GpuDecoder(model, 700, latency=latency, batch=batch, near=128)
    given = torch.randint(1000, (600, batch))
    logits = []
    for graphs in (True, False):
        loop = GpuLoop(decoder, prompts, 601, graphs=graphs)
        logits.append(torch.stack([loop.advance(tokens) for tokens in given]))
        assert len(loop._captured) == (GRAPH if graphs else 0)
        loop.close()
    assert torch.equal(*logits)
    assert torch.isfinite(logits[0]).all()


@torch.no_grad()
def stored_forward(model: fi.LanguageModel, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The float64 forward whose mixers read inputs, and keep sums, rounded once to `dtype`."""

    def rounded(y: Tensor, rho: Tensor) -> Tensor:
        stored = y.to(dtype).to(y.dtype)
        past = causal_conv(stored, rho) - rho[..., :1] * stored
        return past.to(dtype).to(y.dtype) + rho[..., :1] * y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hyena, "causal_conv", rounded)
        return twin(model, torch.float64)(tokens)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_history_of_16_bits_errs_as_its_rounding(dtype: torch.dtype, batch: int) -> None:
    """A sum is rounded once for every tile that adds to it; 2,000 positions, so tiles up to 512."""
    model, new = gpu_model(3), 2000
    tokens = torch.randint(1000, (batch, 30 + new))
    exact = twin(model, torch.float64)(tokens.to(CUDA))
    bound = FACTOR * (stored_forward(model, tokens.to(CUDA), dtype) - exact).abs().max()
    loop = GpuLoop(GpuDecoder(model, 2100, batch=batch, dtype=dtype), list(tokens[:, :30]), new)
    assert loop.run.history.dtype == dtype
    got = [loop.logits.cpu(), *(loop.advance(tokens[:, i]) for i in range(30, 30 + new - 1))]
    loop.close()
    error = (torch.stack(got, dim=1).to(CUDA) - exact[:, 29:-1]).abs().max()
    assert 0 < error <= bound


def test_generate_with_a_history_of_16_bits() -> None:
    model, prompt = gpu_model(), prompt_of(25)
    plain = fi.generate(model, prompt, max_new_tokens=300, logprobs=True)
    short = fi.generate(model, prompt, max_new_tokens=300, logprobs=True, state_dtype=torch.bfloat16)
    assert short.tokens.shape == (1, 300)
    assert not torch.equal(short.logprobs, plain.logprobs)
    again = fi.generate(model, prompt, max_new_tokens=300, state_dtype=torch.bfloat16)
    assert torch.equal(again, fi.generate(model, prompt, max_new_tokens=300, state_dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_run_in_float32(dtype: torch.dtype) -> None:
    model, prompt = gpu_model().to(dtype), prompt_of(12)
    check_greedy(model, prompt, run(GpuDecoder(model, 1100), prompt, 1000))


@pytest.mark.parametrize("new", [1, 2, GRAPH, GRAPH + 1, GRAPH + 2, 513, 514])
def test_runs_of_any_length(new: int) -> None:
    model, prompt = gpu_model(), prompt_of(31)
    tokens = run(GpuDecoder(model, 30 + new), prompt, new)
    assert len(tokens) == new
    whole = run(GpuDecoder(model, 700), prompt, 600)
    agree(model, prompt, whole, torch.cat([tokens, whole[new:]]))


# -------------------------------------------------------------------------------------------------- the library's calls


@pytest.fixture(scope="module")
def model() -> fi.LanguageModel:
    return gpu_model(3)


def test_generate_greedily(model: fi.LanguageModel) -> None:
    prompt = prompt_of(25)
    tokens = fi.generate(model, prompt, max_new_tokens=1500)
    assert tokens.shape == (1, 1500)
    assert tokens.device.type == "cpu"
    check_greedy(model, prompt, tokens[0])
    streamed = torch.cat(list(fi.stream(model, prompt, max_new_tokens=1500)))
    assert torch.equal(streamed, tokens[0])
    agree(model, prompt, fi.generate(model, prompt, max_new_tokens=1500, tiling=Relaxed(1524))[0], tokens[0])


def test_a_seed_repeats_a_run(model: fi.LanguageModel) -> None:
    prompt, settings = prompt_of(25), {"max_new_tokens": 500, "temperature": 0.9, "top_p": 0.95}
    first, again, other = (fi.generate(model, prompt, seed=seed, **settings) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) >= DISTINCT


def test_top_1_is_greedy(model: fi.LanguageModel) -> None:
    prompt = prompt_of(25)
    greedy = fi.generate(model, prompt, max_new_tokens=500)
    assert torch.equal(fi.generate(model, prompt, max_new_tokens=500, temperature=0.8, top_k=1, seed=3), greedy)


def test_settings_on_the_device(model: fi.LanguageModel) -> None:
    """Greedy in an allowed set and under a penalty, against the choice made on the host."""
    prompt = prompt_of(25)
    for settings in ({"allowed": range(100, 200)}, {"repetition_penalty": 1.5}):
        here = fi.generate(model, prompt, max_new_tokens=300, **settings)
        there = fi.generate(model, prompt, max_new_tokens=300, logprobs=True, **settings).tokens
        assert torch.equal(here, there)
    assert set(fi.generate(model, prompt, max_new_tokens=300, temperature=2.0, allowed=(5, 7))[0].tolist()) == {5, 7}


def test_stop_tokens(model: fi.LanguageModel) -> None:
    prompt = prompt_of(25)
    whole = fi.generate(model, prompt, max_new_tokens=400, stop_tokens=())[0].tolist()
    stop = next(token for i, token in enumerate(whole) if i > 20 and token not in whole[:i])
    assert (
        fi.generate(model, prompt, max_new_tokens=400, stop_tokens=[stop])[0].tolist() == whole[: whole.index(stop) + 1]
    )
    assert fi.generate(model, prompt, max_new_tokens=400, stop_tokens=())[0].tolist() == whole


def test_rows_of_a_batch_are_those_alone(model: fi.LanguageModel) -> None:
    prompt = torch.randint(1000, (2, 25))
    both = fi.generate(model, prompt, max_new_tokens=600)
    for row in range(2):
        agree(model, prompt[row], fi.generate(model, prompt[row], max_new_tokens=600)[0], both[row])


def test_logprobs(model: fi.LanguageModel) -> None:
    prompt = prompt_of(25)
    tokens, chances = fi.generate(model, prompt, max_new_tokens=300, logprobs=True)
    sequence = torch.cat([prompt, tokens[0]])[None].to(CUDA)

    def logprobs(dtype: torch.dtype) -> Tensor:
        rows = twin(model, dtype)(sequence)[:, 24:-1].double().log_softmax(-1)
        return rows.gather(-1, sequence[:, 25:, None])[..., 0].cpu()

    exact = logprobs(torch.float64)
    # A log-probability moves by at most twice as much as its logits, and is told in float32.
    bound = 2 * FACTOR * (logprobs(torch.float32) - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs()
    assert ((chances - exact).abs() <= bound).all()


def test_score_is_that_of_the_cpu(model: fi.LanguageModel) -> None:
    tokens = torch.randint(1000, (1, 700))
    exact = fi.score(twin(model, torch.float64, torch.device("cpu")), tokens)
    host = fi.score(twin(model, torch.float32, torch.device("cpu")), tokens)
    bound = 2 * FACTOR * (host - exact).abs().max()
    assert (fi.score(model, tokens) - exact).abs().max() <= bound


def test_verify(model: fi.LanguageModel) -> None:
    for tiling in (None, Relaxed(900)):
        report = verify(model, prompt_of(25), tokens=800, tiling=tiling)
        assert report.equal
        assert report.distinct >= DISTINCT


def test_changed_weights_are_noticed() -> None:
    model, prompt = gpu_model(), prompt_of(10)
    fi.generate(model, prompt, max_new_tokens=50)
    model.blocks[0].mlp.fc1.weight.mul_(-1)
    check_greedy(model, prompt, fi.generate(model, prompt, max_new_tokens=300)[0])


# --------------------------------------------------------------------------------------------------------------- errors


def test_nan_weights() -> None:
    model = gpu_model()
    model.blocks[0].mlp.fc2.weight[0, 0] = NAN
    with pytest.raises(NumericsError, match="are not finite"):
        fi.generate(model, prompt_of(5), max_new_tokens=40)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "top_k": 1, "seed": 0}], ids=["greedy", "drawn"])
def test_logits_that_stop_being_finite(settings: dict[str, object]) -> None:
    """The embedding of a token that comes up later; the process goes on afterwards."""
    model, prompt = gpu_model(), prompt_of(5)
    whole = fi.generate(model, prompt, max_new_tokens=200)[0].tolist()
    known = set(prompt.tolist())
    at = next(i for i, token in enumerate(whole) if i > 40 and token not in whole[:i] and token not in known)
    kept = model.embedding.weight[whole[at]].clone()
    model.embedding.weight[whole[at]] = NAN
    got: list[int] = []
    with pytest.raises(NumericsError, match=f"behind position {at} after the prompt are not finite"):  # noqa: PT012
        for token in fi.stream(model, prompt, max_new_tokens=200, **settings):
            got.append(int(token))
    assert got == whole[: at + 1]
    model.embedding.weight[whole[at]] = kept
    assert fi.generate(model, prompt, max_new_tokens=200)[0].tolist() == whole


def test_a_run_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpu_model()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 20, 80 << 30))
    with pytest.raises(PlanError, match=r"1 x 300 positions need .* GiB of mixer state"):
        GpuDecoder(model, 300)
    with pytest.raises(PlanError):
        fi.generate(model, prompt_of(5), max_new_tokens=300)
    monkeypatch.undo()
    assert fi.generate(model, prompt_of(5), max_new_tokens=300).shape == (1, 300)


def test_too_long() -> None:
    model = gpu_model(length=100)
    with pytest.raises(LengthError, match="filter"):
        fi.generate(model, prompt_of(60), max_new_tokens=41)
    decoder = GpuDecoder(model, 60)
    with pytest.raises(LengthError, match="need 61 positions; the decoder has 60"):
        GpuLoop(decoder, prompt_of(40), 22)


def test_tilings_without_graphs(model: fi.LanguageModel) -> None:
    with pytest.raises(TilingError, match="on a GPU generation runs on its own bounded tiling"):
        fi.generate(model, prompt_of(5), max_new_tokens=40, tiling=Blocked(60))
