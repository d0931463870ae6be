"""Prompted: a tiling that starts after a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from flash_inference.errors import TilingError

from .laws import Tiling
from .tile import Item, Pair, Parallelogram, Rectangle, Share, Span
from .triangle import Triangle, call, check_position, check_span, require


@dataclass(frozen=True, repr=False)
class Prompted:
    """`tiling`, moved behind `prompt` positions that are known from the start.

    Positions t < P are the prompt's: inline (i, t) for all i <= t, which one parallel forward pays. After position
    P - 1 one rectangle, sources [0, P) to targets [P, length), narrowed to those with lags below taps. After t >= P:
    the tiles of position t - P, P later. Length P + tiling.length.
    Cost: the tiling's, plus one FFT of the prompt's rectangle.
    """

    tiling: Tiling
    prompt: int

    def __post_init__(self) -> None:
        require("Prompted", "prompt", self.prompt, minimum=0)
        probe = range(4 if self.tiling.length is None else min(4, self.tiling.length))
        for tile in (tile for position in probe for tile in self.tiling.after(position)):
            if isinstance(tile, Parallelogram):
                raise TilingError(
                    f"Prompted got {self.tiling!r}, which pays {tile}; taps beyond a prompt are unknown at its end. "
                    "Make the tiling longer by the prompt, and start with its span(0, prompt)."
                )

    @property
    def length(self) -> int | None:
        """The prompt and the tiling's positions; None: endless."""
        return None if self.tiling.length is None else self.tiling.length + self.prompt

    @property
    def taps(self) -> int | None:
        """The tiling's."""
        return self.tiling.taps

    @property
    def block(self) -> int:
        """The tiling's; blocks start at `origin`."""
        return self.tiling.block

    @property
    def origin(self) -> int:
        """Where aligned blocks start: behind the prompt."""
        return self.prompt + self.tiling.origin

    @property
    def slacks(self) -> tuple[int, ...]:
        """The tiling's."""
        return self.tiling.slacks

    @property
    def reach(self) -> tuple[int, int]:
        """The tiling's, or the prompt's rectangle where that is larger."""
        back, ahead = self.tiling.reach
        for tile in self._prompt(0, self.prompt):
            back, ahead = max(back, len(tile.sources)), max(ahead, len(tile.targets))
        return back, ahead

    def after(self, position: int) -> tuple[Rectangle | Share, ...]:
        """The prompt's rectangle after position prompt - 1; the tiling's tiles after the later ones."""
        late = check_position(self, self.length, position) - self.prompt
        if late < 0:
            return self._prompt(0, self.prompt) if late == -1 else ()
        return tuple(_shift(item, self.prompt) for item in self.tiling.after(late))

    def inline(self, position: int) -> tuple[Pair, ...]:
        """(i, position) for all i <= position in the prompt; the tiling's pairs behind it."""
        late = check_position(self, self.length, position) - self.prompt
        if late < 0:
            return tuple((i, position) for i in range(position + 1))
        return tuple((i + self.prompt, j + self.prompt) for i, j in self.tiling.inline(late))

    def span(self, start: int, n: int) -> Span:
        """Before a chunk that starts in the prompt: one rectangle; behind the prompt, the tiling's span."""
        stop, prompt = check_span(self, self.length, start, n), self.prompt
        inner = self.tiling.span(max(0, start - prompt), stop - max(start, prompt)) if stop > prompt else None
        late = () if inner is None else tuple(_shift(item, prompt) for item in inner.after)
        if start >= prompt:
            assert inner is not None
            return Span(start, stop, tuple(_shift(item, prompt) for item in inner.before), late)
        before = self._triangle(stop).needed((0, start), (start, stop))
        return Span(start, stop, before, (self._prompt(stop, prompt) if stop > prompt else ()) + late)

    def _triangle(self, limit: int) -> Triangle:
        return Triangle(limit if self.length is None else self.length, taps=self.taps)

    def _prompt(self, first: int, prompt: int) -> tuple[Rectangle, ...]:
        """What the prompt owes to targets >= first."""
        first = max(first, prompt)
        stop = self.length if self.length is not None else prompt + (self.taps or 1) - 1
        return self._triangle(max(1, stop)).needed((0, prompt), (first, stop))

    def __repr__(self) -> str:
        return call(self)


def _shift(item: Item, offset: int) -> Rectangle | Share:
    if isinstance(item, Share):
        return Share(item.tile.shift(offset), item.part, item.parts)
    if isinstance(item, Rectangle):
        return item.shift(offset)
    raise TilingError(f"Prompted got {item}; it moves rectangles and shares of them. Use a tiling made of these.")
