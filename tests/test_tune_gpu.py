"""The tuner of a GPU's kernels checks values before it believes a time, and a decoder reads what it wrote."""

from __future__ import annotations

import pytest

import interpreted  # noqa: F401

# isort: split

from flash_inference.cli import tune_gpu
from flash_inference.cli.tune_gpu import GpuCase, gpu_cases, measure_gpu
from flash_inference.models import gpu, gpu_memory
from flash_inference.models.gpu_memory import MANY, NEAR, near_side
from flash_inference.ops.tile_conv import Choice, Measurement, measured
from flash_inference.testing import random_model


@pytest.mark.parametrize("batch", [1, 3])
def test_both_ways_pass_their_checks(batch: int) -> None:
    wrong: dict[str, str] = {}
    found = list(measure_gpu(GpuCase(32, 6, batch, "cpu"), 0, wrong))
    assert not wrong
    assert [(m.impl, m.side, m.rows, m.channels, m.threads) for m in found] == [
        ("direct", 32, batch, 6, 0),
        ("fft", 32, batch, 6, 0),
    ]
    assert all(m.microseconds > 0 and 0 < m.error < 1e-5 for m in found)


def test_a_large_batch_is_measured_on_tensor_cores_too() -> None:
    wrong: dict[str, str] = {}
    found = list(measure_gpu(GpuCase(32, 3, MANY, "cpu"), 0, wrong))
    assert not wrong
    assert [m.impl for m in found] == ["direct", "toeplitz", "fft"]
    assert all(0 < m.error < 1e-5 for m in found)


@pytest.mark.parametrize("fault", [float("nan"), 1.01])
@pytest.mark.parametrize("impl", ["direct", "fft"])
def test_a_kernel_that_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch, impl: str, fault: float) -> None:
    """The fastest shape that was ever tried on a device returned NaN."""
    right = tune_gpu.implementations

    def implementations(case, history, rho):
        pays = right(case, history, rho)

        def wrong(pay=pays[impl]):
            pay()
            history[-1, -1] *= fault

        return pays | {impl: wrong}

    monkeypatch.setattr(tune_gpu, "implementations", implementations)
    wrong: dict[str, str] = {}
    found = list(measure_gpu(GpuCase(32, 4, 1, "cpu"), 0, wrong))
    assert [m.impl for m in found] == ["fft" if impl == "direct" else "direct"]
    assert wrong[impl].startswith(f"{impl} at side 32, 4 channels, batch 1 on cpu")
    assert not [m for m in measure_gpu(GpuCase(32, 4, 1, "cpu"), 0, wrong) if m.impl == impl]


def table(
    times: dict[int, tuple[float, float]], rows: int = 1, channels: int = 64, device: str = "G"
) -> list[Measurement]:
    return [
        Measurement(side, rows, channels, "torch.float32", device, 0, impl, us, 1e-7)
        for side, pair in times.items()
        for impl, us in zip(("direct", "fft"), pair, strict=True)
    ]


def test_the_crossover_is_the_last_side_that_direct_sums_win() -> None:
    choice = Choice(
        tuple(
            table({32: (1, 9), 64: (2, 9), 128: (8, 9), 256: (20, 9), 512: (5, 9)})
            + table({32: (1, 9), 64: (10, 9)}, rows=32)
            + table({32: (10, 9)}, channels=4096)
        )
    )
    assert choice.crossover_on("G", 1, 64) == choice.crossover_on("G", 2, 100) == 128
    assert choice.crossover_on("G", 20, 64) == 32
    assert choice.crossover_on("G", 1, 4000) is None
    assert choice.crossover_on("another", 1, 64) is None


def test_tensor_cores_count_as_sums() -> None:
    slow = table({32: (1, 9), 64: (20, 9)}, rows=32)
    fast = Measurement(64, 32, 64, "torch.float32", "G", 0, "toeplitz", 5.0, 1e-7)
    assert Choice(tuple(slow)).crossover_on("G", 32, 64) == 32
    assert Choice((*slow, fast)).crossover_on("G", 32, 64) == 64


def test_no_square_is_larger_than_a_step_can_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    won = Choice(tuple(table({side: (1, 9) for side in (32, 64, 128, 256, 512)})))
    monkeypatch.setattr(gpu_memory, "measured", lambda: won)
    assert [near_side("G", batch, 64) for batch in (1, 2, 32)] == [NEAR, NEAR, NEAR]


def test_a_table_keeps_what_it_says_of_other_devices() -> None:
    old = Choice(tuple(table({32: (1, 2)}) + table({32: (3, 4)}, device="H")))
    new = Choice(tuple(table({64: (5, 6)}))).beside(old)
    assert {(m.device, m.side) for m in new.measurements} == {("G", 64), ("H", 32)}


def test_a_decoder_takes_its_near_side_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(2, length=200, layers=1)
    assert gpu.GpuDecoder(model, 100).near_side == NEAR
    found = Choice(tuple(table({32: (1, 2), 64: (3, 2)}, channels=model.config.width, device="cpu")))
    measured.cache_clear()
    found.save()
    try:
        assert gpu.GpuDecoder(model, 100).near_side == 32
        assert gpu.GpuDecoder(model, 100, near=64).near_side == 64
    finally:
        measured.cache_clear()
        from flash_inference.ops.tile_conv import table_path

        table_path().unlink()


def test_cases_fit_the_memory() -> None:
    assert len(list(gpu_cases(1 << 40, quick=True))) == len(tune_gpu.SIDES)
    some = list(gpu_cases(1 << 30, quick=False))
    assert 0 < len(some) < len(list(gpu_cases(1 << 40, quick=False)))
    assert all(case.nbytes <= 1 << 30 for case in some)
