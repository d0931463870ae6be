"""Plans: bytes computed from shapes equal the bytes that are taken."""

from __future__ import annotations

import pytest
import torch

from flash_inference.engine import plan as plans
from flash_inference.engine.decode import default_tiling
from flash_inference.engine.plan import check_memory, plan, work
from flash_inference.errors import PlanError
from flash_inference.models.decoder import Decoder
from flash_inference.testing import random_model
from flash_inference.tiling import Blocked, Eager, Lazy, Relaxed


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("prompt", "new"), [(1, 1), (1, 300), (200, 100), (77, 1500), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_state_and_filters_are_what_is_allocated(
    order: int, batch: int, prompt: int, new: int, dtype: torch.dtype
) -> None:
    model = random_model(order, length=2000, dtype=dtype)
    made = plan(model, prompt=prompt, max_new_tokens=new, batch=batch)
    decoder = Decoder(model, prompt + new)
    state = decoder.init(batch, default_tiling(max(new - 1, 1), prompt))
    assert state.nbytes <= made.state
    rows = state.stack.history.shape[2]
    assert made.state - state.nbytes <= state.stack.history.nbytes / rows * state.stack.block
    assert made.filters >= decoder.stack.filter.rho.nbytes + decoder.stack.filter.near.nbytes
    assert made.positions == prompt + new
    assert made.total == made.state + made.filters + made.workspace + max(made.spectra, made.activations)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_a_history_of_16_bits_is_planned(dtype: torch.dtype) -> None:
    model = random_model(3, length=2000)
    made = plan(model, prompt=100, max_new_tokens=1000, batch=2, state_dtype=dtype)
    state = Decoder(model, 1100).init(2, default_tiling(999, 100), dtype=dtype)
    rows = state.stack.history.shape[2]
    assert 0 <= made.state - state.nbytes <= state.stack.history.nbytes / rows * state.stack.block
    assert made.state < 0.6 * plan(model, prompt=100, max_new_tokens=1000, batch=2).state


def test_spectra_of_the_plan_are_those_that_are_stored() -> None:
    model = random_model(2, length=4096)
    decoder = Decoder(model, 4096)
    tiling = default_tiling(4095, 1)
    state = decoder.init(1, tiling)
    for token in torch.randint(64, (4096,)):
        decoder.extend(state, token.view(1, 1))
    assert decoder.stack.filter.spectra_used <= plan(model, prompt=1, max_new_tokens=4096).spectra
    assert decoder.stack.filter.spectra_used > 0


@pytest.mark.parametrize(("prompt", "new", "batch"), [(1, 100, 1), (300, 100, 4)])
def test_not_enough_memory_says_how_much_and_what_would_fit(
    monkeypatch: pytest.MonkeyPatch, prompt: int, new: int, batch: int
) -> None:
    model = random_model(2, length=2000)
    needed = plan(model, prompt=prompt, max_new_tokens=new, batch=batch).total
    monkeypatch.setattr(plans, "free_memory", lambda: needed)
    check_memory(model, batch, prompt, new)
    monkeypatch.setattr(plans, "free_memory", lambda: needed - 1)
    with pytest.raises(
        PlanError,
        match=rf"the run needs \d+\.\d\d GiB for {batch} x {prompt + new} positions; \d+\.\d\d GiB are free\. "
        r"About (\d+) positions would fit, or a smaller batch",
    ):
        check_memory(model, batch, prompt, new)
    monkeypatch.setattr(plans, "free_memory", lambda: 0)
    with pytest.raises(PlanError, match=r"0\.00 GiB are free\. About 0 positions would fit"):
        check_memory(model, batch, prompt, new)
    monkeypatch.setattr(plans, "free_memory", lambda: None)
    check_memory(model, batch, prompt, new)


def test_what_is_said_to_fit_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(2, length=100_000, width=64)
    free = (100 << 20) + 1
    monkeypatch.setattr(plans, "free_memory", lambda: free)
    with pytest.raises(PlanError) as caught:
        check_memory(model, 1, 1, 90_000)
    fits = int(str(caught.value).split("About ")[1].split(" positions")[0])
    assert 0 < fits < 90_000
    check_memory(model, 1, 1, fits - 1)


def test_free_memory_is_a_number_of_bytes() -> None:
    free = plans.free_memory()
    assert free is None or 1 << 20 < free < 1 << 50


def test_work_is_less_for_better_tilings() -> None:
    totals = [work(tiling).total for tiling in (Relaxed(4096), Lazy(4096), Eager(4096), Blocked(4096))]
    assert totals[0] < totals[1] == totals[2]
    assert totals[3] < totals[1]
