"""What a mixer is: an operation along time, with an explicit past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Past = TypeVar("Past")


@dataclass(frozen=True, slots=True)
class Moment:
    """When an `extend` happens: `clock` positions are known, row b of the batch began at clock `start[b]`."""

    clock: int
    start: Tensor | None = None

    def positions(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """[B or 1, n]: the next n positions as each row counts them, from 0 at its start; negative before it."""
        clocks = torch.arange(self.clock, self.clock + n, device=device)
        return clocks[None] if self.start is None else clocks - self.start[:, None].to(clocks.device)

    def alive(self, n: int, device: torch.device | str | None = None) -> Tensor | None:
        """[B, n]: which of the next n positions have begun. None: all of them."""
        if self.start is None or self.clock >= int(self.start.max()):
            return None
        return self.positions(n, device) >= 0


class Mixer(Protocol[Past]):
    """An operation along time: `forward` over a whole sequence, or `init` and `extend` a piece at a time.

    `Past` is a dataclass of tensors whose first axis is the batch: what the positions so far leave behind. It is made
    by `init`, advanced in place by `extend`, and can so be saved, forked, cut into rows and moved like any value.
    """

    def init(self, batch: int, length: int) -> Past:
        """An empty past of `batch` rows, with room for `length` positions where room is needed."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """The definition: x [B, L, D] -> [B, L, D'], each position from itself and its past."""
        ...

    def extend(self, past: Past, x: Tensor, moment: Moment) -> Tensor:
        """The next N positions x [B, N, D] -> [B, N, D'], exact anywhere; those before a row's start leave no trace."""
        ...
