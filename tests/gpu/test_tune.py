"""What `tune` measures on this GPU: both ways right, and times that grow with the side."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("gpu: no CUDA device here, or Triton's interpreter is on", allow_module_level=True)
pytest.importorskip("triton")

from flash_inference.cli.tune_gpu import GpuCase, measure_gpu
from flash_inference.ops.tile_conv import Choice, Measurement

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("batch", [1, 8])
def test_both_ways_are_right_and_timed(batch: int) -> None:
    wrong: dict[str, str] = {}
    found: list[Measurement] = []
    for side in (32, 128, 1024):
        found += measure_gpu(GpuCase(side, 1536, batch), 0.01, wrong)
    assert not wrong
    times = {(m.side, m.impl): m.microseconds for m in found}
    assert set(times) == {(side, impl) for side in (32, 128, 1024) for impl in ("direct", "fft")}
    assert times[1024, "direct"] > 4 * times[128, "direct"] > 0
    assert times[1024, "fft"] < times[1024, "direct"]
    crossover = Choice(tuple(found)).crossover_on(torch.cuda.get_device_name(), batch, 1536)
    assert crossover in (None, 32, 128)
    assert (crossover is None) == (times[32, "fft"] < times[32, "direct"])
