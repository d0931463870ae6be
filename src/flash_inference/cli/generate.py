"""`flash-inference generate`: new text or DNA from a model."""

from __future__ import annotations

import re
import secrets
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flash_inference.cli.console import CommandError, Meter, note, write, write_json
from flash_inference.cli.options import Dash, Fasta, Json, Model, StateDtype, Tokens, state_dtype_of
from flash_inference.cli.records import Record, Survey, gather, wrap

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from flash_inference.engine.generate import Step
    from flash_inference.models.backbone import LanguageModel
    from flash_inference.models.tokens import Decoder, Table

LINE = 70
"""Letters in a line of FASTA."""


def generate(
    model: Model,
    dash: Dash = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to continue. Default: none.")] = None,
    prompt_file: Annotated[str | None, typer.Option(metavar="FILE", help="A file whose text to continue.")] = None,
    fasta: Fasta = None,
    tokens: Tokens = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, 1 the model's own odds.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens of this total probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out tokens below this share of the likeliest's odds.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens seen before less likely.")] = 1.0,
    allowed: Annotated[
        str | None,
        typer.Option(metavar="SET", help="Draw only from these letters (ACGT), or ids with commas (65,66 or 65,)."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Makes the draw repeatable. Default: a new one, which is told.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="STR", help="End after this text. May be repeated.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many samples of each prompt.")] = 1,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="With --json: the log-probability of each token.")
    ] = False,
    state_dtype: StateDtype = None,
    json: Json = False,
) -> None:
    """Continue a prompt, exactly as full recomputation would.

    Text appears as it is made. DNA models draw A, C, G and T, and print FASTA. Several samples or several records are
    printed one by one, each when it is done. --json prints one object a line for each sample. A text prompt is taken
    as it is, to the last newline; for DNA, white space is left out and text that begins with a header is FASTA.

    \b
    Examples:
      flash-inference generate shakespeare --prompt "ROMEO:" --temperature 0.8
      cat play.txt | flash-inference generate shakespeare - --stop "JULIET:"
      flash-inference generate tuberculosis --fasta genes.fa -n 4 > more.fa
    """
    from flash_inference.engine.prompts import check_room
    from flash_inference.models.weights import load

    language_model = load(model)
    table = language_model.tokens
    dna = table.complement is not None
    if logprobs and not json:
        raise CommandError("--logprobs were asked for without --json, which prints them. Add --json.")
    records = gather(
        text=prompt, text_option="--prompt", text_file=prompt_file, fasta=fasta, dash=dash, dna=dna, default=""
    )
    survey = records.check(language_model, lambda row: check_room(language_model, len(row), tokens))
    if seed is None:
        seed = secrets.randbelow(2**31)
    chosen = _ids(allowed, table)
    settings = {
        "max_new_tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "allowed": table.letters if chosen is None else chosen, "seed": seed,
        "stop": tuple(stop or ()), "n": n, "logprobs": logprobs, "state_dtype": state_dtype_of(state_dtype),
    }  # fmt: skip
    live = survey.records == n == 1 and not json
    described = f"model={model} temperature={temperature:g} seed={seed}"
    printer: Printer = _Json(model, settings) if json else _Fasta(described, live) if dna else _Text(survey, n, live)
    clock = Clock()
    show = not (live and sys.stdout.isatty())
    try:
        with Meter("generating", survey.records * n * tokens, "tokens", show=show) as meter:
            for number, (record, row) in enumerate(records.rows(language_model)):
                settings["first_row"] = number * n
                samples = [Sample(record, index, len(row), table.decoder()) for index in range(n)]
                _sample(language_model, row, samples, settings, printer, clock, meter)
    finally:
        clock.tell(f"; seed {seed}" if temperature else "")


def _sample(
    model: LanguageModel,
    row: Tensor,
    samples: list[Sample],
    settings: dict[str, Any],
    printer: Printer,
    clock: Clock,
    meter: Meter,
) -> None:
    """Runs the samples of one prompt; what there is of them is printed on Ctrl-C too."""
    from flash_inference.engine.generate import stream_steps

    clock.start()
    steps = cast("Generator[Step]", stream_steps(model, row, **settings))
    printed = 0
    try:
        with closing(steps):
            for step in steps:
                clock.step(sum(not sample.ended for sample in samples))
                chances = None if step.logprobs is None else step.logprobs.tolist()
                ended = step.ended.tolist()
                for index, token in enumerate(step.tokens.tolist()):
                    sample = samples[index]
                    if not sample.ended:
                        piece = sample.push(token, chances[index] if chances else None, ended[index])
                        meter.add()
                        printer.piece(sample, piece)
                while printed < len(samples) and samples[printed].ended:
                    printer.whole(samples[printed])
                    printed += 1
        for sample in samples[printed:]:
            sample.complete = True
            printer.whole(sample)
            printed += 1
    except KeyboardInterrupt:
        for sample in samples[printed:]:
            printer.whole(sample)
        raise


@dataclass
class Sample:
    """One continuation as it grows."""

    record: Record
    index: int
    prompt: int
    decoder: Decoder
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    ended: bool = False
    complete: bool = False

    def push(self, token: int, logprob: float | None, ended: bool) -> str:
        """Takes a token; returns the text that it completes."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        piece = self.decoder.push(token)
        self.pieces.append(piece)
        self.ended, self.complete = ended, ended
        return piece

    def rest(self) -> str:
        """What is left of an unfinished character."""
        piece = self.decoder.finish()
        self.pieces.append(piece)
        return piece

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


class Printer:
    """How samples appear on stdout: `piece` while they grow, `whole` once when they end."""

    def piece(self, sample: Sample, piece: str) -> None:
        """A sample has grown by a piece of text."""

    def whole(self, sample: Sample) -> None:
        """A sample has ended."""


class _Text(Printer):
    def __init__(self, survey: Survey, n: int, live: bool) -> None:
        self.records, self.n, self.live = survey.records, n, live

    def piece(self, sample: Sample, piece: str) -> None:
        if self.live and piece:
            write(piece)

    def whole(self, sample: Sample) -> None:
        rest = sample.rest()
        if self.live:
            write(rest + ("\n" if sys.stdout.isatty() else ""))
        else:
            name = f"{sample.record.name}, " if self.records > 1 else ""
            write(f"==> {name}sample {sample.index + 1} of {self.n} <==\n{sample.text}\n")


class _Fasta(Printer):
    def __init__(self, described: str, live: bool) -> None:
        self.described, self.live, self.column = described, live, 0

    def piece(self, sample: Sample, piece: str) -> None:
        if self.live:
            if len(sample.tokens) == 1:
                write(self._header(sample))
            for letter in piece:
                self.column += 1
                write(letter if self.column % LINE else f"{letter}\n")

    def whole(self, sample: Sample) -> None:
        if self.live:
            write("\n" if self.column % LINE else "")
        else:
            write(self._header(sample) + wrap(sample.text, LINE))

    def _header(self, sample: Sample) -> str:
        name = "generated" if sample.record.name in ("text", "stdin") else sample.record.name
        return f">{name}_{sample.index + 1} {self.described} prompt={len(sample.record.text)}\n"


class _Json(Printer):
    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self.model, self.settings = model, settings

    def whole(self, sample: Sample) -> None:
        sample.rest()
        values: dict[str, Any] = {
            "model": self.model, "record": sample.record.name, "sample": sample.index + 1,
            "temperature": self.settings["temperature"], "seed": self.settings["seed"], "prompt_tokens": sample.prompt,
            "new_tokens": len(sample.tokens), "stopped": sample.ended, "complete": sample.complete, "text": sample.text,
            "tokens": sample.tokens,
        }  # fmt: skip
        if self.settings["logprobs"]:
            values["logprobs"] = sample.logprobs
        write_json(values)


class Clock:
    """Counts tokens and the time they take: the steps apart from the prompts, each of which ends with a first token."""

    def __init__(self) -> None:
        self.tokens = self.first = 0
        self.reading = self.stepping = 0.0
        self._last, self._fresh = 0.0, True

    def start(self) -> None:
        """A prompt is about to be read."""
        self._last, self._fresh = time.perf_counter(), True

    def step(self, count: int) -> None:
        """A step has given `count` tokens."""
        now = time.perf_counter()
        if self._fresh:
            self.reading += now - self._last
            self.first += count
        else:
            self.stepping += now - self._last
        self.tokens += count
        self._last, self._fresh = now, False

    def tell(self, more: str) -> None:
        """The rate, on stderr; nothing before the first token."""
        if not self.tokens:
            return
        later = self.tokens - self.first
        rate = f", {later / self.stepping:,.0f} tokens/s" if later and self.stepping else ""
        total = self.reading + self.stepping
        note(f"{self.tokens:,} tokens in {total:.2f} s ({self.reading:.2f} s to the first{rate}){more}")


def _ids(allowed: str | None, table: Table) -> tuple[int, ...] | None:
    """Token ids of letters, or of numbers with commas."""
    if allowed is None:
        return None
    if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*,?\s*", allowed) and "," in allowed:
        return tuple(int(number) for number in allowed.split(",") if number.strip())
    return tuple(sorted(set(table.encode(allowed))))
