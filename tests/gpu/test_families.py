"""Every family decodes through captured graphs, by its own modules, with the tokens that a CPU gives."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("gpu: no CUDA device here, or Triton's interpreter is on", allow_module_level=True)
pytest.importorskip("triton")

import flash_inference as fi
from family_models import FAMILIES, family_model
from flash_inference.engine.graphs import GpuLoop, decode_gpu
from flash_inference.engine.verify import verify
from flash_inference.models.gpu import GpuDecoder
from flash_inference.models.gpu_modules import ModuleStep
from flash_inference.ops.tile_conv.triton import mix_rows
from flash_inference.testing import find_ties
from flash_inference.testing.ties import FACTOR
from flash_inference.tiling import Relaxed

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
VOCAB, WIDTH, LENGTH = 500, 64, 1200
DISTINCT = 8
EPS, NAN = torch.finfo(torch.float32).eps, float("nan")
families = pytest.mark.parametrize("family", FAMILIES)


def twin(model: fi.LanguageModel, dtype: torch.dtype, device: torch.device = CUDA) -> fi.LanguageModel:
    """The same numbers in another type or place, without what the model keeps for decoding."""
    other = fi.LanguageModel(model.config).to(device, dtype).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return other


def gpu_model(family: str) -> fi.LanguageModel:
    return family_model(family, VOCAB, WIDTH, LENGTH).to(CUDA)


def prompt_of(length: int) -> Tensor:
    return (11 * torch.arange(length) + 7) % VOCAB


@torch.no_grad()
def check_greedy(model: fi.LanguageModel, prompt: Tensor, tokens: Tensor) -> None:
    """Tokens [N] after prompt [P] are the float64 forward's, ties aside; a tie is measured with a float32 forward."""
    sequence = torch.cat([prompt, tokens])[None, :-1].to(CUDA)
    first = len(prompt) - 1
    exact = twin(model, torch.float64)(sequence)[:, first:]
    wrong = (exact[0].argmax(-1) != tokens.to(CUDA)).nonzero()[:, 0].tolist()
    rounded = twin(model, torch.float32)(sequence)[:, first:]
    ties = {tie.position for tie in find_ties(rounded, exact)} if wrong else set()
    assert not [place for place in wrong if place not in ties]
    assert len(tokens.unique()) >= DISTINCT


def agree(model: fi.LanguageModel, prompt: Tensor, one: Tensor, two: Tensor) -> None:
    """The same tokens; two ways to sum may part at a tie, from where on each must be right for itself."""
    check_greedy(model, prompt, one)
    if not torch.equal(one, two):
        check_greedy(model, prompt, two)


def host_tokens(model: fi.LanguageModel, prompt: Tensor, new: int) -> Tensor:
    return fi.generate(twin(model, torch.float32, torch.device("cpu")), prompt, max_new_tokens=new)[0]


def run(decoder: GpuDecoder, prompt: Tensor, new: int, **settings: Any) -> Tensor:
    return torch.tensor(list(GpuLoop(decoder, prompt, new, **settings)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("width", "batch", "offset"), [(1, 1, 0), (700, 1, 15), (7, 3, 1), (333, 5, 9)])
def test_a_row_is_its_direct_sum(width: int, batch: int, offset: int, dtype: torch.dtype) -> None:
    """Rows of the block that are not known yet, and other channels, are NaN and stay so."""
    channels, lane, at, block = width + 5, 3, 4, 16
    history = torch.full((at + block + 2, channels * batch), NAN, dtype=dtype, device=CUDA)
    near, diagonal = (torch.full(shape, NAN, device=CUDA) for shape in ((block + 2, channels), (channels,)))
    mine = history.unflatten(1, (channels, batch))[at : at + block, lane : lane + width]
    mine[: offset + 1] = torch.randn(offset + 1, width, batch, device=CUDA).to(dtype)
    near[1 : offset + 1, lane : lane + width] = torch.randn(offset, width, device=CUDA)
    diagonal[lane : lane + width] = torch.randn(width, device=CUDA)
    y, whole = torch.randn(batch, width, device=CUDA).to(dtype), history.clone()
    earlier, stood = mine[:offset].double(), mine[offset].double()
    z = mix_rows(history, near, diagonal, y, torch.tensor([at, 99], device=CUDA), offset, lane, block)
    terms = earlier * near[1 : offset + 1, lane : lane + width].flip(0).double()[..., None]
    own = diagonal[lane : lane + width, None].double() * y.T.double()
    exact, size = stood + terms.sum(0) + own, stood.abs() + terms.abs().sum(0) + own.abs()
    bound = (offset + 3) * EPS * size + torch.finfo(dtype).eps * exact.abs()
    assert ((z.T.double() - exact).abs() <= bound).all()
    assert torch.equal(mine[offset], y.T)
    mine[offset] = whole.unflatten(1, (channels, batch))[at + offset, lane : lane + width]
    assert torch.equal(history.nan_to_num(77.0), whole.nan_to_num(77.0))


@families
def test_tokens_through_graphs_are_the_cpus(family: str) -> None:
    """Over 700 tokens, so that tiles by FFT act; launches without graphs are the same to the last bit."""
    model, prompt, new = gpu_model(family), prompt_of(40), 700
    decoder = GpuDecoder(model, len(prompt) + new)
    assert isinstance(decoder.step, ModuleStep)
    loop = GpuLoop(decoder, prompt, new)
    tokens = torch.tensor(list(loop))
    assert loop._captured
    assert loop.late == 0
    agree(model, prompt, tokens, host_tokens(model, prompt, new))
    assert torch.equal(run(decoder, prompt, new), tokens)
    assert torch.equal(run(decoder, prompt, new, graphs=False), tokens)


@families
@pytest.mark.parametrize("length", [1, 300])
def test_generate_uses_graphs_by_itself_without_a_warning(family: str, length: int) -> None:
    model, prompt = gpu_model(family), prompt_of(length)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = fi.generate(model, prompt, max_new_tokens=300)[0]
    assert isinstance(model._gpu_decoder[1].step, ModuleStep)
    agree(model, prompt, tokens, host_tokens(model, prompt, 300))


@families
def test_all_ways_to_run_give_the_same_tokens(family: str) -> None:
    model, prompt, new = gpu_model(family), prompt_of(20), 700
    reference = run(GpuDecoder(model, 800), prompt, new)
    agree(model, prompt, reference, run(GpuDecoder(model, 800, latency="relaxed"), prompt, new))
    agree(model, prompt, reference, run(GpuDecoder(model, 800, near=32, spectra_bytes=0), prompt, new))
    decoder = GpuDecoder(model, 800)
    chosen = decode_gpu(decoder, prompt[None], lambda logits: logits.argmax(-1), 300, None)
    agree(model, prompt, reference[:300], torch.cat(list(chosen)))
    relaxed = fi.generate(model, prompt, max_new_tokens=300, tiling=Relaxed(320))[0]
    agree(model, prompt, reference[:300], relaxed)


@pytest.mark.parametrize("family", ["h3-conv", "striped-hyena", "stu"])
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_nothing_is_read_before_it_is_written(family: str, nan_memory: None) -> None:
    model, prompt = gpu_model(family), prompt_of(9)
    tokens = run(GpuDecoder(model, 620), prompt, 600)
    check_greedy(model, prompt, tokens)


@families
def test_rows_of_any_length_on_one_clock(family: str) -> None:
    model, new = gpu_model(family), 500
    prompts = [prompt_of(n) for n in (200, 1, 3, 37, 3)]
    loop = GpuLoop(GpuDecoder(model, 700, batch=5), prompts, new)
    rows = torch.stack([torch.from_numpy(tokens.copy()) for tokens in loop], dim=1)
    assert torch.equal(rows[2], rows[4])
    for prompt, tokens in zip(prompts[:4], rows, strict=False):
        check_greedy(model, prompt, tokens)


@families
def test_rows_given_to_generate(family: str) -> None:
    model, prompt = gpu_model(family), torch.stack([prompt_of(25), prompt_of(26)[1:]])
    both = fi.generate(model, prompt, max_new_tokens=200)
    for row in range(2):
        agree(model, prompt[row], fi.generate(model, prompt[row], max_new_tokens=200)[0], both[row])


@families
def test_logits_of_given_tokens(family: str) -> None:
    model, tokens = gpu_model(family), prompt_of(340)
    exact = twin(model, torch.float64)(tokens[None].to(CUDA))[0, 299:].cpu()
    rounded = twin(model, torch.float32)(tokens[None].to(CUDA))[0, 299:].cpu()
    loop = GpuLoop(GpuDecoder(model, 340), tokens[:300], 41)
    got = torch.cat([loop.logits.cpu(), *(loop.advance(tokens[i : i + 1]).clone() for i in range(300, 340))])
    loop.close()
    assert (got - exact).abs().max() <= FACTOR * (rounded - exact).abs().max()


@families
def test_half_models_run_in_their_own_dtype(family: str) -> None:
    """Logits behind what graphs chose are as near the float64 forward as a tie's gap, by the model's own forward."""
    model, prompt = gpu_model(family).bfloat16(), prompt_of(40)
    loop = GpuLoop(GpuDecoder(model, 140), prompt, 97)
    tokens = torch.tensor(list(loop))
    sequence = torch.cat([prompt, tokens[:-1]])[None].to(CUDA)
    exact, own = twin(model, torch.float64)(sequence)[0], model(sequence)[0].double()
    assert loop.step.x.dtype == torch.bfloat16
    assert (loop.step.logits[0] - exact[-1]).abs().max() <= FACTOR * (own - exact).abs().max()


@families
def test_a_seed_repeats_a_run(family: str) -> None:
    model, prompt, settings = gpu_model(family), prompt_of(25), {"max_new_tokens": 100, "temperature": 0.9}
    first, again, other = (fi.generate(model, prompt, seed=seed, **settings) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    greedy = fi.generate(model, prompt, max_new_tokens=100)
    assert torch.equal(fi.generate(model, prompt, max_new_tokens=100, temperature=0.8, top_k=1, seed=3), greedy)


@pytest.mark.parametrize("family", ["stu", "striped-hyena"])
def test_verify_and_logprobs(family: str) -> None:
    model, prompt = gpu_model(family), prompt_of(25)
    report = verify(model, prompt, tokens=300)
    assert report.equal
    assert report.distinct >= DISTINCT
    tokens, chances = fi.generate(model, prompt, max_new_tokens=50, logprobs=True)
    assert chances.isfinite().all()
    agree(model, prompt, fi.generate(model, prompt, max_new_tokens=50)[0], tokens[0])


def test_two_loops_at_once() -> None:
    model, prompts = gpu_model("h3-conv"), (prompt_of(7), prompt_of(40))
    decoder = GpuDecoder(model, 700)
    alone = [run(decoder, prompt, 600) for prompt in prompts]
    together = torch.tensor(list(zip(*(GpuLoop(decoder, prompt, 600) for prompt in prompts), strict=True)))
    for row in range(2):
        assert torch.equal(together[:, row], alone[row])


def test_drafts_run_by_modules() -> None:
    model, prompt = gpu_model("s4d"), prompt_of(25)
    greedy = fi.generate(model, prompt, max_new_tokens=60)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drafted = fi.generate(model, prompt, max_new_tokens=60, draft=fi.PromptLookup())[0]
    agree(model, prompt, greedy, drafted)
