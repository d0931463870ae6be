"""What does one sample cost in a stream through a 48,000-tap filter, one sample a push, for 1 and 512 channels?

Baselines in the same run: pedalboard's convolution (one channel; `pip install pedalboard`), and the direct dot product
over the last 48,000 samples. Ours is first held against the float64 convolution of the whole stream.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from flash_inference import OnlineConvolution
from flash_inference.ops.causal_conv import causal_conv
from flash_inference.testing.bounds import FFT_CONSTANT
from rows import RESULTS, read_bandwidth, spread, write

TAPS = 48_000


def ours(filter: torch.Tensor, x: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Microseconds of every push, and the output."""
    online = OnlineConvolution(filter)
    outputs, times = torch.empty_like(x), np.empty(len(x))
    for i in range(len(x)):
        sample = x[i : i + 1]
        start = time.perf_counter()
        out = online.push(sample)
        times[i] = time.perf_counter() - start
        outputs[i] = out[0]
        if (i + 1) % 10_000 == 0:
            print(f"\r  {i + 1:,} / {len(x):,} pushes", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times * 1e6, outputs


def check(filter: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> float:
    """The largest error against float64 over some channels, as a share of its bound; ends the run if it exceeds 1."""
    worst = 0.0
    for c in range(0, filter.shape[1], max(1, filter.shape[1] // 4)):
        exact = causal_conv(x[:, c].double(), filter[:, c].double())
        norms = float(x[:, c].double().norm() * filter[:, c].double().norm())
        bound = FFT_CONSTANT * torch.finfo(x.dtype).eps * math.log2(4 * TAPS) * norms
        worst = max(worst, float(((out[:, c] - exact).abs() / bound).max()))
    if worst > 1:
        sys.exit(f"the output is wrong: {worst:.2f} times the bound; nothing is reported.")
    return worst


def pedalboard_times(filter: torch.Tensor, x: torch.Tensor) -> np.ndarray | None:
    """Microseconds of one-sample calls to pedalboard's convolution; None where it is not installed."""
    try:
        from pedalboard import Convolution
    except ImportError:
        print("pedalboard is not installed; its row is missing. pip install pedalboard", file=sys.stderr)
        return None
    effect = Convolution(filter[:, 0].numpy(), sample_rate=48_000)
    samples = [np.ascontiguousarray(s.numpy().T) for s in x[:, :1].split(1)]
    effect.process(samples[0], 48_000, buffer_size=1, reset=True)
    times = np.empty(len(samples))
    for i, sample in enumerate(samples):
        start = time.perf_counter()
        effect.process(sample, 48_000, buffer_size=1, reset=False)
        times[i] = time.perf_counter() - start
    return times * 1e6


def direct_times(filter: torch.Tensor, repeats: int = 50) -> np.ndarray:
    """Microseconds of one output by the dot product over a full past: numpy's fastest reader of two streams."""
    rho = np.ascontiguousarray(filter.T.numpy())
    past = np.random.default_rng(0).standard_normal(rho.shape, np.float32)
    times = np.empty(repeats)
    for i in range(repeats):
        start = time.perf_counter()
        np.einsum("ct,ct->c", past, rho)
        times[i] = time.perf_counter() - start
    return times * 1e6


def main(argv: list[str] | None = None) -> None:
    """Runs the question and writes benchmarks/results/cpu_online.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pushes", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="2,000 pushes; the rows are printed, not written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows")
    args = parser.parse_args(argv)
    pushes = 2_000 if args.quick else args.pushes
    torch.manual_seed(0)
    rows: list[dict[str, object]] = [
        {"question": "cpu_online", "method": "limit", "read_GBps": round(read_bandwidth() / 1e9, 1)}
    ]
    for channels in (1, 512):
        filter, x = torch.randn(TAPS, channels), torch.randn(pushes, channels)
        times, out = ours(filter, x)
        share = check(filter, x, out)
        base = {"question": "cpu_online", "taps": TAPS, "channels": channels}
        rows.append(
            base | {"method": "flash", "pushes": pushes, "error_share_of_bound": round(share, 4)} | spread(times)
        )
        rows.append(base | {"method": "direct"} | spread(direct_times(filter)))
        if channels == 1 and (peer := pedalboard_times(filter, x[: min(pushes, 5_000)])) is not None:
            rows.append(base | {"method": "pedalboard", "pushes": len(peer)} | spread(peer))
    for row in rows:
        print(row, file=sys.stderr)
    if not args.quick:
        print(write("cpu_online", rows, args.out))


if __name__ == "__main__":
    main()
