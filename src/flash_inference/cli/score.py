"""`flash-inference score`: how likely given text or DNA is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flash_inference.cli.console import CommandError, Meter, write, write_json
from flash_inference.cli.options import Dash, Fasta, Json, Model, Npz
from flash_inference.cli.records import Record, gather

if TYPE_CHECKING:
    from torch import Tensor

    from flash_inference.models.backbone import LanguageModel
    from flash_inference.models.tokens import Table


def score(
    model: Model,
    dash: Dash = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to score.")] = None,
    text_file: Annotated[str | None, typer.Option(metavar="FILE", help="A file whose text to score.")] = None,
    fasta: Fasta = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="One line for each token.")] = False,
    reverse_complement: Annotated[
        bool, typer.Option("--reverse-complement", help="DNA: the mean of the sequence and its other strand.")
    ] = False,
    npz: Npz = None,
    json: Json = False,
) -> None:
    """Score text or DNA: its log-likelihood under a model, exact.

    Prints tab-separated columns: the record, how many tokens it has, their total natural log-likelihood, and bits per
    token (lower is better predicted). Without an option, standard input is scored. The first token is scored too,
    after the model's start token. All input is checked before any of it is scored. --npz writes the arrays names,
    lengths, and log_likelihoods of all tokens, one record after another.

    \b
    Examples:
      flash-inference score shakespeare --text "To be, or not to be"
      flash-inference score tuberculosis --fasta genes.fa.gz --reverse-complement
      flash-inference score shakespeare --per-token < play.txt > play.tsv
    """
    from flash_inference.cli.npz import Npz as Archive
    from flash_inference.engine.strands import other_strand
    from flash_inference.models.weights import load

    language_model = load(model)
    table = language_model.tokens
    if reverse_complement and table.complement is None:
        raise CommandError(f"--reverse-complement needs a DNA model; {model!r} reads text. Leave it out.")
    if npz is not None and (json or per_token):
        raise CommandError("--npz takes every token's score already. Leave --json and --per-token out.")
    records = gather(
        text=text, text_option="--text", text_file=text_file, fasta=fasta, dash=dash, dna=table.complement is not None
    )

    def check(row: Tensor) -> None:
        if len(row) < 2:
            raise CommandError("it is empty; a score needs at least 1 token. Remove the record.")
        if reverse_complement:
            other_strand(language_model, row)

    survey = records.check(language_model, check)
    numbers = "float64" if language_model.embedding.weight.itemsize == 8 else "float32"
    archive = Archive(npz, "log_likelihoods", (survey.tokens,), numbers) if npz is not None else None
    if not json and archive is None:
        write("\t".join(TOKEN_COLUMNS if per_token else Score.COLUMNS) + "\n")
    with archive or nullcontext(), Meter("scoring", survey.tokens * (1 + reverse_complement), "tokens") as meter:
        for window in records.windows(language_model):
            for result in _scores(language_model, window, reverse_complement, meter):
                if archive is not None:
                    archive.write(result.record, result.log_likelihoods)
                elif json:
                    chances = {"log_likelihoods": result.log_likelihoods.tolist()} if per_token else {}
                    write_json(result.values() | chances)
                else:
                    write(result.lines(table) if per_token else "\t".join(result.cells()) + "\n")


TOKEN_COLUMNS = ("record", "position", "token", "text", "log_likelihood")


@dataclass(frozen=True, slots=True)
class Score:
    """A record's score in nats: of each of its tokens, and in total for each strand that was read."""

    COLUMNS = ("record", "tokens", "log_likelihood", "bits_per_token")

    record: str
    ids: Tensor
    log_likelihoods: Tensor
    strands: list[float]

    @property
    def tokens(self) -> int:
        """How many were scored."""
        return len(self.ids)

    @property
    def log_likelihood(self) -> float:
        """The mean of the strands, in nats."""
        return sum(self.strands) / len(self.strands)

    @property
    def bits_per_token(self) -> float:
        """Bits that a coder would need for a token."""
        return -self.log_likelihood / self.tokens / math.log(2)

    def cells(self) -> list[str]:
        """As columns of text."""
        return [self.record, str(self.tokens), f"{self.log_likelihood:.6f}", f"{self.bits_per_token:.6f}"]

    def lines(self, table: Table) -> str:
        """A line of text for each token."""
        lines: list[str] = []
        scored = zip(self.ids.tolist(), self.log_likelihoods.tolist(), strict=True)
        for position, (token, chance) in enumerate(scored, 1):
            shown = table.decode([token]).encode("unicode_escape").decode()
            lines.append(f"{self.record}\t{position}\t{token}\t{shown}\t{chance:.6f}\n")
        return "".join(lines)

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.COLUMNS}
        if len(self.strands) > 1:
            values |= {"forward": self.strands[0], "reverse_complement": self.strands[1]}
        return values


def _scores(
    model: LanguageModel, window: list[tuple[Record, Tensor]], reverse_complement: bool, meter: Meter
) -> Iterator[Score]:
    """Scores records side by side; with `reverse_complement`, each letter's is the mean of both strands."""
    from flash_inference.engine.score import score as log_likelihoods
    from flash_inference.engine.strands import mean_of_strands, other_strand

    rows = [row for _, row in window]
    readings = [rows, [other_strand(model, row) for row in rows]] if reverse_complement else [rows]
    strands = [[row.flatten() for row in log_likelihoods(model, reading, progress=meter.add)] for reading in readings]
    for (record, row), *chances in zip(window, *strands, strict=True):
        each = mean_of_strands(*chances) if reverse_complement else chances[0]
        yield Score(record.name, row[1:], each, [float(chance.double().sum()) for chance in chances])
