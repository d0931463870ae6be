"""`flash-inference embed`: vectors of given text or DNA."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from flash_inference.cli.console import CommandError, Meter, write, write_json
from flash_inference.cli.options import Dash, Fasta, Json, Model, Npz
from flash_inference.cli.records import Record, gather

if TYPE_CHECKING:
    from torch import Tensor

    from flash_inference.models.backbone import LanguageModel


def embed(
    model: Model,
    dash: Dash = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to embed.")] = None,
    text_file: Annotated[str | None, typer.Option(metavar="FILE", help="A file whose text to embed.")] = None,
    fasta: Fasta = None,
    layer: Annotated[
        int, typer.Option(help="0: the embedding; n: after block n; -1: after the final norm, what the head reads.")
    ] = -1,
    pool: Annotated[str, typer.Option(help="mean or last: a vector a record; none: one a token.")] = "mean",
    npz: Npz = None,
    json: Json = False,
) -> None:
    """Embed text or DNA: the hidden states that a model has of it, exact.

    Prints tab-separated columns: the record, its number of tokens (with --pool none, the token's position), and the
    vector. The state of the start token, which precedes the input, is left out. All input is checked before any of it
    is embedded. --npz writes the arrays names, lengths (in rows of the last), and embeddings, one record after another.

    \b
    Examples:
      flash-inference embed tuberculosis --fasta genes.fa --npz genes.npz
      flash-inference embed shakespeare --text "To be, or not to be" --layer 2 --pool none
    """
    from flash_inference.cli.npz import Npz as Archive
    from flash_inference.engine.embed import POOLS, check_layer
    from flash_inference.models.weights import load

    language_model = load(model)
    check_layer(language_model, layer)
    if pool not in POOLS:
        raise CommandError(f"--pool is {pool!r}; expected one of {', '.join(POOLS)}.")
    if npz is not None and json:
        raise CommandError("--npz and --json were given; expected one form of output. Leave one of them out.")
    records = gather(
        text=text, text_option="--text", text_file=text_file, fasta=fasta, dash=dash,
        dna=language_model.tokens.complement is not None,
    )  # fmt: skip

    def check(row: Tensor) -> None:
        if len(row) < 2:
            raise CommandError("it is empty; there is nothing to embed. Remove the record.")

    survey = records.check(language_model, check)
    width = language_model.config.width
    shape = (survey.tokens if pool == "none" else survey.records, width)
    numbers = "float64" if language_model.embedding.weight.itemsize == 8 else "float32"
    archive = Archive(npz, "embeddings", shape, numbers) if npz is not None else None
    if not json and archive is None:
        named = ["record", "position" if pool == "none" else "tokens", *(f"d{d}" for d in range(width))]
        write("\t".join(named) + "\n")
    with archive or nullcontext(), Meter("embedding", survey.tokens, "tokens") as meter:
        for window in records.windows(language_model):
            found = _vectors(language_model, window, layer, pool, meter)
            for (record, row), vectors in zip(window, found, strict=True):
                if archive is not None:
                    archive.write(record.name, vectors)
                elif json:
                    values = {"record": record.name, "tokens": len(row) - 1, "layer": layer, "pool": pool}
                    write_json(values | {"embedding": vectors.tolist() if pool == "none" else vectors[0].tolist()})
                else:
                    write(_lines(record.name, len(row) - 1, vectors, pool))


def _vectors(
    model: LanguageModel, window: list[tuple[Record, Tensor]], layer: int, pool: str, meter: Meter
) -> list[Tensor]:
    """The vectors [L or 1, D] of each record."""
    from flash_inference.engine.embed import embed as hidden

    found = hidden(model, [record.text for record, _ in window], layer=layer, pool=pool, progress=meter.add)  # type: ignore[arg-type]
    return [vectors.reshape(-1, vectors.shape[-1]) for vectors in found]


def _lines(name: str, tokens: int, vectors: Tensor, pool: str) -> str:
    digits = 17 if vectors.element_size() == 8 else 9
    first = 1 if pool == "none" else tokens
    rows = (
        "\t".join([name, str(number), *(f"{value:.{digits}g}" for value in vector)])
        for number, vector in enumerate(vectors.tolist(), first)
    )
    return "".join(f"{row}\n" for row in rows)
