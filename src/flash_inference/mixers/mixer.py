"""What a mixer is: an operation along time, with an explicit past."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Past = TypeVar("Past")


@dataclass(frozen=True, slots=True)
class Moment:
    """When an `extend` happens: `clock` positions are known, row b of the batch began at clock `start[b]`.

    `last_start` is the largest of the starts, `first_start` the smallest of those that count, where they are known
    beforehand: a device then need not be asked. `entered` collects what enters each mixer, as pairs of its past and its
    inputs, where a draft wants to know it.

    A clock that the device holds, as a tensor [1], is for single positions that are captured once and replayed at
    others: all rows have begun by then, and nobody on the host knows which position it is.
    """

    clock: int | Tensor
    start: Tensor | None = None
    last_start: int | None = None
    first_start: int = 0
    entered: list[tuple[Any, Tensor]] | None = None

    def positions(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """[B or 1, n]: the next n positions as each row counts them, from 0 at its start; negative before it."""
        clocks = torch.arange(n, device=device) + self.clock
        return clocks[None] if self.start is None else clocks - self.start[:, None].to(clocks.device)

    def begun_by(self, clock: int) -> bool:
        """Whether no row begins after `clock`."""
        if self.start is None:
            return True
        last = int(self.start.max()) if self.last_start is None else self.last_start
        return last <= clock

    def alive(self, n: int, device: torch.device | str | None = None) -> Tensor | None:
        """[B, n]: which of the next n positions have begun. None: all of them."""
        begun = isinstance(self.clock, Tensor) or self.begun_by(self.clock)
        return None if begun else self.positions(n, device) >= 0

    def mute(self, x: Tensor) -> Tensor:
        """The next inputs x [B, N, D] with zeros in the place of those before a row's start, whatever these are."""
        alive = self.alive(x.shape[1], x.device)
        return x if alive is None else x.masked_fill(~alive[..., None], 0)

    def enter(self, past: Any, x: Tensor) -> Tensor:
        """The next inputs x [B, N, D] of the mixer with this past, muted; noted in `entered`."""
        x = self.mute(x)
        if self.entered is not None:
            self.entered.append((past, x))
        return x


@runtime_checkable
class Clocked(Protocol[Past]):
    """A mixer whose past is laid out by the clock, so that a row that changes its clock or its room must be moved."""

    def period(self, length: int, /) -> int:
        """Clocks after which the layout of a past with room for `length` positions repeats."""
        ...

    def moved(self, past: Past, known: range, clock: int, length: int, /) -> Past:
        """One row's past with the inputs of the clocks `known` as if they had come just before `clock`, in a past with
        room for `length` positions."""
        ...


class Mixer(Protocol[Past]):
    """An operation along time: `forward` over a whole sequence, or `init` and `extend` a piece at a time.

    `extend` lets its inputs in by `moment.enter(past, x)`, first of all: so drafts know them, to take them back.

    `Past` is a dataclass of tensors whose first axis is the batch: what the positions so far leave behind. It is made
    by `init`, advanced in place by `extend`, and can so be saved, forked, cut into rows and moved like any value.
    `decodes` names the way of decoding in a plan: "recurrence", "FIR ring", "KV cache". A mixer that can be captured in
    a GPU's graph says so by an attribute `replays` = True: `extend` by one position then changes its past's tensors in
    place, asks the device nothing, and bears a clock on the device.
    """

    decodes: ClassVar[str]

    def past_bytes(self, length: int, /) -> int:
        """Bytes of one row's past with room for `length` positions."""
        ...

    def init(self, batch: int, length: int, /) -> Past:
        """An empty past of `batch` rows, with room for `length` positions where room is needed."""
        ...

    def forward(self, x: Tensor, /) -> Tensor:
        """The definition: x [B, L, D] -> [B, L, D'], each position from itself and its past."""
        ...

    def extend(self, past: Past, x: Tensor, moment: Moment, /) -> Tensor:
        """The next N positions x [B, N, D] -> [B, N, D'], exact anywhere; those before a row's start leave no trace."""
        ...


def tensors(past: Any) -> dict[str, Tensor]:
    """The tensors of a past, by the names of its fields."""
    return {field.name: getattr(past, field.name) for field in dataclasses.fields(past)}


def clone(past: Past) -> Past:
    """An independent copy of a past."""
    with torch.inference_mode(False), torch.no_grad():
        return dataclasses.replace(past, **{name: tensor.clone() for name, tensor in tensors(past).items()})  # type: ignore[type-var]


def select(past: Past, rows: Sequence[int]) -> Past:
    """A copy of some rows of a past, in any order and number."""
    with torch.inference_mode(False), torch.no_grad():
        chosen = {name: tensor[list(rows)] for name, tensor in tensors(past).items()}
        return dataclasses.replace(past, **chosen)  # type: ignore[type-var]


def place(past: Any, row: int, other: Any) -> None:
    """Writes another past of one row over row `row` of a past."""
    for name, tensor in tensors(past).items():
        tensor[row].copy_(getattr(other, name)[0])
