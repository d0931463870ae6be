"""How many tokens per second do concurrent rows on one clock make, against one row alone?

Order-2 Hyena, D = 256, 4 layers, float32, greedy, random weights, on a CPU. 32 requests of 2,048 new tokens each, with
prompts of 1 to 94 tokens, in an engine of 32 slots; one of them alone there, in an engine of one slot, and by
`generate`. Before any time is printed, the tokens of several rows must be those of the full forward,
ties aside. The requests join as the engine reads their prompts; the time is that of the whole run, and of each step.
All take turns, three times, and the median of each is told with the least and the most: a shared host's speed moves.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from flash_inference import LanguageModel, generate
from flash_inference.engine.batch import Engine
from flash_inference.engine.request import Request
from flash_inference.testing import greedy_differences, random_model
from rows import RESULTS, spread, write

WIDTH, LAYERS, ROWS = 256, 4, 32


def prompt_of(n: int) -> list[int]:
    """The n-th request's prompt."""
    return torch.randint(256, (1 + 3 * n,), generator=torch.Generator().manual_seed(n)).tolist()


def run(model: LanguageModel, slots: int, rows: int, new_tokens: int) -> tuple[list[Request], float, np.ndarray]:
    """The requests, the seconds of the run, and the microseconds of each step."""
    engine = Engine(model, slots=slots, new_tokens=new_tokens, length=model.config.length)
    requests = [engine.submit(prompt_of(n), max_new_tokens=new_tokens) for n in range(rows)]
    steps, begun = [], time.perf_counter()
    while not engine.idle:
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
    return requests, time.perf_counter() - begun, np.array(steps) * 1e6


def check(model: LanguageModel, prompt: list[int], tokens: list[int]) -> None:
    """Ends the benchmark unless the tokens are those of the full forward, ties aside."""
    wrong, ties = greedy_differences(model, torch.tensor([prompt]), torch.tensor([tokens]))
    if wrong:
        sys.exit(f"{len(wrong)} tokens differ from the full forward, the first at {wrong[0]}; nothing timed.")
    if ties:
        print(f"ties {ties}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Runs the question and writes benchmarks/results/batch.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="256 new tokens; the rows are printed, not written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows")
    args = parser.parse_args(argv)
    new, turns = (256, 1) if args.quick else (2048, 3)
    model = random_model(2, vocab_size=256, width=WIDTH, layers=LAYERS, length=new + 128)
    kinds = [("engine", ROWS, ROWS), ("engine", 1, 1), ("generate", 1, 1), ("engine", ROWS, 1)]
    rates: dict[tuple[str, int, int], list[float]] = {kind: [] for kind in kinds}
    spreads: dict[tuple[str, int, int], list[np.ndarray]] = {kind: [] for kind in kinds}
    for turn in range(turns):
        for kind in kinds:
            name, slots, count = kind
            if name == "generate":
                start = time.perf_counter()
                generate(model, prompt_of(0), max_new_tokens=new)
                rates[kind].append(new / (time.perf_counter() - start))
                continue
            requests, seconds, steps = run(model, slots, count, new)
            for n in {0, count // 4, count - 1} if not turn else ():
                check(model, prompt_of(n), requests[n].tokens)
            rates[kind].append(sum(len(request.tokens) for request in requests) / seconds)
            spreads[kind].append(steps)
    rows: list[dict[str, object]] = []
    for (name, slots, count), found in rates.items():
        numbers = {"slots": slots, "rows": count, "new_tokens": new, "tokens_per_s": round(float(np.median(found)), 1)}
        numbers |= {"least": round(min(found), 1), "most": round(max(found), 1)}
        steps = spreads[name, slots, count]
        rows.append(
            {"question": "batch", "decoder": name, **numbers, **(spread(np.concatenate(steps)) if steps else {})}
        )
    full = float(str(rows[0]["tokens_per_s"]))
    for row in rows:
        row["full_batch_over_this"] = round(full / float(str(row["tokens_per_s"])), 2)
        print(
            f"  {row['decoder']:8s} {row['slots']:3d} slots {row['rows']:3d} rows {row['tokens_per_s']:9.1f} tokens/s, "
            f"worst step {row.get('worst_us', 0):9.1f} us, full batch {row['full_batch_over_this']}x",
            file=sys.stderr,
        )
    if args.quick:
        for each in rows:
            print(each)
    else:
        print(write("batch", rows, args.out))


if __name__ == "__main__":
    main()
