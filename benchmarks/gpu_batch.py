"""How many tokens a second does a batch on one GPU make, against one row?

Order-2 Hyena, D = 768, 4 D MLP, vocabulary 50,304, M = 18, float32 state, weights that bfloat16 holds exactly, greedy,
random weights, a prompt of its own for every row. Tokens are checked first: the float64 forward over what the first and
the last row generated must give the same tokens but for listed ties.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flash_inference.engine.graphs import GpuLoop
from flash_inference.models.gpu import GRAPH, GpuDecoder
from flash_inference.ops.decode_step.triton_batch import BatchShapes
from gpu_decode import VOCABULARY, WIDTH, against_float64, big_model, stats
from rows import provenance


def prompts(batch: int) -> Tensor:
    """[B, 1]: a token of its own for every row."""
    return torch.arange(7, 7 + batch)[:, None] * 11 % VOCABULARY


def step_time(decoder: GpuDecoder, batch: int, shapes: BatchShapes | None, graphs: int = 12) -> float:
    """Microseconds of a position without tiles: the median of graphs of 16."""
    loop = GpuLoop(decoder, prompts(batch), GRAPH * (graphs + 3), mixing=False)
    loop.step = decoder.step_of(batch, shapes)
    loop._embed(torch.arange(batch, device="cuda"))
    loop.prepare()
    for _ in range(graphs + 2):
        loop.launch()
    torch.cuda.synchronize()
    return stats(loop, 2 * GRAPH)["median_us"]


def whole(decoder: GpuDecoder, batch: int, new: int) -> tuple[GpuLoop, Tensor, float]:
    """A real run, tokens read by the host as they come: the loop, its tokens [B, N], seconds."""
    loop = GpuLoop(decoder, prompts(batch), new)
    loop.prepare()
    start = time.perf_counter()
    tokens = np.stack([tokens.copy() for tokens in loop], axis=1)
    return loop, torch.from_numpy(tokens), time.perf_counter() - start


def main() -> None:
    """Runs and writes one row a question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--parts", default="whole", help="whole, step")
    parser.add_argument("--latency", default="bounded", help="bounded or relaxed")
    parser.add_argument("--commit", default=str(provenance()["commit"]))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder; rows are appended")
    args = parser.parse_args()
    origin = {
        "commit": args.commit, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "layers": args.layers, "width": args.width, "length": args.length, "vocabulary": VOCABULARY,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)

    def write(row: dict[str, object]) -> None:
        with (args.out / "gpu_batch.jsonl").open("a") as file:
            file.write(json.dumps(row | origin) + "\n")
        print(json.dumps(row), flush=True)

    model = big_model(args.layers, args.width, args.length)
    alone = 0.0
    for batch in (int(n) for n in args.batches.split(",")):
        decoder = GpuDecoder(model, args.length, batch=batch, latency=args.latency)
        if "step" in args.parts:
            write({"name": "step without tiles", "batch": batch, "us": step_time(decoder, batch, None)})
        if "whole" in args.parts:
            loop, tokens, seconds = whole(decoder, batch, args.length)
            rate = batch * args.length / seconds
            alone = rate if batch == 1 else alone
            row = {"name": "batch", "batch": batch, "latency": args.latency, "seconds": seconds, "tokens_per_s": rate}
            row |= {"us_per_step": seconds / args.length * 1e6, "against_one_row": rate / alone if alone else None}
            row |= {"forced": loop.schedule.forced, "late": loop.late} | stats(loop, GRAPH)
            for b in {0, batch - 1}:
                answer = against_float64(model, loop, tokens[b], prompt=prompts(batch)[b], row=b)
                row |= {f"row_{b}": answer | {"distinct": len(set(tokens[b].tolist()))}}
            write(row | {"peak_bytes": torch.cuda.max_memory_allocated()})
            del loop
        del decoder
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
