"""`flash-inference score`: how likely given text or DNA is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flash_inference.cli.console import CommandError, Meter, write, write_json
from flash_inference.cli.options import Dash, Fasta, Json, Model
from flash_inference.cli.records import gather

if TYPE_CHECKING:
    from torch import Tensor

    from flash_inference.models.backbone import LanguageModel

COMPLEMENT = str.maketrans("ACGTacgt", "TGCAtgca")


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
    json: Json = False,
) -> None:
    """Score text or DNA: its log-likelihood under a model, exact.

    Prints tab-separated columns: the record, how many tokens it has, their total natural log-likelihood, and bits per
    token (lower is better predicted). Without an option, standard input is scored. The first token is scored too,
    after the model's start token.

    \b
    Examples:
      flash-inference score shakespeare --text "To be, or not to be"
      flash-inference score tuberculosis --fasta genes.fa --reverse-complement
      flash-inference score shakespeare --per-token < play.txt > play.tsv
    """
    from flash_inference.engine.prompts import as_rows
    from flash_inference.models.weights import load

    language_model = load(model)
    dna = language_model.tokens.name.startswith("dna")
    if reverse_complement and (per_token or not dna):
        why = "gives no score for single tokens" if dna else f"needs a DNA model; {model!r} reads text"
        raise CommandError(f"--reverse-complement {why}. Leave one of them out.")
    records = gather(text=text, text_option="--text", text_file=text_file, fasta=fasta, dash=dash, dna=dna)
    for record in records:
        if not record.text:
            raise CommandError(f"record {record.name!r} is empty; a score needs at least 1 token. Remove it.")
    strands = [[as_rows(language_model, record.text)[0]] for record in records]
    if reverse_complement:
        for rows, record in zip(strands, records, strict=True):
            rows.append(as_rows(language_model, record.text.translate(COMPLEMENT)[::-1])[0])
    for rows in strands:
        language_model.check_tokens(rows[0][None])
    if not json:
        columns = ["record", "position", "token", "text", "log_likelihood"] if per_token else list(Score.COLUMNS)
        write("\t".join(columns) + "\n")
    with Meter("scoring", sum(len(row) - 1 for rows in strands for row in rows), "tokens") as meter:
        for record, rows in zip(records, strands, strict=True):
            chances = [_chances(language_model, row, meter) for row in rows]
            result = Score(record.name, len(chances[0]), [float(chance.double().sum()) for chance in chances])
            if json:
                write_json(result.values() | ({"log_likelihoods": chances[0].tolist()} if per_token else {}))
            elif per_token:
                _write_tokens(language_model, record.name, rows[0], chances[0])
            else:
                write("\t".join(result.cells()) + "\n")


@dataclass(frozen=True, slots=True)
class Score:
    """A record's score: its log-likelihood in nats, one for each strand that was read."""

    COLUMNS = ("record", "tokens", "log_likelihood", "bits_per_token")

    record: str
    tokens: int
    strands: list[float]

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

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.COLUMNS}
        if len(self.strands) > 1:
            values |= {"forward": self.strands[0], "reverse_complement": self.strands[1]}
        return values


def _chances(model: LanguageModel, row: Tensor, meter: Meter) -> Tensor:
    """Log-probabilities [L - 1] of a row after its first token."""
    import torch

    from flash_inference.engine.score import score_chunks

    parts: list[Tensor] = []
    for part in score_chunks(model, row[None]):
        parts.append(part[0])
        meter.add(part.shape[1])
    return torch.cat(parts)


def _write_tokens(model: LanguageModel, name: str, row: Tensor, chances: Tensor) -> None:
    lines = []
    for position, (token, chance) in enumerate(zip(row[1:].tolist(), chances.tolist(), strict=True), 1):
        shown = model.tokens.decode([token]).encode("unicode_escape").decode()
        lines.append(f"{name}\t{position}\t{token}\t{shown}\t{chance:.6f}\n")
    write("".join(lines))
