"""Going back to an earlier position, when what came after it has been committed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from flash_inference.errors import LengthError, StateError
from flash_inference.mixers.mixer import clone
from flash_inference.tiling import Tiling

if TYPE_CHECKING:
    from flash_inference.models.decoder import Decoder, ModelState


@dataclass(frozen=True, slots=True)
class Mark:
    """A position to return to: its clock, and copies of the mixers' pasts there. Convolutions need none."""

    clock: int
    pasts: list[list[Any]]


def mark(state: ModelState) -> Mark:
    """The state's position. Memory: the mixers' pasts, which do not grow but for KV caches without a window."""
    return Mark(state.clock, [[clone(past) for past in pasts] for pasts in state.pasts])


@torch.no_grad()
def rewind(decoder: Decoder, state: ModelState, mark: Mark, tiling: Tiling) -> ModelState:
    """A new state at the position of a mark made on this one; `state` stays as it is.

    `tiling` begins there (`Prompted(inner, mark.clock)`), and is no longer than the state's. The convolutions' partial
    sums are built anew by one rectangle, at O(L log L) per channel: right within rounding, and not bit-equal to the
    first time, since sums are formed in another order. Drafts (`Decoder.draft`) go back for nothing, and bit-equally.
    Raises StateError and LengthError.
    """
    if mark.clock > state.clock:
        raise StateError(f"the mark is at position {mark.clock}, the state at {state.clock}; expected a later state.")
    if tiling.length is None or tiling.length > state.room:
        raise LengthError(
            f"{tiling!r} covers {tiling.length or 'endless'} positions; the mixers' pasts have room for {state.room}. "
            f"Give a tiling of at most {state.room}."
        )
    stack = decoder.stack.rewound(state.stack, mark.clock, tiling) if decoder.stack and state.stack else None
    pasts = [[clone(past) for past in pasts] for pasts in mark.pasts]
    return decoder.bind(replace(state, pasts=pasts, stack=stack, clock=mark.clock, step=None))
