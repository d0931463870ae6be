"""The triangle as an SVG picture that stands on its own."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from .laws import Tiling
from .palette import hexadecimal
from .tile import Rectangle, Share, Tile, sources_at, targets_of

LEFT, TOP, RIGHT, BOTTOM = 64.0, 84.0, 26.0, 92.0
"""Room around the triangle for the axes, the title and the legend."""

STYLE = (
    "text{font-family:ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif;font-size:12px;fill:#4b5563}"
    ".title{font-size:15px;font-weight:600;fill:#1f2937}.ground{fill:#fff}.rest{fill:#eef0f4}"
    ".tile{stroke:#fff}.inline{fill:#9aa3b2}"
    "@media(prefers-color-scheme:dark){text{fill:#aab3c2}.title{fill:#e5e9f0}.ground{fill:#11151c}.rest{fill:#1c222c}"
    ".tile{stroke:#11151c}.inline{fill:#5d6675}}"
)


def picture(tiling: Tiling, length: int) -> str:
    """The picture of the first `length` positions."""
    cell = max(1.0, min(24.0, 576 / length))
    side = cell * length
    title = repr(tiling)
    payments = [(step, item) for step in range(length) for item in tiling.after(step)]
    shared = any(isinstance(item, Share) for _, item in payments)
    width = LEFT + max(side, 320.0, 8.4 * len(title)) + RIGHT
    height = TOP + side + BOTTOM
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" '
            f'width="{_n(width)}" height="{_n(height)}" role="img">',
            f"<title>{escape(title)}: which pair is paid after which position</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="ground" width="{_n(width)}" height="{_n(height)}" rx="10"/>',
            f'<text class="title" x="{_n(LEFT)}" y="32">{escape(title)}</text>',
            *_axes(length, cell),
            f'<g transform="translate({_n(LEFT)} {_n(TOP)})">',
            f'<path class="rest" d="{_stairs(length, cell)}"/>',
            f'<g class="tile" stroke-width="{_n(min(1.2, cell / 8))}">',
            *_tiles(payments, length, cell),
            "</g>",
            f'<path class="inline" d="{_inline(tiling, length, cell)}"/>',
            "</g>",
            *_legend(length, side, shared),
            "</svg>",
            "",
        ]
    )


def _tiles(payments: list[tuple[int, Tile | Share]], length: int, cell: float) -> Iterator[str]:
    """One shape a tile or share, named by its tooltip."""
    for step, item in payments:
        tile = item.tile if isinstance(item, Share) else item
        fill = hexadecimal(step / max(1, length - 2))
        label = f"<title>{escape(str(tile))} after {step}</title>"
        rows = targets_of(tile)
        targets = range(rows.start, min(rows.stop, length))
        if not targets:
            continue
        if isinstance(tile, Rectangle):
            x, width = tile.sources.start * cell, len(tile.sources) * cell
            if isinstance(item, Share):
                x, width = x + width * item.part.start / item.parts, width * len(item.part) / item.parts
            yield (
                f'<rect x="{_n(x)}" y="{_n(targets.start * cell)}" width="{_n(width)}" '
                f'height="{_n(len(targets) * cell)}" fill="{fill}">{label}</rect>'
            )
        else:
            runs = [(target, sources_at(tile, target)) for target in targets]
            yield f'<path d="{_outline(runs, cell)}" fill="{fill}">{label}</path>'


def _outline(runs: list[tuple[int, range]], cell: float) -> str:
    """The border of rows of sources: down the right side, up the left one."""
    right = [(run.stop, y) for target, run in runs for y in (target, target + 1)]
    left = [(run.start, y) for target, run in reversed(runs) for y in (target + 1, target)]
    return "M" + "L".join(f"{_n(x * cell)} {_n(y * cell)}" for x, y in right + left) + "Z"


def _inline(tiling: Tiling, length: int, cell: float) -> str:
    """The inline pairs, each a square with a margin."""
    margin = cell * 0.16
    size = cell - 2 * margin
    squares = (
        f"M{_n(source * cell + margin)} {_n(target * cell + margin)}h{_n(size)}v{_n(size)}h{_n(-size)}z"
        for step in range(length)
        for source, target in tiling.inline(step)
    )
    return "".join(squares)


def _stairs(length: int, cell: float) -> str:
    """The outline of all pairs source <= target."""
    return _outline([(target, range(target + 1)) for target in range(length)], cell)


def _axes(length: int, cell: float) -> Iterator[str]:
    """Position numbers, about eight of them at round distances, and the names of the axes."""
    side = cell * length
    yield f'<text x="{_n(LEFT + side / 2)}" y="56" text-anchor="middle">source</text>'
    yield f'<text transform="translate(20 {_n(TOP + side / 2)}) rotate(-90)" text-anchor="middle">target</text>'
    apart = 1 << max(0, (length - 1) // 8).bit_length()
    for position in range(0, length, apart):
        middle = (position + 0.5) * cell
        yield f'<text x="{_n(LEFT + middle)}" y="{_n(TOP - 8)}" text-anchor="middle">{position}</text>'
        yield f'<text x="{_n(LEFT - 8)}" y="{_n(TOP + middle + 4)}" text-anchor="end">{position}</text>'


def _legend(length: int, side: float, shared: bool) -> Iterator[str]:
    """The colour bar, and the mark of inline pairs."""
    y, bar, steps = TOP + side + 30, 200.0, 40
    yield f'<text x="{_n(LEFT)}" y="{_n(y)}">paid after position</text>'
    for step in range(steps):
        yield (
            f'<rect x="{_n(LEFT + bar * step / steps)}" y="{_n(y + 10)}" width="{_n(bar / steps + 0.5)}" height="12" '
            f'fill="{hexadecimal(step / (steps - 1))}"/>'
        )
    yield f'<text x="{_n(LEFT)}" y="{_n(y + 38)}">0</text>'
    yield f'<text x="{_n(LEFT + bar)}" y="{_n(y + 38)}" text-anchor="end">{max(0, length - 2)}</text>'
    if shared:
        yield f'<text x="{_n(LEFT + bar + 36)}" y="{_n(y + 38)}">strips: shares of channels</text>'
    yield f'<rect class="inline" x="{_n(LEFT + bar + 36)}" y="{_n(y + 10)}" width="12" height="12"/>'
    yield f'<text x="{_n(LEFT + bar + 55)}" y="{_n(y + 20)}">inline</text>'


def _n(value: float) -> str:
    """A number of at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
