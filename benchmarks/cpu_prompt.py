"""How long until the first token after a prompt on a CPU, beside one full forward of the same length?

Order-2 Hyena, D = 256, 4 layers, batch 1, float32. Filters are prepared beforehand for ours and evaluated inside the
full forward, as in both everyday uses; ours is checked against the full forward's last logits first.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from flash_inference.engine.decode import decode
from flash_inference.models.decoder import Decoder
from flash_inference.testing import greedy_differences, random_model
from rows import RESULTS, write

NEW = 256


def main(argv: list[str] | None = None) -> None:
    """Runs the question and writes benchmarks/results/cpu_prompt.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short prompt; the rows are printed, not written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows")
    args = parser.parse_args(argv)
    prompts = [256] if args.quick else args.prompts
    torch.manual_seed(0)
    model = random_model(2, vocab_size=256, width=256, layers=4, length=max(prompts) + NEW)
    rows: list[dict[str, object]] = []
    for length in prompts:
        decoder = Decoder(model, length + NEW)
        prompt = torch.randint(0, 256, (1, length))
        first, second, full = [], [], []
        for _ in range(args.repeats):
            start = time.perf_counter()
            with torch.no_grad():
                model(prompt)
            full.append(time.perf_counter() - start)
            start = time.perf_counter()
            run = decode(decoder, prompt, lambda logits: logits.argmax(-1), max_new_tokens=NEW)
            tokens = [next(run)]
            first.append(time.perf_counter() - start)
            tokens.append(next(run))
            second.append(time.perf_counter() - start - first[-1])
            tokens += list(run)
        wrong, _ = greedy_differences(model, prompt, torch.stack(tokens, dim=1))
        if wrong:
            sys.exit(f"prompt {length}: tokens differ from the full forward at {wrong[0]}; nothing is reported.")
        ours, forward = float(np.median(first)), float(np.median(full))
        rows.append(
            {
                "question": "cpu_prompt",
                "prompt": length,
                "first_token_s": round(ours, 4),
                "first_token_worst_s": round(max(first), 4),
                "second_token_s": round(float(np.median(second)), 4),
                "full_forward_s": round(forward, 4),
                "ratio": round(ours / forward, 3),
                "prefill_tokens_per_s": round(length / ours),
                "repeats": args.repeats,
            }
        )
        print(rows[-1], file=sys.stderr)
    if not args.quick:
        print(write("cpu_prompt", rows, args.out))


if __name__ == "__main__":
    main()
