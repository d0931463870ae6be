"""What every mixer that is paid in tiles does, whatever its sums are: the clock, what is due, chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from flash_inference.errors import LengthError, ShapeError, StateError
from flash_inference.tiling import Parallelogram, Rectangle, Share, Tiling
from flash_inference.tiling.tile import Clipped

Item = Rectangle | Parallelogram | Clipped | Share


@dataclass(slots=True)
class TiledPast:
    """Inputs [B, L, D] so far, and what each position has received: `sums` [B, L, *sum].

    `clock` counts the positions known, `paid` how many of them have paid their tiles; `owed` is what is left of those
    of the last one. Positions stand on the second axis.
    """

    tiling: Tiling
    inputs: Tensor
    sums: Tensor
    clock: int = 0
    paid: int = 0
    owed: list[Item] = field(default_factory=list[Item])


class Tiled:
    """A mixer with `apply` (one tile) and `own` (a chunk's own pairs): the rest follows from the tiling."""

    def apply(self, past: TiledPast, item: Item) -> None:
        """Adds what an item's sources owe its targets. That it is due is up to the caller."""
        raise NotImplementedError

    def own(self, past: TiledPast, start: int, stop: int) -> Tensor:
        """Outputs [B, N, ..] of positions start .. stop - 1, whose past is in the sums and whose inputs are known."""
        raise NotImplementedError

    def due(self, past: TiledPast) -> tuple[Item, ...]:
        """The tiles that became payable with the last position and are not paid yet."""
        if past.paid < past.clock:
            past.owed, past.paid = cast("list[Item]", list(past.tiling.after(past.clock - 1))), past.clock
        return tuple(past.owed)

    @torch.no_grad()
    def pay(self, past: TiledPast, item: Item) -> None:
        """Pays one of the tiles that `due` told; what is left is paid by the next `extend`."""
        if item not in self.due(past):
            raise StateError(f"{item} is not due after {past.clock} positions; pay what due() tells, each tile once.")
        self.apply(past, item)
        past.owed.remove(item)

    @torch.no_grad()
    def extend(self, past: TiledPast, y: Tensor) -> Tensor:
        """The next N positions y [B, N, D] -> [B, N, ..], exact anywhere. What is still due is paid first."""
        start, stop = past.clock, past.clock + y.shape[1]
        inputs = past.inputs
        if y.ndim != 3 or (y.shape[0], y.shape[2]) != (inputs.shape[0], inputs.shape[2]):
            raise ShapeError(f"y has shape {tuple(y.shape)}; expected [{inputs.shape[0]}, N, {inputs.shape[2]}].")
        if stop > inputs.shape[1]:
            raise LengthError(
                f"{stop} positions were given; the state holds {inputs.shape[1]}. Make the tiling longer."
            )
        for item in self.due(past):
            self.pay(past, item)
        if start == stop:
            return self.own(past, start, stop)
        span = past.tiling.span(start, stop - start)
        inputs[:, start:stop] = y
        for item in span.before:
            self.apply(past, item)
        z = self.own(past, start, stop)
        for item in span.after:
            self.apply(past, item)
        past.clock, past.paid = stop, stop - 1
        return z


def check_length(tiling: Tiling) -> int:
    """The tiling's length. Raises LengthError if it has none: the past is kept whole."""
    if tiling.length is None:
        raise LengthError(f"{tiling!r} is endless; this mixer keeps its whole past. Give the tiling a length.")
    return tiling.length
