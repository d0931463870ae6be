"""How steady is a token on one GPU over a whole run, with large tiles spread out and with them paid at once?

The setting of `gpu_decode`: order-2 Hyena, D = 768, 18 layers, vocabulary 50,304, float32 state, batch 1, greedy. The
answer first: at sampled positions the mixers' inputs are recomputed in float64 from the tokens, and both runs have to
give the same tokens. Step times are differences of stamps that the device's own clock writes with every token; the
first 16 are left out. `quantiles` are (share of steps that are slower, microseconds), for the plot.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flash_inference.engine.graphs import GpuLoop
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.gpu import GRAPH, GpuDecoder
from gpu_decode import VOCABULARY, WIDTH, at_samples, big_model, stats, whole
from rows import RESULTS, Rows, gpu_origin

ERROR = 2e-6
"""Of the mixers' inputs, relative, at most: float32 sums over all that came before."""


def quantiles(loop: GpuLoop, skip: int, points: int = 80) -> list[tuple[float, float]]:
    """Step times that a share of the steps exceeds, shares spaced evenly by their logarithm."""
    stamps = loop.run.stamps[loop.run.lead :].cpu().numpy()
    steps = np.sort(np.diff(stamps[stamps > 0])[skip:] / 1e3)[::-1]
    places = np.unique(np.geomspace(1, len(steps), points).astype(int)) - 1
    return [(round(float((at + 1) / len(steps)), 8), round(float(steps[at]), 2)) for at in places]


def run(model: LanguageModel, tokens: int, latency: str) -> tuple[dict[str, object], Tensor]:
    """One run to the end: its row, and its tokens."""
    decoder = GpuDecoder(model, tokens, latency=latency)
    loop, made, seconds = whole(decoder, tokens)
    places = [tokens - 2, tokens // 2 + 77, tokens // 8 + 5]
    error = at_samples(model, decoder, loop, made, places)
    if not error <= ERROR:
        raise SystemExit(f"{latency}: the mixers' inputs are wrong, relative error {error:.3g} at one of {places}")
    row: dict[str, object] = {"latency": latency, "seconds": seconds, "us_per_token": seconds / tokens * 1e6}
    row |= {"worst_layer_relative_error": error, "at": places, "distinct": len(set(made.tolist()))}
    row |= {"forced": loop.schedule.forced, "late": loop.late}
    return row | stats(loop, GRAPH) | {"quantiles": quantiles(loop, GRAPH)}, made


def main() -> None:
    """Runs both and writes a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--latencies", default="bounded,relaxed")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--quick", action="store_true", help="4 layers of width 256, 16,384 tokens")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.width, args.tokens = 4, 256, 16_384
    shape = {"layers": args.layers, "width": args.width, "tokens": args.tokens, "vocabulary": args.vocabulary}
    rows = Rows("gpu_latency", args.out, gpu_origin(args.commit) | shape)
    model, first = big_model(args.layers, args.width, args.tokens, args.vocabulary), None
    for latency in args.latencies.split(","):
        row, made = run(model, args.tokens, latency)
        if first is not None:
            row["same_tokens"] = int((made == first).sum())
        first = made if first is None else first
        rows.add(row)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
