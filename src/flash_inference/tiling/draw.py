"""The triangle as a picture: which pair is paid after which position."""

from __future__ import annotations

from flash_inference.errors import TilingError

from .laws import Tiling
from .svg import picture
from .text import SYMBOLS, table


def draw(tiling: Tiling, length: int | None = None, format: str = "svg", color: bool = False) -> str:
    """Sources from left to right, targets from top to bottom, each tile in the colour of the position that pays it.

    length: how many positions to show; by default the tiling's own, which an endless tiling lacks.
    format: "svg", a picture on its own that suits light and dark pages; or "text", one symbol a pair (0-9 A-Z a-z + /
    for the position after which it is paid, `*` inline, `.` never), up to 64 positions, with ANSI colours if `color`.
    A tile that is paid in shares is cut into upright strips, one a share: a strip stands for channels, not sources; in
    text, the last share counts. Cost: O(tiles) elements, O(length^2) symbols.
    """
    shown = tiling.length if length is None else length
    if shown is None:
        raise TilingError(f"{tiling!r} is endless; draw got no length. Pass length=, a number of positions.")
    if shown < 1 or (tiling.length is not None and shown > tiling.length):
        raise TilingError(
            f"draw got length={shown} of {tiling!r}; it shows 1..{tiling.length} positions. Pass one of these."
        )
    if format == "svg":
        return picture(tiling, shown)
    if format != "text":
        raise TilingError(f"draw got format={format!r}; it draws 'svg' and 'text'. Pass one of these.")
    if shown > len(SYMBOLS):
        raise TilingError(
            f"draw got length={shown}; text has symbols for {len(SYMBOLS)} positions. Pass fewer, or format='svg'."
        )
    return table(tiling, shown, color)
