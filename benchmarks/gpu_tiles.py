"""What does a tile of all mixers cost on one GPU, by side: summed directly, by FFT, and at the least?

One square of side U on 18 x 768 channels, float32, random data, per implementation and batch: microseconds on the
device's clock, replayed from a graph. Each result is first held against float64 under the bounds of `tune`. The least
is what moving the bytes takes at 3.0 TB/s: the inputs once, the outputs twice, 2 U taps once. Large sides are measured
on fewer channels and scaled; `measured_channels` says how many.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from flash_inference.cli.tune_gpu import GpuCase, measure_gpu
from rows import RESULTS, Rows, gpu_origin

CHANNELS, BANDWIDTH = 18 * 768, 3.0e12
POINTS = 1 << 27
"""Numbers of a tile's inputs, at most."""


def floor(side: int, channels: int, batch: int) -> float:
    """Microseconds that the bytes of a tile take."""
    return side * channels * (3 * batch + 2) * 4 / BANDWIDTH * 1e6


def measured_channels(side: int, batch: int) -> int:
    """As many channels as bound the tile's inputs by POINTS: whole layers, or an even part of one."""
    most = POINTS // (side * batch)
    return min(CHANNELS, most // 768 * 768 if most >= 768 else most // 2 * 2)


def main() -> None:
    """Runs and writes one row a side, batch and implementation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", default=",".join(str(1 << q) for q in range(17)))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=0.05, help="a tile is timed, at least")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--quick", action="store_true", help="batch 1, every other side")
    args = parser.parse_args()
    sides = [int(side) for side in args.sides.split(",")]
    batches = [int(batch) for batch in args.batches.split(",")]
    if args.quick:
        sides, batches = sides[::2], batches[:1]
    rows, failed = Rows("gpu_tiles", args.out, gpu_origin(args.commit)), False
    for batch in batches:
        wrong: dict[str, str] = {}
        for side in sides:
            channels = measured_channels(side, batch)
            for m in measure_gpu(GpuCase(side, channels, batch), args.seconds, wrong):
                scale = CHANNELS / channels
                rows.add(
                    {
                        "side": side, "batch": batch, "channels": CHANNELS, "measured_channels": channels,
                        "impl": m.impl, "us": round(m.microseconds * scale, 3), "relative_error": m.error,
                        "floor_us": round(floor(side, CHANNELS, batch), 3),
                        "us_per_token": round(m.microseconds * scale / (2 * side), 4),
                    }
                )  # fmt: skip
            torch.cuda.empty_cache()
        for message in wrong.values():
            failed = True
            rows.add({"batch": batch, "wrong": message})
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
