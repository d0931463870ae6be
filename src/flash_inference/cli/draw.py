"""`flash-inference draw`: a tiling as a picture."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flash_inference.cli.console import CommandError, note, write, write_json
from flash_inference.cli.options import Json
from flash_inference.cli.tilings import NAMES, build
from flash_inference.tiling import Parallelogram, Share, Tile
from flash_inference.tiling import draw as picture

WIDEST = 64
"""Positions that text has symbols for."""


def draw(
    tiling: Annotated[
        str,
        typer.Argument(metavar="TILING", help=f"{', '.join(NAMES)}."),
    ],
    length: Annotated[
        int, typer.Argument(metavar="LENGTH", min=1, help="How many positions, the prompt's among them.")
    ],
    svg: Annotated[str | None, typer.Option(metavar="FILE", help="Write an SVG picture; - is stdout.")] = None,
    near: Annotated[
        int | None, typer.Option(help="Largest square at the diagonal: separated, staggered, spread.")
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Positions of an inline block: blocked, separated, staggered, spread.")
    ] = None,
    shift: Annotated[int | None, typer.Option(help="Blocks by which a clock runs ahead: staggered.")] = None,
    epoch: Annotated[int | None, typer.Option(help="Positions of an epoch: epoched.")] = None,
    every: Annotated[int | None, typer.Option(help="Steps between shares of a tile: spread.")] = None,
    prompt: Annotated[int, typer.Option(min=0, help="Positions that are known from the start.")] = 0,
    taps: Annotated[int | None, typer.Option(help="Filter length, if shorter than the sequence.")] = None,
    json: Json = False,
) -> None:
    """Draw which pair of positions is paid when.

    Sources run from left to right, targets from top to bottom; each pair shows the position after which it is paid. In
    the terminal up to 64 positions; any number as SVG. --json lists the tiles in the order of payment.

    \b
    Examples:
      flash-inference draw relaxed 32
      flash-inference draw spread 64 --near 8 --every 4
      flash-inference draw separated 256 --near 32 --svg separated.svg
    """
    chosen = build(tiling, length, prompt, every, near=near, block=block, shift=shift, epoch=epoch, taps=taps)
    if json:
        payments = [
            {"after": position, **_values(item)} for position in range(length) for item in chosen.after(position)
        ]
        write_json({"tiling": repr(chosen), "length": length, "payments": payments})
    elif svg == "-":
        write(picture(chosen, length))
    elif svg is not None:
        Path(svg).write_text(picture(chosen, length), encoding="utf-8")
        note(f"wrote {svg}")
    elif length > WIDEST:
        raise CommandError(f"{length} positions are too wide for text, which shows {WIDEST}. Use --svg FILE.")
    else:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        write(picture(chosen, length, format="text", color=color))


def _values(item: Tile | Share) -> dict[str, Any]:
    """An item as JSON values: intervals as (start, stop), and of a share, which part of how many."""
    tile = item.tile if isinstance(item, Share) else item
    values: dict[str, Any] = {"sources": (tile.sources.start, tile.sources.stop)}
    if isinstance(tile, Parallelogram):
        values["lags"] = (tile.lags.start, tile.lags.stop)
    else:
        values["targets"] = (tile.targets.start, tile.targets.stop)
    if isinstance(item, Share):
        values |= {"part": (item.part.start, item.part.stop), "parts": item.parts}
    return values
