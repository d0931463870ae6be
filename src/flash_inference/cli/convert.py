"""`flash-inference convert`: a published checkpoint in this library's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flash_inference.cli.console import CommandError, note, write_json
from flash_inference.cli.options import Json


def convert(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A model's folder as its authors published it.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where to write: a new or an empty folder.")],
    json: Json = False,
) -> None:
    """Write a published checkpoint in this library's own format, with checksums.

    Tells what had to be assumed while reading: defaults that no file states, tied heads. The numbers stay as they are.

    \b
    Example:
      flash-inference convert hyenadna-small-32k-seqlen-hf my-hyenadna
    """
    from flash_inference.models.weights import load, save

    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise CommandError(f"{out} exists and is no empty folder. Name another.")
    if not Path(folder).is_dir():
        raise CommandError(f"{folder} is no folder. Download the model first: this command reads what is there.")
    model = load(Path(folder).absolute())
    save(model, out)
    if json:
        write_json({"folder": folder, "out": out, "config": model.config.to_dict(), "notes": list(model.notes)})
    note(f"wrote {out}: {sum(weight.numel() for weight in model.parameters()):,} numbers")
