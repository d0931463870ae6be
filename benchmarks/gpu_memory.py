"""Does a run on one GPU take the memory that its plan tells, from short runs to long ones?

Order-2 Hyena, random weights that bfloat16 holds, greedy, every run to its end. The answer first: at sampled positions
the mixers' inputs are recomputed in float64 from the tokens (with a 16-bit state the error is told, not judged).
Measured: the most that PyTorch's allocator held, read before that check, and by how much the driver's count of used
memory grew, which has the captured graphs, the kernels and what the allocator keeps. The model's own weights aside.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch

from flash_inference.engine.plan_gpu import plan_gpu
from flash_inference.models.gpu import GpuDecoder
from gpu_decode import at_samples, big_model, whole
from gpu_latency import ERROR
from rows import RESULTS, Rows, gpu_origin

SHAPES = ((4, 256), (4, 768))
LENGTHS = tuple(1 << q for q in range(13, 18))


def run(layers: int, width: int, length: int, dtype: torch.dtype) -> dict[str, object]:
    """The plan of a run beside what it took."""
    model = big_model(layers, width, length, vocabulary=1000)
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    told = plan_gpu(model, max_new_tokens=length, state_dtype=dtype)
    before, used = torch.cuda.memory_allocated(), -torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    decoder = GpuDecoder(model, length, dtype=dtype)
    loop, tokens, seconds = whole(decoder, length)
    peak, used = torch.cuda.max_memory_allocated() - before, used + torch.cuda.mem_get_info()[0]
    error = at_samples(model, decoder, loop, tokens, [length - 2, length // 3])
    if dtype == torch.float32 and not error <= ERROR:
        raise SystemExit(f"{length} positions: the mixers' inputs are wrong, relative error {error:.3g}")
    parts = ("state", "weights", "filters", "spectra", "workspace", "graphs")
    planned = told.total - told.graphs
    row: dict[str, object] = {"layers": layers, "width": width, "length": length, "state_dtype": str(dtype)}
    row |= {"planned_bytes": planned, "peak_bytes": peak, "peak_over_planned": round(peak / planned, 4)}
    row |= {"driver_bytes": -used, "seconds": round(seconds, 3), "worst_layer_relative_error": error}
    return row | {f"planned_{part}": getattr(told, part) for part in parts}


def main() -> None:
    """Runs and writes one row a shape and length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default=",".join(str(length) for length in LENGTHS))
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--quick", action="store_true", help="the smaller shape, two lengths")
    args = parser.parse_args()
    lengths, shapes = [int(length) for length in args.lengths.split(",")], SHAPES
    if args.quick:
        lengths, shapes = lengths[:2], SHAPES[:1]
    rows = Rows("gpu_memory", args.out, gpu_origin(args.commit))
    for layers, width in shapes:
        for length in lengths:
            rows.add(run(layers, width, length, torch.float32))
    layers, width = shapes[-1]
    rows.add(run(layers, width, lengths[-1], torch.bfloat16))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
