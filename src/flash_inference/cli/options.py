"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flash_inference.cli.console import CommandError

if TYPE_CHECKING:
    import torch

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
STATE_DTYPES = ("float32", "bfloat16", "float16")
StateDtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help=f"How histories are stored: {', '.join(STATE_DTYPES)}. 16 bits take half the memory, and round.",
    ),
]


def state_dtype_of(name: str | None) -> torch.dtype | None:
    """The type of that name. Raises CommandError for one that no history is stored in."""
    import torch

    if name is None:
        return None
    if name not in STATE_DTYPES:
        raise CommandError(f"--state-dtype is {name!r}; expected one of {', '.join(STATE_DTYPES)}.")
    return getattr(torch, name)
