"""`flash-inference demo`: the library in a minute."""

from __future__ import annotations

import json as jsonlib
import statistics
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flash_inference.cli.console import CommandError, note, write, write_json
from flash_inference.cli.options import Json

if TYPE_CHECKING:
    from torch import Tensor

    from flash_inference.models.backbone import LanguageModel

ROWS = "cpu_length.jsonl"
LONG = 65_536
DECODERS = ("flash", "lazy", "eager", "epoched", "full")
CHECKED = 300
TEMPERATURE, SEED = 0.8, 0


def demo(
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens to write.")] = 2000,
    model: Annotated[str, typer.Option(help="A shipped model, or the folder of a saved one.")] = "shakespeare",
    json: Json = False,
) -> None:
    """Write some Shakespeare, check that it is exact, and tell how fast it was.

    The text appears as it is made, always the same for the same number of tokens. Then: a greedy run compared with full
    recomputation, the rate of both, and what the committed measurements say of long sequences.

    \b
    Example:
      flash-inference demo
    """
    from flash_inference.engine.decode import best_device
    from flash_inference.engine.verify import verify
    from flash_inference.models.weights import load

    device, reason = best_device()
    if reason is not None:
        note(reason)
    language_model = load(model, device=device)
    room = language_model.config.length
    prompt = "\n" if language_model.tokens.name == "bytes" else "ACGT"
    start = len(language_model.tokens.encode(prompt)) + 1
    if start + tokens > room:
        raise CommandError(
            f"{tokens} tokens are too many; {model} runs {room} positions. Ask for --tokens {max(room - start, 0)}."
        )
    text, made, rate = _write(language_model, prompt, tokens, show=not json)
    if not json:
        write("\n\n")
        note("checking ...")
    checked = min(CHECKED, tokens)
    report = verify(language_model, prompt, tokens=checked)
    full = {length: _full(language_model, made[:length]) for length in sorted({max(tokens // 4, 2), tokens})}
    known = committed(LONG)
    if json:
        write_json(
            {
                "model": model, "text": text, "tokens_per_second": rate,
                "full_recompute_tokens_per_second": full, "checked": checked, "equal": report.equal,
                "largest_logits_difference": report.difference, "ties": len(report.ties), "at_65536": known,
            }
        )  # fmt: skip
    else:
        equal = "equal to" if report.equal else "DIFFERENT from"
        write(f"exactness        {checked} greedy tokens {equal} full recomputation; ")
        write(f"largest logits difference {report.difference:.2g}\n")
        write(f"cached decoding  {rate:,.0f} tokens/s over these {tokens:,} tokens\n")
        for length, per_second in full.items():
            write(f"full recompute   {per_second:,.1f} tokens/s at a prefix of {length:,} (a whole forward each)\n")
        write("".join(f"{line}\n" for line in _long(known)))
    if not report.equal:
        raise typer.Exit(1)


def _write(model: LanguageModel, prompt: str, tokens: int, show: bool) -> tuple[str, Tensor, float]:
    """Generates; returns the text, all tokens with the prompt's, and tokens a second after the first."""
    import torch

    from flash_inference.engine.generate import Step, stream_steps
    from flash_inference.engine.prompts import as_rows

    row = as_rows(model, prompt)[0]
    steps = cast(
        "Generator[Step]",
        stream_steps(
            model, row, max_new_tokens=tokens, temperature=TEMPERATURE, seed=SEED, allowed=model.tokens.letters,
            stop_tokens=(),
        ),
    )  # fmt: skip
    decoder, pieces, made = model.tokens.decoder(), [], row.tolist()
    first = 0.0
    with closing(steps):
        for step in steps:
            first = first or time.perf_counter()
            made.append(int(step.tokens[0]))
            pieces.append(decoder.push(made[-1]))
            if show:
                write(pieces[-1])
    elapsed = time.perf_counter() - first
    return "".join(pieces) + decoder.finish(), torch.tensor(made), (tokens - 1) / elapsed


def _full(model: LanguageModel, tokens: Tensor) -> float:
    """Tokens a second if each is a whole forward over `tokens`: the median of three, after one to warm up."""
    import torch

    times: list[float] = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            float(model(tokens[None].to(model.embedding.weight.device))[0, -1, 0])
            times.append(time.perf_counter() - start)
    return 1 / statistics.median(times[1:])


def committed(length: int) -> dict[str, Any] | None:
    """The newest committed microseconds per token of each decoder at `length`, or None where there is no file."""
    for place in (Path.cwd(), Path(__file__).parents[3]):
        path = place / "benchmarks" / "results" / ROWS
        if path.is_file():
            break
    else:
        return None
    found: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = jsonlib.loads(line)
            if row["length"] == length and row["decoder"] in DECODERS:
                found[str(row["decoder"])] = float(row["us_per_token"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _long(known: dict[str, Any] | None) -> list[str]:
    label = f"at {LONG:,} tokens "
    if known is None:
        return [f"{label} no committed measurement is here (benchmarks/results/{ROWS} of a source checkout)"]
    if not {"flash", "lazy"} <= known.keys():
        return [f"{label} benchmarks/results/{ROWS} has no rows of both flash and lazy at this length"]
    lines = [f"{label} measured before, on another run (benchmarks/results/{ROWS}):"]
    for decoder in sorted(known, key=lambda name: known[name]):
        lines.append(
            f"  {decoder:<14} {known[decoder]:,.0f} us per token, {known[decoder] / known['flash']:.1f} x flash"
        )
    return lines
