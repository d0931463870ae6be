"""How near does a StripedHyena 2 come to streaming its weights, token by token, on one GPU?

The shapes of Evo 2 7B: D = 4096, 32 layers that repeat short, medium, long, attention, short, medium, long; gated MLPs
of 11,264; vocabulary 512; random bfloat16 weights, poles and residues in float32; batch 1, greedy. Positions run by the
model's own modules in captured graphs. The floor is the bytes of all weights that a token reads over the bandwidth that
this device reaches in the same run; caches and states come on top. Checked first: every token is the one that the plain
modules choose behind the same tokens, step by step, but for ties as `flash_inference.testing.ties` defines them, with
float32 standing in for float64. Token times come from the GPU's own clock.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flash_inference.engine.graphs import GpuLoop
from flash_inference.filters import Modal
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.gpu import GRAPH, GpuDecoder
from flash_inference.models.striped_hyena import StripedHyenaConfig
from flash_inference.testing import find_ties
from flash_inference.tiling import Blocked
from gpu_decode import stats
from rows import gpu_bandwidth, provenance

PERIOD = ("short", "medium", "long", "attention", "short", "medium", "long")
PUBLISHED_STEP_US = 44_000
"""A token of Evo 2 7B at batch 1 by its authors' own cached step on an H100, as they report it."""


def shapes(layers: int, length: int, width: int = 4096, inner: int = 11_264, heads: int = 32) -> StripedHyenaConfig:
    """Evo 2 7B, cut to its first layers."""
    pattern = tuple(PERIOD[layer % len(PERIOD)] for layer in range(layers))
    return StripedHyenaConfig(
        512, width, layers, length, pattern=pattern, activations=("gelu",) + ("none",) * (layers - 1), inner=inner,
        heads=heads, modes=16, short_groups=width // 16, medium_groups=width // 16, in_bias=False, feature_bias=False,
        qkv_bias=False, rotary_interpolation=128.0, tied=False, tokens="bytes-512",
    )  # fmt: skip


def striped(config: StripedHyenaConfig, device: str = "cuda") -> LanguageModel:
    """Random weights in bfloat16, all but what filters are made of."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LanguageModel(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.embedding.weight)
    torch.nn.init.normal_(model.head.weight, std=config.width**-0.5)
    kept = {id(p) for module in model.modules() if isinstance(module, Modal) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.bfloat16()
    return model


def weight_bytes(model: LanguageModel) -> int:
    """What a token reads of the weights: everything but the embedding, of which it reads a row."""
    return sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("embedding"))


@torch.no_grad()
def plain(model: LanguageModel, prompt: Tensor, tokens: Tensor) -> tuple[Tensor, list[float]]:
    """Logits [N, V] behind the prompt [P] and each of the tokens but the last by plain modules; microseconds a step."""
    decoder, device = model.decoder(len(prompt) + len(tokens)), model.embedding.weight.device
    state = decoder.init(1, Blocked(len(prompt) + len(tokens)))
    logits, times = [decoder.extend(state, prompt[None].to(device))], []
    for token in tokens[:-1].to(device):
        start = time.perf_counter()
        logits.append(decoder.extend(state, token[None, None]))
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return torch.cat(logits).float(), times


@torch.no_grad()
def wide(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits [L, V] of the full forward of the same numbers in float32, a block at a time."""
    x = model.embedding(tokens[None].to(model.embedding.weight.device)).float()
    for block in model.blocks:
        x = copy.deepcopy(block).float()(x)
    return copy.deepcopy(model.head).float()(copy.deepcopy(model.norm).float()(x))[0]


def check(model: LanguageModel, prompt: Tensor, tokens: Tensor) -> dict[str, object]:
    """Holds tokens [N] to the plain modules'; raises for a difference that no tie excuses."""
    logits, times = plain(model, prompt, tokens)
    exact = wide(model, torch.cat([prompt, tokens[:-1]]))[len(prompt) - 1 :]
    wrong = (logits.argmax(-1).cpu() != tokens).nonzero().flatten().tolist()
    ties = {tie.position for tie in find_ties(logits[None], exact[None])}
    if unexcused := [place for place in wrong if place not in ties]:
        raise SystemExit(f"tokens at {unexcused[:10]} are not those of the plain modules, and no ties.")
    return {
        "checked": len(tokens), "distinct": len(set(tokens.tolist())), "differences": len(wrong), "ties": len(ties),
        "rounding": float((logits - exact).abs().max()), "plain_us": float(np.median(times)) if times else None,
    }  # fmt: skip


def fitting(length: int) -> int:
    """As many layers as fit, up to the published 32: each is made in float32."""
    with torch.device("meta"):
        layer = sum(p.numel() for p in LanguageModel(shapes(7, length)).blocks.parameters()) / 7  # type: ignore[attr-defined]
    return max(1, min(32, int(0.8 * torch.cuda.mem_get_info()[0] / (4 * layer))))


def main() -> None:
    """Checks, then runs, and writes one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=0, help="0: as many of the 32 as fit")
    parser.add_argument("--length", type=int, default=4096, help="new tokens, and room in the caches")
    parser.add_argument("--checked", type=int, default=256, help="tokens held to the plain modules'")
    parser.add_argument("--commit", default=str(provenance()["commit"]))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder; rows are appended")
    args = parser.parse_args()
    layers = args.layers or fitting(args.length)
    model = striped(shapes(layers, args.length + GRAPH))
    torch.cuda.empty_cache()
    prompt, nbytes = torch.arange(4) * 11 + 65, weight_bytes(model)
    decoder = GpuDecoder(model, args.length)
    answer = check(model, prompt, torch.tensor(list(GpuLoop(decoder, prompt, args.checked))))
    torch.cuda.empty_cache()
    speeds = gpu_bandwidth()
    torch.cuda.empty_cache()
    new = args.length - len(prompt) + 1
    loop = GpuLoop(decoder, prompt, new)
    loop.prepare()
    start = time.perf_counter()
    made = len(list(loop))
    seconds = time.perf_counter() - start
    floor, steps = nbytes / max(speeds.values()) * 1e6, stats(loop, GRAPH)
    row: dict[str, object] = {"name": "striped", "layers": layers, "pattern": list(model.config.pattern), "batch": 1}
    row |= {"width": model.config.width, "tokens": made, "weight_bytes": nbytes, "floor_us": floor}
    row |= {"copy_bytes_per_s": speeds["copy"], "read_bytes_per_s": speeds["read"], "seconds": seconds}
    row |= {"us_per_token": seconds / made * 1e6, "share_of_floor": floor / steps["median_us"]} | steps | answer
    row |= {"published_step_us": PUBLISHED_STEP_US, "peak_bytes": torch.cuda.max_memory_allocated()}
    row |= {"commit": args.commit, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    row |= {"date": time.strftime("%Y-%m-%d")}
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "gpu_striped.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
