"""What decoding takes is what its plan says, and the state is one buffer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash_inference

AGREEMENT = 0.10

MEASURE = """
import ctypes, json, sys
import torch
from pathlib import Path
from flash_inference import HyenaConfig, LanguageModel, stream
from flash_inference.engine.decode import default_tiling
from flash_inference.engine.plan import plan

def kib(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

width, layers, length, prompt, steps = map(int, sys.argv[1:])
torch.manual_seed(0)
config = HyenaConfig(vocab_size=256, width=width, layers=layers, length=length)
small = LanguageModel(HyenaConfig(vocab_size=256, width=8, layers=1, length=2048)).eval()
for _, _token in zip(range(1100), stream(small, [[1] * 900], max_new_tokens=1100)):
    pass
model = LanguageModel(config).eval().requires_grad_(False)
planned = plan(model, prompt=prompt, max_new_tokens=length - prompt)
tokens = torch.randint(256, (1, prompt))
# What malloc keeps from earlier calls would be taken again, and not be seen.
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
for _, _token in zip(range(steps), stream(model, tokens, max_new_tokens=length - prompt)):
    pass
grown = 1024 * (kib("VmHWM") - before)
state = model.decoder().init(1, default_tiling(length - prompt - 1, prompt)).stack
print(json.dumps({
    "grown": grown, "total": planned.total, "state": planned.state, "filters": planned.filters,
    "spectra": planned.spectra, "workspace": planned.workspace,
    "activations": planned.activations, "history": state.history.nbytes,
    "rows": state.history.shape[2], "block": state.block, "stored": model.decoder().stack.filter.spectra_used,
}))
"""


def measured(width: int, layers: int, length: int, prompt: int, steps: int) -> dict[str, int]:
    """Bytes by which a fresh process grows at most while it decodes, and what the plan says."""
    arguments = [str(n) for n in (width, layers, length, prompt, steps)]
    environment = {**os.environ, "PYTHONPATH": str(Path(flash_inference.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert not out.returncode, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "layers", "length", "prompt", "steps"),
    [(64, 2, 65_536, 60_000, 5_536), (64, 2, 65_536, 1, 65_535), (256, 4, 65_536, 1, 65_535)],
    ids=["D64-2-layers-after-a-long-prompt", "D64-2-layers", "D256-4-layers"],
)
def test_a_run_takes_what_its_plan_says(width: int, layers: int, length: int, prompt: int, steps: int) -> None:
    got = measured(width, layers, length, prompt, steps)
    print(got, got["grown"] / got["total"])
    channels = width * layers
    assert got["history"] == got["rows"] * channels * 4
    assert length - 1 <= got["rows"] < length + 2 * got["block"]
    assert abs(got["grown"] / got["total"] - 1) <= AGREEMENT, got
