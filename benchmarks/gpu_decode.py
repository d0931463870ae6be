"""What does a token cost on one GPU, how steady is it, and how far is it from streaming the weights?

Order-2 Hyena, D = 768, 4 D MLP, vocabulary 50,304, float32 mixer state, weights that bfloat16 holds exactly, batch 1,
greedy, random weights. The tokens are checked first: a float64 forward over all that was generated must give the same
tokens but for listed ties, and the mixers' inputs must agree. Step times come from the GPU's own clock. "Mixing" is the
run minus the same run without tiles, in segments that take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flash_inference as fi
from flash_inference.engine.graphs import GpuLoop
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.gpu import GRAPH, GpuDecoder
from flash_inference.ops.causal_conv import good_size
from rows import gpu_bandwidth, provenance

VOCABULARY, WIDTH = 50_304, 768
PROMPT = torch.tensor([7])


def big_model(
    layers: int, width: int, length: int, vocabulary: int = VOCABULARY, device: str = "cuda"
) -> LanguageModel:
    """Random weights that bfloat16 holds, with biases and an untied head that make greedy tokens vary."""
    torch.manual_seed(0)
    config = fi.HyenaConfig(vocab_size=vocabulary, width=width, layers=layers, length=length, tied=False)
    with torch.device("cuda"):
        model = LanguageModel(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.embedding.weight)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.normal_(std=0.2)
        if p.ndim == 2 and "filter" not in name:
            p.copy_(p.bfloat16())
    return model


@torch.no_grad()
def against_float64(
    model: LanguageModel, loop: GpuLoop, tokens: Tensor, piece: int = 8192, prompt: Tensor = PROMPT, row: int = 0
) -> dict[str, object]:
    """The float64 forward over prompt and tokens: the worst layer's error of the mixers' inputs, and the tokens."""
    run, D = loop.run, model.config.width
    history = run.history.unflatten(1, (-1, run.batch))[..., row]
    ids = torch.cat([prompt.to(tokens), tokens[:-1]]).to(run.history.device)
    L = len(ids)
    x = model.embedding.weight.double()[ids]
    lane, worst, P = 0, 0.0, len(prompt)
    for block in model.blocks:
        mixer = block.mixer
        short = mixer.short.weight.double()[:, 0]
        out = torch.empty_like(x)
        u = torch.empty(L, mixer.in_proj.out_features, dtype=torch.float64, device=x.device)
        norm = lambda m, v: torch.layer_norm(v, (D,), m.weight.double(), m.bias.double(), m.eps)  # noqa: E731
        linear = lambda m, v: v @ m.weight.double().T + m.bias.double()  # noqa: E731
        for i in range(0, L, piece):
            u[i : i + piece] = linear(mixer.in_proj, norm(block.norm1, x[i : i + piece]))
        n, width = good_size(2 * L), 64
        for c in range(0, D, width):
            part = []
            for g in range(3):
                cut = u[:, g * D + c : g * D + c + width]
                s = mixer.short.bias.double()[g * D + c : g * D + c + width] + torch.zeros_like(cut)
                for k in range(short.shape[1]):
                    s[k:] += short[g * D + c : g * D + c + width, short.shape[1] - 1 - k] * cut[: L - k]
                part.append(s)
            y = part[1] * part[2]
            rho = double_taps(mixer.filter, L, slice(c, c + width))
            z = torch.fft.irfft(torch.fft.rfft(y.T.contiguous(), n=n) * torch.fft.rfft(rho, n=n), n=n)[:, :L].T
            out[:, c : c + width] = part[0] * (z + mixer.skip.double()[c : c + width] * y)
            got = history[run.lead - P : run.lead - P + L, lane + c : lane + c + width].double()
            worst = max(worst, float((got - y).norm() / y.norm()))
        for i in range(0, L, piece):
            h = x[i : i + piece] + linear(mixer.out_proj, out[i : i + piece])
            inner = torch.nn.functional.gelu(linear(block.mlp.fc1, norm(block.norm2, h)), approximate="tanh")
            x[i : i + piece] = h + linear(block.mlp.fc2, inner)
        lane += D
    different: list[dict[str, float]] = []
    head = model.head.weight.double()
    for i in range(P - 1, L, piece):
        logits = torch.layer_norm(x[i : i + piece], (D,), model.norm.weight.double(), model.norm.bias.double()) @ head.T
        chosen = tokens[i - P + 1 : i - P + 1 + piece].to(logits.device)
        wrong = (logits.argmax(-1) != chosen).nonzero().flatten()
        for j in wrong.tolist():
            gap = float(logits[j].max() - logits[j, chosen[j]])
            different.append({"position": i + j, "gap": gap, "scale": float(logits[j].std())})
    return {"worst_layer_relative_error": worst, "different": different[:20], "differences": len(different)}


@torch.no_grad()
def at_samples(model: LanguageModel, decoder: GpuDecoder, loop: GpuLoop, tokens: Tensor, places: list[int]) -> float:
    """For runs too long for a float64 forward: the worst layer's relative error of the mixers' inputs at some places.

    A window that ends at each place is recomputed in float64 from the tokens and the inputs of all earlier positions,
    every mixer by a direct sum; it loses taps - 1 positions a layer, and the last one is compared.
    """
    run, D, P, layers = loop.run, model.config.width, len(PROMPT), model.config.layers
    ids, worst = torch.cat([PROMPT.to(tokens), tokens[:-1]]).to(run.history.device), 0.0
    rows = run.history[run.lead - P :]
    norm = lambda m, v: torch.layer_norm(v, (D,), m.weight.double(), m.bias.double(), m.eps)  # noqa: E731
    linear = lambda m, v: v @ m.weight.double().T + m.bias.double()  # noqa: E731
    for place in places:
        window = range(place - 2 * layers - 2, place + 1)
        x = model.embedding.weight.double()[ids[window.start : window.stop]]
        for number, block in enumerate(model.blocks):
            mixer = block.mixer
            u = linear(mixer.in_proj, norm(block.norm1, x))
            taps = mixer.short.weight.double()[:, 0]
            K = taps.shape[1]
            s = mixer.short.bias.double() + sum(taps[:, K - 1 - k] * u[K - 1 - k : len(u) - k] for k in range(K))
            gate, other, v = s.split(D, dim=1)
            y = other * v
            window = range(window.start + K - 1, window.stop)
            x = x[K - 1 :]
            z = torch.empty_like(y)
            for c in range(0, D, 64):
                some = slice(c, min(c + 64, D))
                lane = range(number * D + some.start, number * D + some.stop)
                past = rows[: window.stop, lane.start : lane.stop].double()
                worst = max(worst, float((past[-1] - y[-1, some]).norm() / y[-1, some].norm()))
                rho = decoder.padded(0, window.stop, lane).double().flip(1).T
                for i, j in enumerate(window):
                    z[i, some] = (past[: j + 1] * rho[window.stop - 1 - j :]).sum(0)
                del past, rho
            x = x + linear(mixer.out_proj, gate * (z + mixer.skip.double() * y))
            inner = torch.nn.functional.gelu(linear(block.mlp.fc1, norm(block.norm2, x)), approximate="tanh")
            x = x + linear(block.mlp.fc2, inner)
    return worst


def double_taps(filter, n: int, channels: slice) -> Tensor:
    """The taps in float32 as they are used, as float64."""
    return filter.taps(n)[channels].double()


def stats(loop: GpuLoop, skip: int) -> dict[str, float]:
    """Microseconds between tokens on the GPU's clock, the first `skip` steps left out."""
    stamps = loop.run.stamps[loop.run.lead :].cpu().numpy()
    stamps = stamps[stamps > 0]
    steps = np.diff(stamps)[skip:] / 1e3
    q = np.quantile(steps, [0.5, 0.99, 0.999, 1])
    return {
        "mean_us": float(steps.mean()), "median_us": float(q[0]), "p99_us": float(q[1]), "p999_us": float(q[2]),
        "worst_us": float(q[3]), "worst_over_median": float(q[3] / q[0]), "worst_at": int(steps.argmax()) + skip,
        "next_worst_us": [round(float(us), 1) for us in np.sort(steps)[-5:-1]],
        "next_worst_at": (np.argsort(steps)[-5:-1] + skip).tolist(),
        "steps": len(steps), "clock_ns": int(np.diff(np.unique(stamps))[:2000].min()),
    }  # fmt: skip


def whole(decoder: GpuDecoder, new: int) -> tuple[GpuLoop, Tensor, float]:
    """A real run, tokens read by the host as they come: the loop, its tokens, seconds."""
    loop = GpuLoop(decoder, PROMPT, new)
    loop.prepare()
    asked = torch.cuda.memory_stats()["num_device_alloc"]
    start = time.perf_counter()
    tokens = torch.tensor(list(loop))
    seconds = time.perf_counter() - start
    if (more := torch.cuda.memory_stats()["num_device_alloc"] - asked) > 0:
        print(f"the driver was asked for memory {more} times during the run", file=sys.stderr)
    return loop, tokens, seconds


def mixing(decoder: GpuDecoder, new: int, segments: int) -> dict[str, object]:
    """Two runs that leave their tiles out in every other segment: microseconds a token between the two of each pair.

    With and without tiles in one run and one memory, because two runs that differ in nothing but where their tensors
    stand differ by 1 or 2 us a token. The second run mixes where the first does not: every side is counted as often as
    a run has it, however its turns fall, and each of a pair comes first once. The first graphs of a segment are not
    timed: chunks of the last one may still run.
    """
    times = np.zeros((2, 2 * segments))
    for swapped in (False, True):
        loop = GpuLoop(decoder, PROMPT, new)
        loop.prepare()
        graphs, untimed = loop.count // (2 * segments), 16
        assert graphs > untimed, f"{segments} pairs of segments leave {graphs} graphs each; ask for fewer"
        for segment in range(2 * segments):
            loop.mixing = (segment % 2 == 0) != swapped
            for n in range(graphs):
                if n == untimed:
                    torch.cuda.synchronize()
                    start = loop.main.record_event(torch.cuda.Event(enable_timing=True))
                loop.launch()
                loop.pace()
            end = loop.main.record_event(torch.cuda.Event(enable_timing=True))
            torch.cuda.synchronize()
            times[int(loop.mixing), segment] = start.elapsed_time(end) * 1e3 / ((graphs - untimed) * GRAPH)
        loop.close()
        del loop
    # A run's difference between a pair's neighbours has either sign of what their places do; both runs' mean has none.
    difference = (times[1] - times[0]).reshape(segments, 2).mean(1)
    half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    return {
        "with_us": float(times[1].mean()), "without_us": float(times[0].mean()),
        "mixing_us": float(difference.mean()), "runs": 2,
        "interval_us": [float(difference.mean() - half), float(difference.mean() + half)],
        "pairs_us": [round(float(d), 2) for d in difference],
    }  # fmt: skip


def main() -> None:
    """Runs and writes one row a question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--segments", type=int, default=15, help="pairs of them")
    parser.add_argument("--parts", default="whole,relaxed,mixing,baselines")
    parser.add_argument("--card", type=float, help="GiB to take at most, as if the GPU had no more")
    parser.add_argument("--commit", default=str(provenance()["commit"]))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder; rows are appended")
    parser.add_argument("--quick", action="store_true", help="4 layers of width 256, 16,384 positions")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.width, args.length, args.segments = 4, 256, 16_384, 5
    parts = args.parts.split(",")
    origin = {
        "commit": args.commit, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "layers": args.layers, "width": args.width, "length": args.length, "vocabulary": args.vocabulary,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)

    def write(row: dict[str, object]) -> None:
        with (args.out / "gpu_decode.jsonl").open("a") as file:
            file.write(json.dumps(row | origin) + "\n")
        print(json.dumps(row), flush=True)

    model = big_model(args.layers, args.width, args.length, args.vocabulary)
    matrices = sum(p.numel() * 2 for n, p in model.named_parameters() if p.ndim == 2 and "filter" not in n)
    speed = gpu_bandwidth()["copy"]
    torch.cuda.empty_cache()
    floor = (matrices - model.embedding.weight.numel() * 2) / speed * 1e6
    new = args.length
    free = None
    if args.card:
        most = int(args.card * 2**30)
        torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
        free = most - torch.cuda.memory_allocated()
    if "whole" in parts:
        torch.cuda.reset_peak_memory_stats()
        decoder = GpuDecoder(model, args.length, free=free)
        loop, tokens, seconds = whole(decoder, new)
        plan, peak = decoder.plan, torch.cuda.max_memory_allocated()
        memory = {"planned_bytes": plan.own + plan.total - plan.graphs, "peak_bytes": peak, "card_gib": args.card}
        times = stats(loop, GRAPH)
        if "samples" in parts:
            places = [new - 2, new // 2 + 77, new // 8 + 5]
            answer = {
                "worst_layer_relative_error_at": places,
                "worst_layer_relative_error": at_samples(model, decoder, loop, tokens, places),
            }
        else:
            answer = against_float64(model, loop, tokens)
        row = {
            "name": "bounded",
            "seconds": seconds,
            "us_per_token": seconds / new * 1e6,
            "forced": loop.schedule.forced,
        }
        row |= {
            "late": loop.late,
            "distinct": len(set(tokens.tolist())),
            "weight_floor_us": floor,
            "copy_bytes_per_s": speed,
        }
        write(row | times | answer | memory)
        del loop
        if "mixing" in parts:
            torch.cuda.empty_cache()
            write({"name": "mixing"} | mixing(decoder, new, args.segments))
        del decoder
        torch.cuda.empty_cache()
    if "relaxed" in parts:
        decoder = GpuDecoder(model, args.length, latency="relaxed")
        loop, again, seconds = whole(decoder, new)
        row = {"name": "relaxed", "seconds": seconds, "us_per_token": seconds / new * 1e6} | stats(loop, GRAPH)
        if "whole" in parts:
            row["same_tokens"] = int((again == tokens).sum())
        write(row)
        del loop, decoder
    del model
    torch.cuda.empty_cache()
    if "baselines" in parts:
        from gpu_baselines import measure

        for row in measure(layers=args.layers, width=args.width, length=args.length):
            write(row)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
