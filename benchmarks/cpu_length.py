"""What does a token cost on a CPU as the sequence grows: ours, lazy, eager, epoched, full recompute?

Order-2 Hyena, D = 256, 4 layers, batch 1, float32, greedy, random weights. Every decoder first has to give the tokens
of the full forward. Ours, Relaxed, Blocked and epoched are real runs; lazy and eager are whole steps timed at many
positions with a full state, integrated over the length. All take turns of a few hundred tokens, in one session.
"Mixing" is a decoder's mean minus that of the same decode with mixing removed.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch

from flash_inference.engine.decode import decode
from flash_inference.mixers.stack import Stack, StackState
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.decoder import Decoder
from flash_inference.ops.tile_conv import tile_conv
from flash_inference.testing import greedy_differences, random_model
from flash_inference.tiling import Blocked, Relaxed, Tiling
from rows import RESULTS, read_bandwidth, spread, write

WIDTH, LAYERS = 256, 4
CHECKED = 1024
START = torch.zeros(1, 1, dtype=torch.long)


class Unmixed(Stack):
    """The step with mixing removed: no past is kept and none is read. It stays on staged row 0."""

    def begin(self, state: StackState, n: int) -> None:
        state.staged, state.paid = True, state.clock

    def commit(self, state: StackState, n: int) -> None:
        state.clock += n
        state.paid = state.clock


class Baseline(Stack):
    """A decoder without tiles: nothing is ever due, and every step begins anew, on staged row 0."""

    def take(self, state: StackState) -> tuple[()]:
        return ()


class LazyStack(Baseline):
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
        t, out = state.clock, state.partial.numpy()[0, 0]
        state.staged = True
        self.dot(0, t, out)

    def dot(self, first: int, t: int, out: np.ndarray) -> None:
        """out[c] = sum over first <= i < t of past[c, i] rho[c, t - i], the channels shared out over the cores."""
        end = self.rho.shape[1] - 1

        def part(c: slice) -> None:
            np.einsum("ct,ct->c", self.past[c, first:t], self.rho[c, end - t + first : end], out=out[c])

        list(self.pool.map(part, self.cuts))

    def commit(self, state: StackState, n: int) -> None:
        self.past[:, state.clock] = state.inputs.numpy()[0, 0]
        state.clock += 1


class EpochedStack(LazyStack):
    """FutureFill: one tall rectangle by FFT per epoch of about sqrt(L log2 L) positions, lazy inside the epoch."""

    def prepare(self, length: int) -> None:
        super().prepare(length)
        self.epoch = round((length * np.log2(length)) ** 0.5)
        self.filled = np.zeros((self.filter.channels, self.epoch), np.float32)

    def begin(self, state: StackState, n: int) -> None:
        t, out = state.clock, state.partial.numpy()[0, 0]
        state.staged = True
        r = t % self.epoch
        if r == 0:
            self.filled[:] = 0
        if r == 0 and t:
            lanes = torch.from_numpy(self.filled)[:, None].permute(2, 1, 0)
            tile_conv(torch.from_numpy(self.past)[:, None, :t].permute(2, 1, 0), self.filter, 1, out=lanes)
        self.dot(t - r, t, out)
        out += self.filled[:, r]


class EagerStack(Baseline):
    """The strong eager decoder: each new input adds its share to all later positions, time-major, in one call."""

    def prepare(self, length: int) -> None:
        """Allocates the sums and the time-major taps."""
        self.sums = torch.zeros(length, self.filter.channels)
        self.rho_rows = self.filter.rho.T.contiguous()

    def begin(self, state: StackState, n: int) -> None:
        state.staged = True
        state.partial[0, 0] = self.sums[state.clock]

    def commit(self, state: StackState, n: int) -> None:
        t = state.clock
        left = len(self.sums) - t - 1
        self.sums[t + 1 :].addcmul_(self.rho_rows[1 : left + 1], state.inputs[0])
        state.clock += 1


BASELINES: dict[str, type[Stack]] = {"lazy": LazyStack, "eager": EagerStack, "epoched": EpochedStack}


class Run:
    """A real greedy run, advanced in pieces: microseconds of every token but the first, which allocates the state."""

    def __init__(self, decoder: Decoder, length: int, tiling: Tiling | None = None) -> None:
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        choose = lambda logits: logits.argmax(-1)  # noqa: E731
        self.steps = decode(decoder, START, choose, max_new_tokens=length, tiling=tiling)
        self.tokens.append(int(next(self.steps)))

    def advance(self, n: int) -> None:
        """Makes up to n more tokens."""
        last = time.perf_counter()
        for token in islice(self.steps, n):
            now = time.perf_counter()
            self.seconds.append(now - last)
            self.tokens.append(int(token))
            last = time.perf_counter()

    @property
    def microseconds(self) -> np.ndarray:
        """Of each token."""
        return np.array(self.seconds) * 1e6


class Sampled:
    """A decoder whose whole step is timed at positions that it does not have to walk to, its state full of noise."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        self.decoder, self.state = decoder, decoder.init(1, Blocked(length))
        self.positions: list[int] = []
        self.microseconds: list[float] = []
        for cache in (getattr(decoder.stack, "past", None), getattr(decoder.stack, "sums", None)):
            if isinstance(cache, np.ndarray):
                cache[:] = np.random.default_rng(0).standard_normal(cache.shape, np.float32) / 100
            elif cache is not None:
                cache.normal_().div_(100)

    def sample(self, t: int, repeats: int = 3) -> None:
        """Times the step that reads position t: the median of a few."""
        times = []
        for _ in range(repeats):
            self.state.stack.clock = t
            start = time.perf_counter()
            self.decoder.extend(self.state, START).argmax(-1)
            times.append((time.perf_counter() - start) * 1e6)
        self.positions.append(t)
        self.microseconds.append(float(np.median(times)))


def with_stack(model: LanguageModel, length: int, kind: type[Stack]) -> Decoder:
    """The same decoder over another stack."""
    decoder = Decoder(model, length)
    old = decoder.stack
    decoder.stack = kind(old.filter, old.width, old.skip)
    if isinstance(decoder.stack, LazyStack | EagerStack):
        decoder.stack.prepare(length)
    return decoder


def integrate(positions: list[int], values: list[float], length: int) -> float:
    """Mean over 0 .. length - 1 of the piecewise linear curve through the samples."""
    grid = np.arange(length)
    return float(np.interp(grid, positions, values).mean())


def check(model: LanguageModel, name: str, tokens: list[int]) -> None:
    """Ends the benchmark unless the tokens are those of the full forward (ties as defined in testing.ties aside)."""
    wrong, ties = greedy_differences(model, START, torch.tensor([tokens]))
    if wrong:
        sys.exit(f"{name}: {len(wrong)} tokens differ from the full forward, the first at {wrong[0]}; nothing timed.")
    if ties:
        print(f"{name}: ties {ties}", file=sys.stderr)


def first_tokens(decoder: Decoder, length: int, count: int) -> list[int]:
    """The first tokens that a baseline decoder makes."""
    run = Run(decoder, length, Blocked(length))
    run.advance(count - 1)
    return run.tokens


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
    """All decoders at one length, in turns of a few hundred tokens: what the machine does meanwhile meets all alike."""
    ours = Decoder(model, length)
    baselines = {name: with_stack(model, length, kind) for name, kind in BASELINES.items()}
    for name, baseline in baselines.items():
        check(model, name, first_tokens(baseline, length, min(CHECKED, length)))
    runs = {
        "unmixed": Run(with_stack(model, length, Unmixed), length),
        "flash": Run(ours, length),
        "relaxed": Run(ours, length, Relaxed(length)),
        "blocked": Run(ours, length, Blocked(length)),
        "epoched": Run(baselines["epoched"], length, Blocked(length)),
    }
    sampled = {name: Sampled(baselines[name], length) for name in ("lazy", "eager")}
    turn, started = max(64, length // 128), time.perf_counter()
    for first in range(0, length, turn):
        for run in runs.values():
            run.advance(turn)
        for each in sampled.values():
            each.sample(min(first + turn // 2, length - 1))
        left = (time.perf_counter() - started) * (length - first - turn) / (first + turn)
        print(f"\r  {first + turn:,} / {length:,} tokens, {left:,.0f} s left ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for name in ("flash", "relaxed", "blocked"):
        check(model, name, runs[name].tokens)
    check(model, "epoched", runs["epoched"].tokens[:CHECKED])

    bare = float(runs["unmixed"].microseconds.mean())
    rows: list[dict[str, object]] = []
    for name, run in runs.items():
        numbers = spread(run.microseconds)
        more: dict[str, object] = {"worst_over_median": round(numbers["worst_us"] / numbers["median_us"], 2)}
        if name != "unmixed":
            more["mixing_us"] = round(numbers["us_per_token"] - bare, 1)
        rows.append({"question": "cpu_length", "decoder": name, "length": length, **numbers, **more})
    for name, each in sampled.items():
        mean = integrate(each.positions, each.microseconds, length)
        more = {"mixing_us": round(mean - bare, 1), "sampled_positions": len(each.positions)}
        if name == "lazy":
            middle = np.abs(np.array(each.positions) - length / 2).argsort()[:9]
            seconds = (float(np.median(np.array(each.microseconds)[middle])) - bare) / 1e6
            rate = 2 * 4 * WIDTH * LAYERS * (length / 2) / seconds
            more |= {"read_GBps_at_half": round(rate / 1e9, 1), "share_of_read_bandwidth": round(rate / bandwidth, 2)}
        rows.append(
            {"question": "cpu_length", "decoder": name, "length": length, "us_per_token": round(mean, 1), **more}
        )
    for row in rows:
        print(
            f"  {row['decoder']:9s} {row['us_per_token']:9.1f} us, mixing {row.get('mixing_us', 0):8.1f}",
            file=sys.stderr,
        )
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
        rows += run_length(model, length, max(bandwidth, read_bandwidth()))
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
