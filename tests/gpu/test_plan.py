"""The bytes that a plan tells are those that PyTorch's allocator held at most."""

from __future__ import annotations

import gc
import os

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("gpu: no CUDA device here, or Triton's interpreter is on", allow_module_level=True)
pytest.importorskip("triton")

import flash_inference as fi
from flash_inference.engine.graphs import GpuLoop
from flash_inference.engine.plan_gpu import plan_gpu
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.gpu import GpuDecoder

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def check_peak(
    width: int, length: int, batch: int = 1, prompt: int = 1, dtype: torch.dtype = torch.float32, spectra: bool = True
) -> None:
    """A run to its end holds at most what was planned, within 5%; the model's own bytes aside."""
    config = fi.HyenaConfig(vocab_size=1000, width=width, layers=4, length=length, tied=False)
    with torch.device(CUDA):
        model = LanguageModel(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(p.bfloat16())
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    new = length - prompt + 1
    told = plan_gpu(model, prompt=prompt, max_new_tokens=new, batch=batch, state_dtype=dtype)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    settings = {} if spectra else {"spectra_bytes": 0}
    decoder = GpuDecoder(model, length, batch=batch, prompt=prompt, dtype=dtype, **settings)
    assert told.total == decoder.plan.total or not spectra
    prompts = torch.randint(1000, (batch, prompt))
    loop = GpuLoop(decoder, prompts, new)
    for _ in range(loop.count):
        loop.launch()
        loop.pace()
    loop.close()
    planned, peak = decoder.plan.total - decoder.plan.graphs, torch.cuda.max_memory_allocated() - before
    assert abs(peak / planned - 1) <= 0.05, f"planned {planned:,}, measured {peak:,}: {decoder.plan}"


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 5000])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("width", "length"), [(256, 1 << 15), (768, 1 << 16)])
def test_the_peak_is_the_plan(width: int, length: int, batch: int, prompt: int) -> None:
    check_peak(width, length, batch, prompt)


@torch.no_grad()
def test_the_peak_is_the_plan_in_16_bits() -> None:
    check_peak(768, 1 << 16, dtype=torch.bfloat16)


@torch.no_grad()
def test_the_peak_is_the_plan_where_no_spectra_are_kept() -> None:
    check_peak(768, 1 << 16, spectra=False)
