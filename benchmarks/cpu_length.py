"""What does a token cost on a CPU as the sequence grows: ours, lazy, eager, epoched, full recompute?

Order-2 Hyena, D = 256, 4 layers, batch 1, float32, greedy, random weights. Every decoder first has to give the tokens
of the full forward. Ours, Relaxed and epoched are real runs; lazy and eager are whole steps timed at sampled positions
with a full state, integrated over the length. "Mixing" is a decoder's mean minus that of the same decode with mixing
removed. All rows come from one session.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flash_inference.engine.decode import decode, default_tiling
from flash_inference.mixers.stack import Stack, StackState
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.decoder import Decoder, ModelState
from flash_inference.ops.tile_conv import tile_conv
from flash_inference.testing import greedy_differences, random_model
from flash_inference.tiling import Blocked, Prompted, Relaxed, Tiling
from rows import RESULTS, read_bandwidth, spread, write

WIDTH, LAYERS = 256, 4
CHECKED = 1024
SAMPLES = 12
START = torch.zeros(1, 1, dtype=torch.long)


class Unmixed(Stack):
    """The step with mixing removed: no past is kept and none is read."""

    def begin(self, state: StackState, n: int) -> None:
        state.staged, state.paid = True, state.clock

    def commit(self, state: StackState, n: int) -> None:
        state.clock += n
        state.paid = state.clock


class LazyStack(Stack):
    """The strong lazy decoder: inputs and reversed taps side by side in memory, one dot product per channel and step.

    All layers in one call, since no layer needs the position to come; numpy's einsum on every core, the fastest
    reader of two streams among what was tried (torch einsum, bmm, vecdot, mul-sum, dot; numpy vecdot, einsum).
    """

    def prepare(self, length: int) -> None:
        """Allocates the cache and the reversed taps."""
        self.past = np.zeros((self.filter.channels, length), np.float32)
        self.rho = np.ascontiguousarray(self.filter.rho.numpy()[:, ::-1])
        self.pool = ThreadPoolExecutor(torch.get_num_threads())
        edges = np.linspace(0, self.filter.channels, torch.get_num_threads() + 1).astype(int)
        self.cuts = [slice(a, b) for a, b in pairwise(edges)]

    def begin(self, state: StackState, n: int) -> None:
        t, out = state.clock, state.partial.numpy()[state.clock - state.base, 0]
        state.staged, state.paid = True, t
        self.dot(0, t, out)

    def dot(self, first: int, t: int, out: np.ndarray) -> None:
        """out[c] = sum over first <= i < t of past[c, i] rho[c, t - i], the channels shared out over the cores."""
        end = self.rho.shape[1] - 1

        def part(c: slice) -> None:
            np.einsum("ct,ct->c", self.past[c, first:t], self.rho[c, end - t + first : end], out=out[c])

        list(self.pool.map(part, self.cuts))

    def commit(self, state: StackState, n: int) -> None:
        self.past[:, state.clock] = state.inputs.numpy()[state.clock - state.base, 0]
        state.clock += 1


class EpochedStack(LazyStack):
    """FutureFill: one tall rectangle by FFT per epoch of about sqrt(L log2 L) positions, lazy inside the epoch."""

    def prepare(self, length: int) -> None:
        super().prepare(length)
        self.epoch = round((length * np.log2(length)) ** 0.5)
        self.filled = np.zeros((self.filter.channels, self.epoch), np.float32)

    def begin(self, state: StackState, n: int) -> None:
        t, out = state.clock, state.partial.numpy()[state.clock - state.base, 0]
        state.staged, state.paid = True, t
        r = t % self.epoch
        if r == 0 and t:
            self.filled[:] = 0
            lanes = torch.from_numpy(self.filled)[:, None].permute(2, 1, 0)
            tile_conv(torch.from_numpy(self.past)[:, None, :t].permute(2, 1, 0), self.filter, 1, out=lanes)
        self.dot(t - r, t, out)
        out += self.filled[:, r]


class EagerStack(Stack):
    """The strong eager decoder: each new input adds its share to all later positions, time-major, in one call."""

    def prepare(self, length: int) -> None:
        """Allocates the sums and the time-major taps."""
        self.sums = torch.zeros(length, self.filter.channels)
        self.rho_rows = self.filter.rho.T.contiguous()

    def begin(self, state: StackState, n: int) -> None:
        state.staged, state.paid = True, state.clock
        state.partial[state.clock - state.base, 0] = self.sums[state.clock]

    def commit(self, state: StackState, n: int) -> None:
        t = state.clock
        left = len(self.sums) - t - 1
        self.sums[t + 1 :].addcmul_(self.rho_rows[1 : left + 1], state.inputs[t - state.base])
        state.clock += 1


BASELINES: dict[str, type[Stack]] = {"lazy": LazyStack, "eager": EagerStack, "epoched": EpochedStack}


def timed(decoder: Decoder, length: int, tiling: Tiling | None = None) -> tuple[np.ndarray, Tensor]:
    """A real greedy run of `length` new tokens: microseconds of each, and the tokens."""
    times, tokens = np.empty(length), torch.empty(length, dtype=torch.long)
    run = decode(decoder, START, lambda logits: logits.argmax(-1), max_new_tokens=length, tiling=tiling)
    last = time.perf_counter()
    for i in range(length):
        tokens[i] = next(run)[0]
        now = time.perf_counter()
        times[i], last = (now - last) * 1e6, now
        progress(i + 1, length)
    run.close()
    return times, tokens


def with_stack(model: LanguageModel, length: int, kind: type[Stack]) -> Decoder:
    """The same decoder over another stack."""
    decoder = Decoder(model, length)
    old = decoder.stack
    decoder.stack = kind(old.filter, old.width, old.skip)
    if isinstance(decoder.stack, LazyStack | EagerStack):
        decoder.stack.prepare(length)
    return decoder


def steps_at(decoder: Decoder, positions: list[int], length: int, repeats: int = 5) -> list[float]:
    """Median microseconds of a whole step (choose, extend) at each position, the state full of random numbers."""
    stack = decoder.stack
    state = decoder.init(1, Blocked(length))
    for cache in (getattr(stack, "past", None), getattr(stack, "sums", None)):
        if isinstance(cache, np.ndarray):
            cache[:] = np.random.default_rng(0).standard_normal(cache.shape, np.float32) / 100
        elif cache is not None:
            cache.normal_().div_(100)
    return [float(np.median([one_step(decoder, state, t) for _ in range(repeats)])) for t in positions]


def one_step(decoder: Decoder, state: ModelState, t: int) -> float:
    """Microseconds of the step that reads position t."""
    state.stack.clock = t
    start = time.perf_counter()
    decoder.extend(state, START).argmax(-1)
    return (time.perf_counter() - start) * 1e6


def integrate(positions: list[int], values: list[float], length: int) -> float:
    """Mean over 0 .. length - 1 of the piecewise linear curve through the samples."""
    grid = np.arange(length)
    return float(np.interp(grid, positions, values).mean())


def check(model: LanguageModel, name: str, tokens: Tensor) -> None:
    """Ends the benchmark unless the tokens are those of the full forward (ties as defined in testing.ties aside)."""
    wrong, ties = greedy_differences(model, START, tokens[None])
    if wrong:
        sys.exit(f"{name}: {len(wrong)} tokens differ from the full forward, the first at {wrong[0]}; nothing timed.")
    if ties:
        print(f"{name}: ties {ties}", file=sys.stderr)


def progress(done: int, total: int) -> None:
    """A line on stderr, now and then."""
    if done % 4096 == 0 or done == total:
        print(f"\r  {done:,} / {total:,} tokens", end="" if done < total else "\n", file=sys.stderr, flush=True)


def full_recompute(model: LanguageModel, length: int) -> float:
    """Microseconds of one full forward of `length` positions: the median of 3."""
    tokens = torch.randint(0, model.config.vocab_size, (1, length))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            model(tokens)
        times.append((time.perf_counter() - start) * 1e6)
    return float(np.median(times))


def run_length(model: LanguageModel, length: int, bandwidth: float) -> list[dict[str, object]]:
    """All decoders at one length."""
    rows: list[dict[str, object]] = []
    bare, _ = timed(with_stack(model, length, Unmixed), length)
    bare_us = float(bare.mean())

    def row(decoder: str, numbers: dict[str, float], **more: object) -> None:
        mixing = numbers["us_per_token"] - bare_us
        rows.append(
            {
                "question": "cpu_length",
                "decoder": decoder,
                "length": length,
                **numbers,
                "mixing_us": round(mixing, 1),
                **more,
            }
        )
        print(f"  {decoder:9s} {numbers['us_per_token']:9.1f} us/token, mixing {mixing:8.1f}", file=sys.stderr)

    rows.append({"question": "cpu_length", "decoder": "unmixed", "length": length, **spread(bare)})
    decoder = Decoder(model, length)
    times, tokens = timed(decoder, length)
    check(model, "flash", tokens)
    row(
        "flash",
        spread(times),
        tiling=repr(default_tiling(length - 1, 1)),
        worst_over_median=round(float(times.max() / np.median(times)), 2),
    )
    relaxed: dict[str, Callable[[], Tiling]] = {
        "relaxed": lambda: Prompted(Relaxed(length - 1), 1),
        "blocked": lambda: Prompted(Blocked(length - 1), 1),
    }
    for name, make in relaxed.items():
        times, tokens = timed(decoder, length, make())
        check(model, name, tokens[:CHECKED])
        row(name, spread(times), tiling=repr(make()))
    del decoder
    positions = [int(p) for p in np.linspace(1, length - 1, SAMPLES)]
    for name in ("lazy", "eager"):
        baseline = with_stack(model, length, BASELINES[name])
        check(model, name, timed(baseline, min(CHECKED, length), Blocked(length))[1])
        steps = steps_at(baseline, positions, length)
        mean = integrate(positions, steps, length)
        more: dict[str, object] = {"positions": positions, "steps_us": [round(s, 1) for s in steps]}
        if name == "lazy":
            middle = steps_at(baseline, [length // 2], length, 9)[0] - bare_us
            rate = 2 * WIDTH * LAYERS * 4 * (length // 2) / middle * 1e6
            more |= {"read_share_at_half": round(rate / bandwidth, 2), "read_GBps": round(rate / 1e9, 1)}
        row(name, {"us_per_token": round(mean, 1)}, **more)
        del baseline
    epoched = with_stack(model, length, EpochedStack)
    times, tokens = timed(epoched, length, Blocked(length))
    check(model, "epoched", tokens[:CHECKED])
    row("epoched", spread(times), epoch=epoched.stack.epoch)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Runs the question and writes benchmarks/results/cpu_length.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--quick", action="store_true", help="short lengths only; the rows are printed, not written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows")
    args = parser.parse_args(argv)
    lengths = [512, 1024] if args.quick else args.lengths
    torch.manual_seed(0)
    model = random_model(2, vocab_size=256, width=WIDTH, layers=LAYERS, length=max(lengths))
    bandwidth = read_bandwidth()
    rows: list[dict[str, object]] = [
        {"question": "cpu_length", "decoder": "limit", "read_GBps": round(bandwidth / 1e9, 1)}
    ]
    samples = [n for n in (64, 256, 1024, 4096, 16384, 65536) if n <= max(lengths)]
    forwards = [full_recompute(model, n) for n in samples]
    for length in lengths:
        print(f"length {length:,}", file=sys.stderr)
        rows += run_length(model, length, bandwidth)
        mean = integrate(samples, forwards, length)
        last = float(np.interp(length, samples, forwards))
        numbers = {"us_per_token": round(mean, 1), "forward_us": round(last, 1)}
        rows.append({"question": "cpu_length", "decoder": "full", "length": length, **numbers})
    if args.quick:
        for each in rows:
            print(each)
    else:
        print(write("cpu_length", rows, args.out))


if __name__ == "__main__":
    main()
