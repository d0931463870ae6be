"""Does an engine run for ever: is its memory flat and are its tokens right after a million clock ticks?

Order-2 Hyena, D = 8, 2 layers, float64, random weights, on a CPU: four slots of at most 30 new tokens, a ring of 64
clocks. Requests of random lengths come at random times, greedy or drawn; some are cancelled, some paused and resumed
later. At every mark, of which a run has a hundred, the engine is emptied and memory is counted: the bytes of all
tensors of the process, which must be the same at all marks after the tenth (until then filters keep spectra of shapes
that they have not met before); the objects that the garbage collector knows; and the process's resident pages. All
tokens of every fiftieth request are checked: each must be what its sampler draws from the logits of one full forward
over prompt and tokens, in float64. The run ends with an error at the first one that is not.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path

import torch

from flash_inference import Engine, LanguageModel
from flash_inference.engine.request import Request
from flash_inference.engine.sampling import Sampler, Sampling
from flash_inference.testing import random_model
from rows import RESULTS, write

VOCAB, LENGTH, NEW, SLOTS = 32, 64, 30, 4
MARKS, WARM, WATCHED, WAITING = 100, 10, 50, 20


class Traffic:
    """Random requests to one engine, and what is counted of them."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine, self.dice = engine, torch.Generator().manual_seed(seed)
        self.requests = self.cancelled = self.paused = self.checked = self.tokens = 0
        self.watched: list[tuple[Request, list[int], dict[str, float]]] = []
        self.asleep: list[Request] = []

    def turn(self) -> None:
        """One more request, and up to 20 steps."""
        size, new, gap, kind, warm = torch.randint(1, 21, (5,), generator=self.dice).tolist()
        prompt = torch.randint(VOCAB, (size,), generator=self.dice).tolist()
        settings = {"temperature": 0.9, "seed": self.requests} if warm > 10 else {}
        request = self.engine.submit(prompt, max_new_tokens=new + 10, **settings)
        self.requests += 1
        if self.requests % WATCHED == 0:
            self.watched.append((request, prompt, settings))
        for _ in range(gap):
            self.engine.step()
        if kind == 1 and self.requests % WATCHED and not request.ended:
            self.engine.cancel(request)
            self.cancelled += 1
        elif kind < 4 and not request.ended:
            self.engine.pause(request)
            self.paused += 1
            self.asleep.append(request)
        elif self.asleep:
            self.engine.resume(self.asleep.pop(0))
        while len(self.engine.queue) > WAITING:
            self.engine.step()

    def finish(self, model: LanguageModel) -> None:
        """Runs what is left, and checks the requests that are watched."""
        for request in self.asleep:
            self.engine.resume(request)
        self.engine.run()
        for request, prompt, settings in self.watched:
            wrong = first_wrong(model, prompt, request.tokens, settings)
            if wrong is not None:
                sys.exit(f"clock {self.engine.clock}: token {wrong} of request {request.number} is wrong.")
            self.checked += 1
            self.tokens += len(request.tokens)
        self.watched, self.asleep = [], []


def first_wrong(model: LanguageModel, prompt: list[int], tokens: list[int], settings: dict[str, float]) -> int | None:
    """The first token that the sampler does not draw from the logits of one full forward, if any."""
    logits = model(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]
    sampler = Sampler(Sampling(**settings), 1, VOCAB, [torch.tensor(prompt)])  # type: ignore[arg-type]
    drawn = [int(sampler(row[None])) for row in logits]
    return next((i for i, (one, two) in enumerate(zip(drawn, tokens, strict=True)) if one != two), None)


def held() -> tuple[int, int, int]:
    """Bytes of the process's tensors, objects known to the garbage collector, resident bytes."""
    gc.collect()
    objects = gc.get_objects()
    storages = [x.untyped_storage() for x in objects if type(x) is torch.Tensor]
    bytes_ = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return bytes_, len(objects), pages * os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str] | None = None) -> None:
    """Runs the question and writes benchmarks/results/ticks.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ticks", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="20,000 ticks; the row is printed, not written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows")
    args = parser.parse_args(argv)
    ticks = 20_000 if args.quick else args.ticks
    torch.set_num_threads(1)
    model = random_model(2, vocab_size=VOCAB, width=8, layers=2, length=LENGTH, dtype=torch.float64)
    engine = Engine(model, slots=SLOTS, new_tokens=NEW, length=LENGTH)
    traffic, begun, seconds = Traffic(engine), engine.clock, 0.0
    marks: list[tuple[int, int, int]] = []
    while engine.clock - begun < ticks:
        start = time.perf_counter()
        until = begun + (len(marks) + 1) * ticks // MARKS
        while engine.clock < until:
            traffic.turn()
        seconds += time.perf_counter() - start
        traffic.finish(model)
        marks.append(held())
        first = marks[min(len(marks) - 1, WARM)]
        if marks[-1][0] != first[0]:
            sys.exit(f"clock {engine.clock}: tensors hold {marks[-1][0]} bytes, and {first[0]} at an earlier mark.")
        if len(marks) % WARM == 0:
            print(f"  {engine.clock - begun} ticks, {traffic.requests} requests, {marks[-1]}", file=sys.stderr)
    row: dict[str, object] = {
        "question": "ticks",
        "ticks": engine.clock - begun,
        "requests": traffic.requests,
        "cancelled": traffic.cancelled,
        "paused": traffic.paused,
        "requests_checked": traffic.checked,
        "tokens_checked": traffic.tokens,
        "marks": len(marks),
        "tensor_bytes": marks[-1][0],
        "objects_tenth": marks[WARM][1],
        "objects_last": marks[-1][1],
        "resident_tenth": marks[WARM][2],
        "resident_last": marks[-1][2],
        "us_per_tick": round(1e6 * seconds / (engine.clock - begun), 1),
    }
    print(row if args.quick else write("ticks", [row], args.out))


if __name__ == "__main__":
    main()
