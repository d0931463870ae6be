"""Where does a decode step's time go on one GPU, by rows of the batch?

The step without tiles is timed whole, then with one kind of kernel left out of the graphs at a time: what it is faster
then, that kind costs in place, hand-overs and overlaps included. Alone, in a chain of their own, kernels cost something
else, since the next one's programs load their weights beside this one's. Tokens of the whole step are checked first:
float64 must give the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from flash_inference.engine.graphs import GpuLoop
from flash_inference.models.gpu import GRAPH, GpuDecoder
from flash_inference.ops.decode_step import triton as one
from flash_inference.ops.decode_step import triton_batch as many
from flash_inference.ops.decode_step import triton_few as few
from gpu_batch import prompts
from gpu_decode import VOCABULARY, WIDTH, against_float64, big_model, stats
from rows import RESULTS, Rows, gpu_origin

LAYERS, LENGTH, GRAPHS = 18, 2048, 60
Wanted = Callable[[dict[str, object]], bool]
KINDS: dict[str, tuple[str, Wanted]] = {
    "mix": ("project_and_mix", lambda given: True),
    "out": ("add_product", lambda given: given["N"] == WIDTH),
    "fc1": ("norm_expand", lambda given: True),
    "fc2": ("add_product", lambda given: given["N"] != WIDTH),
    "head": ("head", lambda given: True),
}


class Without:
    """A kernel whose launches are left out where `wanted` says so."""

    def __init__(self, kernel: object, wanted: Wanted) -> None:
        self.kernel, self.wanted = kernel, wanted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """The launch on that grid."""

        def launch(*arguments: object, **given: object) -> None:
            if not self.wanted(given):
                self.kernel[grid](*arguments, **given)  # pyright: ignore[reportIndexIssue]

        return launch


@contextmanager
def without(kind: str | None) -> Iterator[None]:
    """Leaves one kind of kernel out of what is captured meanwhile."""
    if kind is None:
        yield
        return
    name, wanted = KINDS[kind]
    kept = {module: getattr(module, name) for module in (one, few, many)}
    try:
        for module, kernel in kept.items():
            setattr(module, name, Without(kernel, wanted))
        yield
    finally:
        for module, kernel in kept.items():
            setattr(module, name, kernel)


def timed(decoder: GpuDecoder, batch: int, kind: str | None, graphs: int) -> tuple[GpuLoop, float]:
    """The loop, and the median microseconds of a position."""
    loop = GpuLoop(decoder, prompts(batch), GRAPH * (graphs + 2) + 1, mixing=False)
    with without(kind):
        loop.prepare()
        for _ in range(graphs + 2):
            loop.launch()
        torch.cuda.synchronize()
    return loop, stats(loop, 2 * GRAPH)["median_us"]


def main() -> None:
    """Runs and writes one row a batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--repeats", type=int, default=3, help="every variant is timed so often, in turns")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args()
    rows = Rows("gpu_step", args.out, gpu_origin(args.commit))
    model = big_model(LAYERS, WIDTH, LENGTH)
    for batch in (int(n) for n in args.batches.split(",")):
        decoder = GpuDecoder(model, LENGTH, batch=batch)
        whole = GpuLoop(decoder, prompts(batch), 600)
        made = torch.tensor([int(tokens[0]) for tokens in whole])
        answer = against_float64(model, whole, made, prompt=prompts(batch)[0])
        if answer["differences"]:
            raise SystemExit(
                f"{batch} rows: tokens are not those of float64, at {answer['different']}; nothing is timed."
            )
        times: dict[str, list[float]] = {}
        for _ in range(args.repeats):
            for kind in (None, *KINDS):
                times.setdefault(kind or "step", []).append(timed(decoder, batch, kind, GRAPHS)[1])
        medians = {kind: float(np.median(found)) for kind, found in times.items()}
        step = medians.pop("step")
        rows.add(
            {
                "batch": batch, "layers": LAYERS, "width": WIDTH, "vocabulary": VOCABULARY, "step_us": step,
                "step_least_us": min(times["step"]), "step_most_us": max(times["step"]),
                "costs_us": {kind: round(step - us, 1) for kind, us in medians.items()},
                "error": answer["worst_layer_relative_error"],
            }
        )  # fmt: skip


if __name__ == "__main__":
    with torch.inference_mode():
        main()
