"""`flash-inference verify`: cached decoding against full recomputation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from flash_inference.cli.console import CommandError, Meter, write, write_json
from flash_inference.cli.options import Json, Model, Tokens
from flash_inference.cli.records import gather

if TYPE_CHECKING:
    from flash_inference.engine.verify import Choice, Report
    from flash_inference.models.tokens import Table

DTYPES = ("float32", "float64", "bfloat16", "float16")
FEW = 8
"""A run with fewer distinct tokens repeats itself and proves little."""


def verify(
    model: Model,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to begin from. Default: none.")] = None,
    prompt_file: Annotated[str | None, typer.Option(metavar="FILE", help="A file whose text to begin from.")] = None,
    tokens: Tokens = 300,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help=f"{', '.join(DTYPES)}. Default: that of the weights.")
    ] = None,
    json: Json = False,
) -> None:
    """Check on your model and prompt that cached decoding equals full recomputation.

    Decodes greedily with the cache, then runs the whole model once over what was generated, and compares the choice
    and the logits at every position. A tie is a position whose two best tokens stand closer than 8 times the rounding
    error of its logits. Exit code 0: the tokens are equal, ties aside; 1: they differ.

    \b
    Example:
      flash-inference verify shakespeare --prompt "ROMEO:" --tokens 1000 --dtype float64
    """
    import torch

    from flash_inference.engine.verify import verify as compare
    from flash_inference.models.weights import load

    if dtype is not None and dtype not in DTYPES:
        raise CommandError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    language_model = load(model, dtype=None if dtype is None else getattr(torch, dtype))
    records = gather(
        text=prompt, text_option="--prompt", text_file=prompt_file, fasta=None, dash=None, default="",
        dna=language_model.tokens.complement is not None,
    )  # fmt: skip
    record = next(iter(records))
    with Meter("decoding", tokens, "tokens") as meter:
        report = compare(language_model, record.text, tokens=tokens, progress=lambda _: meter.add())
    if json:
        values = dataclasses.asdict(report) | {"model": model, "equal": report.equal, "distinct": report.distinct}
        write_json(values | {"tokens": len(report.tokens)})
    else:
        write("".join(f"{line}\n" for line in lines(report, language_model.tokens)))
    if not report.equal:
        raise typer.Exit(1)


def lines(report: Report, table: Table) -> list[str]:
    """A report for people."""
    first = report.first
    told = [
        f"equal: {len(report.tokens):,} greedy tokens are those of full recomputation"
        if first is None
        else f"differ: first at position {first.position}, {_choice(first, table)}",
        f"largest logits difference  {report.difference:.3g} (at position {report.position}, {report.dtype})",
        f"rounding of full logits    {report.rounding:.3g}",
        f"distinct tokens            {report.distinct}",
        f"ties                       {len(report.ties)}",
    ]
    told += [f"  position {tie.position}: {_choice(tie, table)}" for tie in report.ties]
    if report.distinct < min(FEW, len(report.tokens)):
        told.append(f"note: a run of {report.distinct} distinct tokens proves little; try another prompt.")
    return told


def _choice(choice: Choice, table: Table) -> str:
    def token(number: int) -> str:
        return f"{number} {table.decode([number])!r}"

    return (
        f"cached {token(choice.cached)} (top-2 gap {choice.cached_gap:.3g}), "
        f"full {token(choice.full)} (top-2 gap {choice.full_gap:.3g}), tie below {choice.bound:.3g}"
    )
