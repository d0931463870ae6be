"""How much of a fixed batch's speed does continuous traffic reach on one GPU?

Order-2 Hyena, D = 768, 4 D MLP, vocabulary 50,304, M = 18, float32 state, weights that bfloat16 holds exactly, greedy,
random weights. An engine of 32 slots gets requests of 100 to 8,000 positions, prompt included, lengths spread evenly,
that come at random (exponential gaps, counted in steps) and slightly faster than it can serve them: rows join and leave
all the time. Timed are `--seconds` behind a warm-up of as many positions as the longest request has. The baseline, in
the same run, is a fixed batch of as many rows as the traffic had live on average, all begun together, for as many
tokens as the mean request makes; its prompts are not timed, the traffic's are. Before any speed is told, the tokens of
sampled requests, most of which joined among running rows, must be those of the full forward, ties aside. With `--draw`
every other request draws its tokens, at temperature 1, with `--ranked` from a top_p of 0.9; the others are checked.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import flash_inference as fi
from flash_inference.engine.batch_gpu import GpuBatch
from flash_inference.engine.graphs import GpuLoop
from flash_inference.engine.request import Request, Status
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.gpu import GRAPH, GpuDecoder
from flash_inference.testing import greedy_differences
from gpu_decode import VOCABULARY, WIDTH, big_model
from rows import RESULTS, Rows, gpu_origin, spread


class Traffic:
    """Requests of `lengths` positions in all, prompts of up to `prompt` of them, that come `load` times too fast."""

    def __init__(
        self, engine: fi.Engine, lengths: tuple[int, int], prompt: int, load: float, most: int, seed: int = 1,
        drawn: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        assert isinstance(engine.batch, GpuBatch)
        self.engine, self.batch, self.draw = engine, engine.batch, random.Random(seed)
        self.lengths, self.prompt, self.most, self.drawn = lengths, prompt, most, drawn or {}
        self.gap = sum(lengths) / 2 / GRAPH / engine.slots / load
        self.made: list[tuple[Request, list[int]]] = []
        self.due, self.told = 0.0, 0
        self.stamps: list[np.ndarray] = []
        self._noted = 0

    def step(self) -> None:
        """Submits those that have come, makes a step, and notes the device's times of its positions."""
        while self.due <= self.engine.steps and len(self.made) < self.most:
            total = self.draw.randint(*self.lengths)
            longest = min(self.prompt, total // 2)
            prompt = [self.draw.randrange(VOCABULARY) for _ in range(self.draw.randint(1, longest))]
            own = self.drawn if len(self.made) % 2 else {}
            request = self.engine.submit(prompt, max_new_tokens=total - len(prompt), stop_tokens=(), **own)
            self.made.append((request, prompt))
            self.due += self.draw.expovariate(1 / self.gap)
        self.told += sum(event.token is not None for event in self.engine.step())
        if self.landed - self._noted >= self.batch.ring // 2:
            self.note()

    @property
    def landed(self) -> int:
        """Positions whose tokens the host has seen."""
        return self.engine.clock - GRAPH * len(self.batch._flights)

    def note(self) -> None:
        """Takes the times of the positions since the last note out of the ring."""
        landed = self.landed
        self.stamps.append(self.batch.run.stamps.cpu().numpy()[np.arange(self._noted, landed) % self.batch.ring])
        self._noted = landed

    def run(self, seconds: float) -> dict[str, object]:
        """So many seconds of it: tokens a second, live rows, and the gaps between the tokens of a row."""
        self.note()
        self.stamps.clear()
        told, landed, steps, start = self.told, self.landed, 0, time.perf_counter()
        while time.perf_counter() - start < seconds and not (len(self.made) == self.most and self.engine.idle):
            self.step()
            steps += 1
        seconds = time.perf_counter() - start
        self.note()
        tokens, positions = self.told - told, self.landed - landed
        gaps = np.diff(np.concatenate(self.stamps)) / 1e3
        joined = sum(request.joined is not None and request.joined >= landed for request, _ in self.made)
        return {
            "seconds": round(seconds, 3), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1),
            "live_rows": round(tokens / positions, 2), "joins": joined, "us_per_position": round(
                seconds / positions * 1e6, 1
            ), "gaps": spread(gaps), "worst_gap_over_median": round(float(gaps.max() / np.median(gaps)), 2),
            "late": self.batch.late, "forced": self.batch.schedule.forced,
        }  # fmt: skip


def check(model: LanguageModel, request: Request, prompt: list[int]) -> dict[str, object]:
    """Ends the benchmark unless the tokens so far are those of the full forward, ties aside."""
    device = model.embedding.weight.device
    tokens = torch.tensor([request.tokens], device=device)
    wrong, ties = greedy_differences(model, torch.tensor([prompt], device=device), tokens)
    if wrong:
        sys.exit(f"request {request.number}: {len(wrong)} tokens differ, the first at {wrong[0]}; no speed is told.")
    return {
        "prompt": len(prompt), "tokens": len(request.tokens), "distinct": len(set(request.tokens)),
        "joined": request.joined, "ties": [tie._asdict() for tie in ties],
    }  # fmt: skip


def fixed(model: LanguageModel, batch: int, prompt: int, new: int, repeats: int = 3) -> dict[str, object]:
    """A batch that begins and ends together, tokens read by the host as they come: the median of a few runs."""
    decoder = GpuDecoder(model, prompt + new - 1, batch=batch, prompt=prompt)
    prompts = torch.randint(VOCABULARY, (batch, prompt), generator=torch.Generator().manual_seed(2))
    seconds: list[float] = []
    for _ in range(repeats):
        loop = GpuLoop(decoder, prompts, new)
        loop.prepare()
        start = time.perf_counter()
        for _ in loop:
            pass
        seconds.append(time.perf_counter() - start)
        del loop
    rate = batch * new / statistics.median(seconds)
    return {
        "batch": batch, "prompt": prompt, "new_tokens": new, "seconds": [round(each, 3) for each in seconds],
        "tokens_per_s": round(rate, 1),
    }  # fmt: skip


def main() -> None:
    """Runs and writes gpu_traffic.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--lengths", default="100,8000", help="shortest and longest request, prompt included")
    parser.add_argument("--prompt", type=int, default=512, help="longest prompt")
    parser.add_argument("--load", type=float, default=1.2, help="arrivals over what the slots can serve")
    parser.add_argument("--requests", type=int, default=1 << 30, help="no more arrive than these")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long traffic is timed")
    parser.add_argument("--checked", type=int, default=6, help="requests whose tokens are checked")
    parser.add_argument("--draw", action="store_true", help="every other request draws its tokens")
    parser.add_argument("--ranked", action="store_true", help="and does so from the most likely ones")
    parser.add_argument("--commit", help="where the source has no history")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows")
    args = parser.parse_args()
    shortest, longest = (int(n) for n in args.lengths.split(","))
    model = big_model(args.layers, args.width, longest)
    engine = fi.Engine(model, slots=args.slots, new_tokens=longest - 1, length=longest)
    drawn = {"temperature": 1.0} | ({"top_p": 0.9} if args.ranked else {}) if args.draw else None
    traffic = Traffic(engine, (shortest, longest), args.prompt, args.load, args.requests, drawn=drawn)
    planned = engine.batch.fixed
    # A full collection of all that the imports have made stops the host for a third of a second.
    gc.collect()
    gc.freeze()
    while traffic.landed < longest and not (traffic.made and engine.idle):
        traffic.step()
    row: dict[str, object] = {"question": "gpu_traffic", "slots": args.slots, "lengths": [shortest, longest]}
    row |= {"drawn": drawn}
    row |= {"traffic": traffic.run(args.seconds), "planned_bytes": planned}
    row |= {"peak_bytes": torch.cuda.max_memory_allocated()}
    greedy = [each for each in traffic.made if each[0].sampler.sampling.plain]
    ended = [each for each in greedy if each[0].status is Status.FINISHED]
    news = [request.max_new_tokens for request, _ in traffic.made if request.joined is not None]
    prompts = [len(prompt) for request, prompt in traffic.made if request.joined is not None]
    live = round(float(str(row["traffic"]["live_rows"])))  # type: ignore[index]
    sampled = ended[:: max(1, len(ended) // args.checked)][-args.checked :]
    traffic.batch.close()
    del engine, traffic
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()
    row["checked"] = [check(model, request, prompt) for request, prompt in sampled]
    torch.cuda.empty_cache()
    row["fixed"] = fixed(model, live, round(statistics.mean(prompts)), round(statistics.mean(news)))
    rate, base = (float(str(row[name]["tokens_per_s"])) for name in ("traffic", "fixed"))  # type: ignore[index]
    row["share_of_fixed"] = round(rate / base, 4)
    origin = gpu_origin(args.commit) | {"layers": args.layers, "width": args.width, "vocabulary": VOCABULARY}
    Rows("gpu_traffic", args.out, origin).add(row)


if __name__ == "__main__":
    with torch.no_grad():
        main()
