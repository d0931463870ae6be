"""Which shapes make the batched step fastest on this GPU?

Every kernel's shape is tried in the whole step, since what a kernel costs there depends on the others: programs of the
next one load their weights beside it if it leaves room. The tokens of the shapes in use are held against float64, those
of all others must be the same. Variants are compiled beforehand, in parallel. At the end the best of each kernel are
put together, one after the other, as long as they help.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from flash_inference.engine.graphs import GpuLoop
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.gpu import GRAPH, GpuDecoder
from flash_inference.ops.decode_step.triton_batch import BatchShape, BatchShapes
from gpu_batch import prompts
from gpu_decode import WIDTH, against_float64, big_model, stats
from rows import RESULTS, Rows, gpu_origin

LENGTH, GRAPHS, COMPARED = 1280, 40, 600
KERNELS = ("mix", "out", "fc1", "fc2", "head")
ROWS = {"mix": (2, 4, 8, 16), "out": (8, 16, 32), "fc1": (8, 16, 32, 64), "fc2": (8, 16, 32), "head": (16, 32, 64)}
WARPS = {"mix": (1, 2, 4, 8), "out": (2, 4, 8), "fc1": (2, 4, 8), "fc2": (4, 8, 16), "head": (2, 4, 8)}


def candidates(kernel: str, batch: int) -> list[BatchShape]:
    """Shapes whose weights stay in registers."""
    wide, inputs = (4 if kernel == "mix" else 1), (4 if kernel == "fc2" else 1) * WIDTH
    return [
        BatchShape(rows, warps, some)
        for rows in ROWS[kernel]
        for warps in WARPS[kernel]
        for some in (8, 16, 32)
        if some <= max(8, batch) and wide * rows % 8 == 0 and wide * rows * inputs / 2 / (32 * warps) <= 120
    ]


def neighbours(batch: int) -> list[tuple[str, BatchShapes]]:
    """The shapes in use, then each with one kernel's replaced."""
    base = BatchShapes.fit(batch)
    return [("", base)] + [
        (kernel, replace(base, **{kernel: shape}))
        for kernel in KERNELS
        for shape in candidates(kernel, batch)
        if shape != getattr(base, kernel)
    ]


def run(model: LanguageModel, batch: int, shapes: BatchShapes, graphs: int) -> tuple[float, GpuLoop]:
    """Microseconds of a position without tiles, and the loop."""
    decoder = GpuDecoder(model, LENGTH, batch=batch, batch_shapes=shapes, spectra_bytes=0)
    loop = GpuLoop(decoder, prompts(batch), GRAPH * (graphs + 2) + 1, mixing=False)
    loop.prepare()
    for _ in range(graphs + 2):
        loop.launch()
    torch.cuda.synchronize()
    return stats(loop, 2 * GRAPH)["median_us"], loop


def compile_some(batch: int, part: int, parts: int) -> None:
    """Runs every parts-th variant on two layers, which leaves its kernels in the cache that all processes share."""
    model = big_model(2, WIDTH, LENGTH)
    for _, shapes in neighbours(batch)[part::parts]:
        try:
            run(model, batch, shapes, 1)
        except Exception as error:  # what does not fit the device is no candidate
            print(shapes, repr(error)[:100], file=sys.stderr)


def search(model: LanguageModel, batch: int) -> dict[str, object]:
    """The row of a batch."""
    base = BatchShapes.fit(batch)
    before, loop = run(model, batch, base, GRAPHS)
    wanted = loop.run.tokens[loop.run.lead : loop.run.lead + COMPARED]
    tried: dict[str, list[tuple[float, BatchShape]]] = {kernel: [(before, getattr(base, kernel))] for kernel in KERNELS}
    wrong = list[str]()

    def time_of(shapes: BatchShapes) -> float | None:
        try:
            us, made = run(model, batch, shapes, GRAPHS)
        except Exception as error:  # what does not fit the device is no candidate
            wrong.append(repr(error)[:80])
            return None
        if not torch.equal(made.run.tokens[made.run.lead : made.run.lead + COMPARED], wanted):
            wrong.append(f"other tokens: {shapes}")
            return None
        return us

    for kernel, shapes in neighbours(batch)[1:]:
        if (us := time_of(shapes)) is not None:
            tried[kernel].append((round(us, 1), getattr(shapes, kernel)))
    best, now = base, before
    for kernel in KERNELS:
        tried[kernel].sort(key=lambda pair: pair[0])
        for _, shape in tried[kernel][:3]:
            us = time_of(replace(best, **{kernel: shape}))
            if us is not None and us < now:
                best, now = replace(best, **{kernel: shape}), us
    return {
        "batch": batch, "in_use_us": before, "best_us": now, "best": {name: getattr(best, name) for name in KERNELS},
        "tried": {kernel: found[:12] for kernel, found in tried.items()}, "wrong": len(wrong), "faults": wrong[:5],
    }  # fmt: skip


def main() -> None:
    """Runs and writes one row a batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--compile", default=None, help="internal: batch,part,parts")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args()
    if args.compile:
        compile_some(*(int(n) for n in args.compile.split(",")))
        return
    rows, parts = Rows("gpu_shapes", args.out, gpu_origin(args.commit)), max(1, (os.cpu_count() or 2) - 1)
    model = big_model(18, WIDTH, LENGTH)
    for batch in (int(n) for n in args.batches.split(",")):
        start = time.perf_counter()
        command = [sys.executable, __file__, "--compile"]
        workers = [subprocess.Popen([*command, f"{batch},{part},{parts}"]) for part in range(parts)]
        for worker in workers:
            worker.wait()
        print(f"{len(neighbours(batch))} variants compiled in {time.perf_counter() - start:.0f} s", flush=True)
        whole = GpuLoop(GpuDecoder(model, LENGTH, batch=batch), prompts(batch), COMPARED)
        made = torch.tensor([int(row[0]) for row in whole])
        answer = against_float64(model, whole, made, prompt=prompts(batch)[0])
        if answer["differences"]:
            raise SystemExit(
                f"{batch} rows: tokens are not those of float64, at {answer['different']}; nothing is timed."
            )
        rows.add(search(model, batch))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
