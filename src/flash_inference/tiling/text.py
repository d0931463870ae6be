"""The triangle as lines of text."""

from __future__ import annotations

import string

from .laws import Tiling
from .palette import colour
from .tile import sources_at, targets_of

SYMBOLS = string.digits + string.ascii_uppercase + string.ascii_lowercase + "+/"
"""One for each position."""


def table(tiling: Tiling, length: int, color: bool) -> str:
    """One line a target, one symbol a source; a head with the sources, a legend below."""
    cells = [["."] * (target + 1) for target in range(length)]
    for step in range(length):
        for item in tiling.after(step):
            rows = targets_of(item)
            for target in range(rows.start, min(rows.stop, length)):
                for source in sources_at(item, target):
                    cells[target][source] = SYMBOLS[step]
        for source, target in tiling.inline(step):
            cells[target][source] = "*"
    lines = [repr(tiling), "       source", "target " + "".join(str(source % 10) for source in range(length))]
    lines += [f"{target:6} " + "".join(_paint(cell, length, color) for cell in row) for target, row in enumerate(cells)]
    lines.append(f"paid after position: {SYMBOLS[0]} = 0 .. {SYMBOLS[length - 1]} = {length - 1}, * inline, . never")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _paint(cell: str, length: int, color: bool) -> str:
    if not color or cell not in SYMBOLS:
        return cell
    red, green, blue = colour(SYMBOLS.index(cell) / max(1, length - 2))
    return f"\x1b[38;2;16;18;24;48;2;{red};{green};{blue}m{cell}\x1b[0m"
