"""What does STU's one even/odd convolution save against its two branches?

The approximate STU adds k * u and ((-1)^j k_j) * u: one convolution with 2 k at even lags and 0 at odd ones. Here both
forms decode the same inputs, step by step, in turns: D = 256, float32, default tiling for the length. Outputs are held
against each other and, at some positions, against a float64 direct sum before a time is told. "dense" is the one
convolution without knowing that half of its taps are zero.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flash_inference.engine.decode import default_tiling
from flash_inference.mixers.stack import Stack
from flash_inference.ops.tile_conv import PreparedFilter
from rows import RESULTS, write

WIDTH = 256


class Steps:
    """One way to decode: a stack and how its convolutions make an output."""

    def __init__(self, stack: Stack, length: int) -> None:
        self.stack, self.state = stack, stack.init(1, default_tiling(length))
        self.seconds: list[float] = []
        self.outputs: list[Tensor] = []

    def advance(self, y: Tensor) -> None:
        """The outputs of the next inputs y [N, D], one position at a time."""
        for row in y[:, None, None]:
            start = time.perf_counter()
            self.stack.begin(self.state, 1)
            out = sum(self.stack.mix(self.state, m, row) for m in range(self.stack.count))
            self.stack.commit(self.state, 1)
            self.seconds.append(time.perf_counter() - start)
            self.outputs.append(out[0, 0])


def main(argv: list[str] | None = None) -> None:
    """Runs the question and writes benchmarks/results/parity.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--quick", action="store_true", help="2,048 positions; the rows are printed, not written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows")
    args = parser.parse_args(argv)
    L = 2_048 if args.quick else args.length
    torch.manual_seed(0)
    k, y = torch.randn(WIDTH, L) / L**0.5, torch.randn(L, WIDTH)
    signs = torch.tensor([1.0, -1.0]).repeat(L // 2)
    one = k * (1 + signs)
    ways = {
        "strided": Steps(Stack(PreparedFilter(one, stride=2), WIDTH), L),
        "dense": Steps(Stack(PreparedFilter(one), WIDTH), L),
        "two branches": Steps(Stack(PreparedFilter(torch.cat([k, k * signs])), WIDTH), L),
    }
    turn = L // 64
    with torch.inference_mode():
        for first in range(0, L, turn):
            for way in ways.values():
                way.advance(y[first : first + turn])
            print(f"\r  {first + turn:,} / {L:,} positions ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    places = [0, 1, 77, L // 2 + 1, L - 1]
    exact = [(y[: t + 1].double() * one.double().T[: t + 1].flip(0)).sum(0) for t in places]
    errors = {}
    for name, way in ways.items():
        errors[name] = max(float((way.outputs[t] - e).abs().max()) for t, e in zip(places, exact, strict=True))
        if not errors[name] < 1e-4:
            sys.exit(f"{name}: an output differs from the direct sum by {errors[name]:.1e}; nothing timed.")
    blocks = {name: np.array(way.seconds).reshape(64, -1).sum(1) for name, way in ways.items()}
    rows: list[dict[str, object]] = []
    for name, way in ways.items():
        micro = np.array(way.seconds) * 1e6
        ratio = blocks[name] / blocks["strided"]
        rows.append(
            {
                "question": "parity", "way": name, "length": L, "us_per_position": round(float(micro.mean()), 1),
                "median_us": round(float(np.median(micro)), 1), "worst_us": round(float(micro.max()), 1),
                "over_strided": round(float(blocks[name].sum() / blocks["strided"].sum()), 2),
                "over_strided_by_turn": [round(float(q), 2) for q in np.quantile(ratio, [0.25, 0.5, 0.75])],
                "error": errors[name],
            }
        )  # fmt: skip
        print(rows[-1])
    if not args.quick:
        print(write("parity", rows, args.out))


if __name__ == "__main__":
    main()
