"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A shipped model (shakespeare, tuberculosis), or the folder of a saved one."),
]
Dash = Annotated[
    str | None, typer.Argument(metavar="-", help="A single dash reads standard input.", show_default=False)
]
Fasta = Annotated[str | None, typer.Option(metavar="FILE", help="Read the records of a FASTA or FASTQ file (.gz too).")]
Npz = Annotated[str | None, typer.Option("--npz", metavar="FILE", help="Write NumPy arrays to a file instead.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="How many new tokens.")]
