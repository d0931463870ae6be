"""How many tokens per second does prompt lookup save on repetitive text, and what does it cost on random text?

The shipped model "shakespeare" at batch 1 against plain decoding of the same prompts. Repetitive: eleven characters
over and over, behind which the model's greedy text soon runs in circles of its own, one after another. Dialogue: two
speeches over and over, behind which it repeats two lines of its own. Random: letters drawn at random, and tokens drawn
at temperature 1.5, so that the text hardly ever follows an earlier place. Tokens are compared before a time is kept.
The two take turns of TURN tokens, long enough for each to find the cache as it left it; times count from the first
token on, and a speedup is the median of the runs' ratios. The ratio of CPU times is given beside, since it does not
count the load of others.

Rows of case "price" tell what a draft costs, in plain steps of the same seconds: k proposed tokens are read behind
the newest one, then one of the k + 1 is accepted or all are, at the start of a base block; the steps are those that
follow in the block, with the tiles that they pay. `base` and `each` are the line through the medians of drafts that
fail, which is `engine.speculative.FUSED`.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flash_inference import LanguageModel, PromptLookup, load, stream
from flash_inference.tiling import Blocked
from rows import RESULTS, write

TURN = 64
REPETITIVE = "abcdefghij " * 40
DIALOGUE = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 6


def raced(run: dict[str, Any]) -> tuple[bool, np.ndarray]:
    """Whether plain and drafted tokens are equal, and [2, 2]: their seconds, and those of the processor, without the
    first token. They take turns, so that a noisy moment meets both.
    """
    streams = [stream(**run), stream(**run, draft=PromptLookup())]
    made: list[list[torch.Tensor]] = [[next(steps)] for steps in streams]
    spent = np.zeros((2, 2))
    left = run["max_new_tokens"] - 1
    for n, first in enumerate(range(0, left, TURN)):
        for which in ((0, 1), (1, 0))[n % 2]:
            wall, cpu = time.perf_counter(), time.process_time()
            made[which] += islice(streams[which], min(TURN, left - first))
            spent[which] += time.perf_counter() - wall, time.process_time() - cpu
    return torch.equal(torch.stack(made[0], 1), torch.stack(made[1], 1)), spent


def price(model: LanguageModel, rounds: int) -> list[dict[str, object]]:
    """What drafts of several lengths cost, in plain steps."""
    decoder, block = model.decoder(1 << 16), 32
    state = decoder.init(1, Blocked(1 << 16, block=block))
    tokens = torch.randint(32, 127, (1, block), generator=torch.Generator().manual_seed(1))
    decoder.extend(state, tokens.repeat(1, 16))
    kinds = [(k, accepted) for k in (7, 15, 23, 31) for accepted in (1, k + 1)]
    costs: dict[tuple[int, int], list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for k, accepted in kinds:
            for tile in decoder.due(state):
                decoder.pay(state, tile)
            start = time.perf_counter()
            draft = decoder.draft(state)
            draft.extend(tokens[:, : k + 1])
            draft.commit(accepted)
            seconds, steps = time.perf_counter() - start, list[float]()
            while len(steps) < block // 2 or state.clock % block:
                start = time.perf_counter()
                for tile in decoder.due(state):
                    decoder.pay(state, tile)
                decoder.extend(state, tokens[:, :1])
                steps.append(time.perf_counter() - start)
            costs[k, accepted].append(seconds / float(np.median(steps)))
    rows: list[dict[str, object]] = []
    for (k, accepted), values in costs.items():
        low, middle, high = (round(float(q), 2) for q in np.quantile(values, [0.25, 0.5, 0.75]))
        row = {"question": "speculative", "case": "price", "proposed": k, "accepted": accepted, "steps": middle}
        rows.append(row | {"steps_quartiles": [low, high], "repeats": rounds})
    failed = [(k, float(np.median(costs[k, 1]))) for k in (7, 15, 23, 31)]
    each, base = np.polyfit(*zip(*failed, strict=True), 1)
    line = {"base": round(float(base), 2), "each": round(float(each), 3)}
    return [*rows, {"question": "speculative", "case": "price", **line}]


def main(argv: list[str] | None = None) -> None:
    """Runs the question and writes benchmarks/results/speculative.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few tokens, once; the rows are printed, not written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows")
    args = parser.parse_args(argv)
    new, repeats = (128, 1) if args.quick else (args.tokens, args.repeats)
    model = load("shakespeare")
    letters = torch.randint(32, 127, (1, 512), generator=torch.Generator().manual_seed(0))
    cases: dict[str, dict[str, Any]] = {
        "repetitive": {"prompt": REPETITIVE},
        "dialogue": {"prompt": DIALOGUE},
        "random": {"prompt": letters, "temperature": 1.5, "seed": 0},
    }
    rows: list[dict[str, object]] = []
    for case, settings in cases.items():
        run = {"model": model, "max_new_tokens": new, **settings}
        times: list[np.ndarray] = []
        for repeat in range(repeats + 1):
            same, spent = raced(run)
            if not same:
                sys.exit(f"{case}: tokens differ from plain decoding; nothing is reported.")
            if repeat or args.quick:
                times.append(spent)
        before, after = np.array(times).transpose(1, 0, 2)
        ratios = before / after
        wall = np.quantile(ratios[:, 0], [0, 0.5, 1])
        rows.append(
            {
                "question": "speculative",
                "case": case,
                "tokens": new,
                "plain_tokens_per_s": round(new / float(np.median(before[:, 0]))),
                "drafted_tokens_per_s": round(new / float(np.median(after[:, 0]))),
                "speedup": round(float(wall[1]), 3),
                "speedup_least": round(float(wall[0]), 3),
                "speedup_most": round(float(wall[2]), 3),
                "cpu_time_ratio": round(float(np.median(ratios[:, 1])), 3),
                "repeats": repeats,
            }
        )
        print(rows[-1], file=sys.stderr)
    rows += price(model, 2 if args.quick else 20)
    for row in rows[len(cases) :]:
        print(row, file=sys.stderr)
    if not args.quick:
        print(write("speculative", rows, args.out))


if __name__ == "__main__":
    main()
