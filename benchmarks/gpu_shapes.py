"""Which shapes make the batched step's kernels fastest on this GPU?

Each kernel runs alone, a chain of all layers in one graph, so that weights are cold as in a step. All variants are
compiled beforehand, in parallel. A time is believed only after all values agree with float64, each within a bound
derived from the data. (Rows of commit 1b28815+changes told errors as shares of a standard deviation.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from flash_inference.ops.decode_step import triton_batch as kernels
from flash_inference.ops.decode_step.triton import choose_and_embed  # noqa: F401  (the module's import is the check)
from rows import provenance

LAYERS, D, V, BLOCK, TAPS, ORDER, SHARE = 18, 768, 50_304, 16, 3, 2, 16
NAMES = ("mix", "out", "fc1", "fc2", "head")
UNIT = 2.0**-19
Shape = tuple[int, int, int, int]
"""Output rows a program, warps, inputs a warp takes at once, rows of the batch a program."""


def sizes(name: str) -> tuple[int, int]:
    """(outputs, inputs) of a kernel's matrix."""
    return {"mix": (3 * D, D), "out": (D, D), "fc1": (4 * D, D), "fc2": (D, 4 * D), "head": (V, D)}[name]


def candidates(name: str, batch: int) -> list[Shape]:
    """Shapes whose pieces stay in registers."""
    K, found = sizes(name)[1], []
    rows = {"mix": (4, 8), "out": (8, 16), "fc1": (16, 32), "fc2": (8, 16), "head": (32, 64, 128)}[name]
    for r, warps, depth, tile in itertools.product(
        rows, (8,) if name == "fc2" else (4, 8) if name == "mix" else (4,), (32, 64, 128), (8, 16, 32)
    ):
        wide = 4 * r if name == "mix" else r
        if tile > batch or batch // tile > 4 or tile * depth > 1024 or (name == "head" and tile != min(batch, 32)):
            continue
        if name != "head" and (warps * depth > K * 1.4 or wide * K / 2 / (32 * warps) > 120):
            continue
        found.append((r, warps, depth, tile))
    return found


class Problem:
    """Random layers for one kernel; on the host only types are needed, to compile."""

    def __init__(self, name: str, batch: int, device: str) -> None:
        self.name, self.batch = name, batch
        N, K = sizes(name)
        layers = 1 if name == "head" or device == "cpu" else LAYERS
        make = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
        self.w = [make(N, K).bfloat16() for _ in range(layers)]
        self.v, self.x, self.out = make(batch, K), make(batch, D), make(batch, N)
        self.gamma, self.b = torch.ones(D, device=device), make(N)
        self.slope = [w.double().sum(1).float() for w in self.w]
        self.short, self.short_b = make(TAPS, 3 * D), make(3 * D)
        self.pending, self.history = make(TAPS - 1, batch, 3 * D), make(64, layers * D * batch)
        self.near, self.diagonal = make(64, layers * D), make(layers * D)
        self.clock = torch.zeros(3, dtype=torch.long, device=device)
        few = self.x.view(batch, -1, SHARE)
        moments = [few.sum(2).T, (few - few.mean(2, keepdim=True)).square().sum(2).T]
        self.moments = torch.stack(moments).flatten()
        self.centres = make(2, batch)
        self.z, self.spare = self.x - self.centres[1 if name == "fc1" else 0, :, None], make(batch, D)
        self.kept = make(2 * D * batch)
        self.best = make(2000, batch)
        self.best_at = torch.zeros(2000, batch, dtype=torch.int32, device=device)

    def call(self, shape: Shape, layer: int, run: Callable[..., None]) -> None:
        """`run(kernel, grid, arguments, settings)` with the launch of one layer."""
        rows, warps, depth, tile = shape
        N, K = sizes(self.name)
        B, w = self.batch, self.w[layer]
        more = {
            "B": B,
            "BATCH": tile,
            "ROWS": rows,
            "DEPTH": depth,
            "WIDE": False,
            "PDL": True,
            "num_warps": warps,
            "launch_pdl": True,
        }
        grid = triton.cdiv(N, rows), triton.cdiv(B, tile)
        norm = {"D": D, "SHARE": SHARE, "PROGRAMS": triton.next_power_of_2(triton.cdiv(D, SHARE))}
        matrix = self.z, self.moments, self.centres, w, self.b, self.slope[layer]
        if self.name == "mix":
            more |= {"ORDER": ORDER, "GROUPS": 4, "TAPS": TAPS, "BLOCK": BLOCK, "WARPS": warps}
            state = self.short, self.short_b, self.pending, self.history, self.near, self.diagonal, self.clock
            arguments = *matrix, *state, self.out, 7, layer * D, self.near.shape[1], 1e-5
            run(kernels.project_and_mix, (triton.cdiv(D, rows), grid[1]), arguments, norm | more)
        elif self.name == "fc1":
            run(kernels.norm_expand, grid, (*matrix, self.out, N, 1e-5), norm | more | {"WARPS": warps})
        elif self.name == "head":
            run(kernels.head, grid, (*matrix, self.out, self.best, self.best_at, N, 1e-5), norm | more)
        else:
            arguments = self.x, self.v, w, self.b, self.gamma, self.spare, self.kept, self.centres
            run(kernels.add_product, grid, arguments, more | {"D": D, "N": K, "WHICH": 0, "WARPS": warps})

    def error(self, shape: Shape) -> float:
        """The largest error against float64, as a share of its bound; more than 1 is wrong.

        A product may miss by UNIT of the sum of its terms' sizes: two tf32 numbers leave 2^-21 of each, and tensor
        cores cut their sums. What follows a product carries that on.
        """
        w, B = self.w[0].double(), self.batch
        kept = [(t, t.clone()) for t in (self.x, self.history, self.pending, self.centres)]
        x, history, pending = (value.double() for _, value in kept[:3])
        v, size = self.v.double(), self.v.double().abs() @ w.abs().T
        if self.name in ("mix", "fc1", "head"):
            v, c = torch.layer_norm(x, (D,), eps=1e-5), self.centres[1 if self.name == "fc1" else 0].double()[:, None]
            deviation = (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            size = ((x - c).abs() @ w.abs().T + (x.mean(1, keepdim=True) - c).abs() * w.sum(1).abs()) / deviation
        exact = v @ w.T + self.b.double()
        bound = UNIT * (size + self.b.double().abs())
        if self.name == "mix":
            tap = self.short[-1].double()
            s0, s1, s2 = (exact * tap + pending[0]).split(D, dim=1)
            d0, d1, d2 = (bound * tap.abs() + UNIT * pending[0].abs()).split(D, dim=1)
            rows, near, own = history.unflatten(1, (-1, B))[:8, :D], self.near[:, :D, None].double(), self.diagonal[:D]
            terms = torch.stack([rows[7], *(rows[i] * near[7 - i] for i in range(7))]).transpose(1, 2)
            z = terms.sum(0) + own.double() * s1 * s2
            dz = UNIT * terms.abs().sum(0) + own.double().abs() * (d1 * s2.abs() + s1.abs() * d2 + d1 * d2)
            exact, bound = s0 * z, d0 * z.abs() + s0.abs() * dz + d0 * dz
        elif self.name == "fc1":
            # The slope of GELU is below 1.13.
            exact, bound = torch.nn.functional.gelu(exact, approximate="tanh"), 1.13 * bound
        elif self.name != "head":
            exact, bound = exact + x, bound + UNIT * x.abs()
        self.out.fill_(float("nan"))
        self.call(shape, 0, launch)
        got = {"head": self.out, "mix": self.out.flatten()[: D * B].view(B, D), "fc1": self.out}
        share = (got.get(self.name, self.x).double() - exact).abs() / bound
        for tensor, value in kept:
            tensor.copy_(value)
        return float(share.max())

    def time(self, shape: Shape) -> float:
        """Microseconds a layer: the median of replays of all layers."""
        layers = len(self.w)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        kept = [(t, t.clone()) for t in (self.x, self.history, self.pending, self.centres)]
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            for layer in range(layers):
                self.call(shape, layer, launch)
        times = []
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / layers)
        for tensor, value in kept:
            tensor.copy_(value)
        return sorted(times)[3]


def launch(kernel, grid, arguments, settings) -> None:
    """Runs it."""
    kernel[grid](*arguments, **settings)


def compile_one(job: tuple[str, int, Shape]) -> str | None:
    """Compiles a variant into the cache that all processes share."""
    name, batch, shape = job
    try:
        problem = Problem(name, batch, "cpu")
        problem.call(shape, 0, lambda k, grid, arguments, settings: k.warmup(*arguments, grid=grid, **settings))
    except Exception as error:
        return repr(error)[:100]
    return None


def main() -> None:
    """Runs and writes one row a kernel and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--kernels", default=",".join(NAMES))
    parser.add_argument("--commit", default=str(provenance()["commit"]))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder; rows are appended")
    args = parser.parse_args()
    problems = [(name, int(batch)) for name in args.kernels.split(",") for batch in args.batches.split(",")]
    jobs = [(name, batch, shape) for name, batch in problems for shape in candidates(name, batch)]
    start = time.perf_counter()
    torch.set_num_threads(1)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        faults = dict(zip(jobs, pool.map(compile_one, jobs, chunksize=2), strict=True))
    print(f"{len(jobs)} variants compiled in {time.perf_counter() - start:.0f} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, batch in problems:
        problem, found, wrong = Problem(name, batch, "cuda"), [], []
        for shape in candidates(name, batch):
            fault = faults[name, batch, shape]
            try:
                error = problem.error(shape) if fault is None else None
                if error is not None and error <= 1:
                    found.append((round(problem.time(shape), 2), shape, error))
                else:
                    wrong.append((shape, fault or error))
            except Exception as error:  # what does not fit the device is no candidate
                wrong.append((shape, repr(error)[:100]))
        found.sort()
        row = {"name": "batch kernel", "kernel": name, "batch": batch, "best": found[:8], "worst": found[-1:],
               "tried": len(found), "wrong": wrong[:5], "wrong_count": len(wrong)}  # fmt: skip
        row |= {"commit": args.commit, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
        with (args.out / "gpu_shapes.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
