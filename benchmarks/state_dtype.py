"""What does a history of 16 bits cost in accuracy, and what does it save?

Logits of every step of a decode, its tokens given (drawn by the model itself), against the float64 full forward: the
norm of the difference over that of the logits about their mean, and how often both choose the same token. float32 is
the baseline. The shipped models, and a random one whose logits depend more on the past.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor

import flash_inference as fi
from flash_inference.engine.decode import decode, decoder_for, default_tiling
from flash_inference.models.decoder import Decoder
from flash_inference.testing import random_model
from rows import RESULTS, Rows, gpu_origin, provenance

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
START = torch.tensor([[1]])


def models(tokens: int) -> dict[str, fi.LanguageModel]:
    """By name: what ships, and 4 layers of width 256 with random weights."""
    random = random_model(2, layers=4, width=256, vocab_size=1000, length=tokens + 1, tied=False, seed=0)
    return {"shakespeare": fi.load("shakespeare"), "tuberculosis": fi.load("tuberculosis"), "random 4 x 256": random}


def logits_of(model: fi.LanguageModel, given: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [N, V] of a decode to which tokens are given, one by one."""
    found: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        found.append(logits[0].double().cpu())
        return given[len(found) - 1][None]

    decoder = decoder_for(model, len(given) + 1, dtype=dtype)
    for _ in decode(decoder, START, choose, max_new_tokens=len(given), dtype=dtype):
        pass
    return torch.stack(found)


def state_bytes(model: fi.LanguageModel, tokens: int, dtype: torch.dtype) -> int:
    """What a row's state takes on a CPU."""
    return Decoder(model, tokens).init(1, default_tiling(tokens - 1, 1), dtype=dtype).nbytes


def main() -> None:
    """Runs and writes one row a model and type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--quick", action="store_true", help="200 tokens")
    args = parser.parse_args()
    tokens = 200 if args.quick else args.tokens
    rows = Rows("state_dtype", args.out, gpu_origin() if args.device == "cuda" else provenance())
    for name, model in models(tokens).items():
        given = fi.generate(model, START, max_new_tokens=tokens, temperature=1.0, seed=0, stop_tokens=())[0]
        exact = copy.deepcopy(model).double()(torch.cat([START[0], given[:-1]])[None])[0]
        scale = (exact - exact.mean(-1, keepdim=True)).norm(dim=-1)
        for dtype in DTYPES:
            found = logits_of(model.to(args.device), given, dtype)
            error = (found - exact).norm(dim=-1) / scale
            row: dict[str, object] = {"model": name, "state_dtype": str(dtype), "tokens": tokens, "on": args.device}
            row |= {"mean_relative_error": float(error.mean()), "worst_relative_error": float(error.max())}
            row |= {"last_quarter_error": float(error[-tokens // 4 :].mean())}
            row |= {"other_tokens": int((found.argmax(-1) != exact.argmax(-1)).sum())}
            rows.add(row | {"state_bytes": state_bytes(model.cpu(), tokens + 1, dtype)})


if __name__ == "__main__":
    with torch.no_grad():
        main()
