"""How much faster does HyenaDNA generate 32,000 bases here than by a cached dot product over its past?

The shape of HyenaDNA small-32k (4 layers, D = 256), random weights written as a published folder and loaded from it;
batch 1, float32, greedy. The tokens have to be the full forward's. The lazy decoder is the strong one of `cpu_length`:
whole steps timed at many positions with a full cache, integrated over the span, in turns with ours. Full recompute
is one forward a token, sampled too. A fresh process that only generates tells the peak of memory beside its plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from safetensors.torch import save_file

import flash_inference as fi
from cpu_length import LazyStack, Run, Sampled, check, full_recompute, integrate, with_stack
from flash_inference.engine.plan import plan
from flash_inference.models.decoder import Decoder
from flash_inference.models.published import to_published
from flash_inference.testing import random_model
from rows import RESULTS, spread, write

TOKENS = 32_000


def publish(folder: Path, tokens: int) -> None:
    """A random model under the names and settings of a HyenaDNA folder."""
    settings = fi.FilterConfig(width=64, frequency=10.0, shift=0.05, positions="stored")
    model = random_model(
        2, vocab_size=16, width=256, layers=4, inner=1024, length=tokens + 2, tied=False, tokens="dna", filter=settings,
        start_token=0, pad_token=4,
    )  # fmt: skip
    config = {
        "d_model": 256, "n_layer": 4, "d_inner": 1024, "vocab_size": 12, "max_seq_len": tokens + 2, "emb_dim": 5,
        "filter_order": 64, "hyena_order": 2, "short_filter_order": 3, "num_inner_mlps": 2, "activation_freq": 10,
        "train_freq": True, "use_bias": True, "embed_dropout": 0.0, "hyena_dropout": 0.0, "hyena_filter_dropout": 0.0,
        "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "pad_vocab_size_multiple": 8, "model_type": "hyenadna",
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone().contiguous() for name, tensor in to_published(model, "hyenadna-hf").items()}
    save_file(tensors, folder / "model.safetensors")


def memory(folder: Path, tokens: int) -> dict[str, float]:
    """Bytes by which a fresh process grows while it generates, and what its plan says."""
    arguments = [sys.executable, __file__, "--tokens", str(tokens), "--memory-of", str(folder)]
    return json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def grow(folder: Path, tokens: int) -> None:
    """Prints the peak growth of this process over a generation, after a small one has loaded all code."""

    def kib(key: str) -> int:
        return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

    small = random_model(2, vocab_size=16, width=8, layers=1, length=2048)
    for _ in islice(fi.stream(small, [[1] * 900], max_new_tokens=1100), 1100):
        pass
    model = fi.load(folder)
    planned = plan(model, prompt=1, max_new_tokens=tokens)
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    for _ in fi.stream(model, [[7]], max_new_tokens=tokens, stop_tokens=()):
        pass
    grown = 1024 * (kib("VmHWM") - before)
    print(json.dumps({"peak_bytes": grown, "planned_bytes": planned.total, "peak_over_plan": grown / planned.total}))


def main(argv: list[str] | None = None) -> None:
    """Runs the question and writes benchmarks/results/hyenadna.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--quick", action="store_true", help="2,000 tokens; the rows are printed, not written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the rows")
    parser.add_argument("--memory-of", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory_of is not None:
        grow(args.memory_of, args.tokens)
        return
    length = 2_000 if args.quick else args.tokens
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        publish(folder, length)
        used = memory(folder, length)
        model = fi.load(folder)
    run, lazy = Run(Decoder(model, length), length), Sampled(with_stack(model, length, LazyStack), length)
    turn, started = length // 100, time.perf_counter()
    for first in range(0, length, turn):
        run.advance(turn)
        lazy.sample(min(first + turn // 2, length - 1))
        left = (time.perf_counter() - started) * (length - first - turn) / (first + turn)
        print(f"\r  {first + turn:,} / {length:,} tokens, {left:,.0f} s left ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    check(model, "ours", run.tokens)
    ours = spread(run.microseconds)
    direct = integrate(lazy.positions, lazy.microseconds, length)
    places = [n for n in (64, 512, 2_048, 8_192, 16_384, 32_000) if n <= length]
    recompute = integrate(places, [full_recompute(model, n) for n in places], length)
    base = {"question": "hyenadna", "tokens": length}
    rows: list[dict[str, object]] = [
        base | {"decoder": name, "us_per_token": round(mean, 1), "against_ours": round(mean / ours["us_per_token"], 2)}
        for name, mean in (("lazy", direct), ("full", recompute))
    ]
    rows.insert(0, base | {"decoder": "flash", **ours, **used})
    for row in rows:
        print(row)
    if not args.quick:
        print(write("hyenadna", rows, args.out))


if __name__ == "__main__":
    main()
