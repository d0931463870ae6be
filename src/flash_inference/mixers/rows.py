"""Rows of a stack's state: cut out, emptied, and begun anew with a past that is paid forward at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flash_inference.errors import LengthError
from flash_inference.mixers.stack import Stack, StackState, spaced
from flash_inference.ops.tile_conv import tile_conv

ALL = slice(None)


def select(stack: Stack, state: StackState, rows: Sequence[int]) -> StackState:
    """A copy of some rows, in any order and number: they go on bit for bit as the rows that they are copied from."""
    stack.settle(state)
    index = list(rows)
    with torch.inference_mode(False), torch.no_grad():
        history = spaced(state.history, state.history.shape[0], len(index), state.history.shape[2])
        for place, row in enumerate(index):
            history[:, place] = state.history[:, row]
        parts = {"history": history, "start": state.start[index]}
        parts |= {"inputs": state.inputs[:, index], "partial": state.partial[:, index]}
    lives = None if state.lives is None else [state.lives[row] for row in index]
    return stack.bind(replace(state, **parts, lives=lives, owed=None, pushes=[]))


def inputs_of(stack: Stack, state: StackState, row: int, clocks: range) -> Tensor:
    """What row `row` put into the convolutions at known clocks, [C, N]."""
    pieces = [x[:, row] for _, x in stack.columns(state, clocks, ALL, state.staged, state.inputs)]
    return torch.cat([stack.filter.rho.new_zeros(0, stack.filter.channels), *pieces]).T


@torch.no_grad()
def enter(stack: Stack, state: StackState, row: int, past: Tensor, length: int) -> None:
    """Row `row` begins to live at the state's clock, for `length` positions, with inputs `past` [C, P] behind it.

    They are paid forward as one rectangle, into the partial sums of the positions to come. In the state the row has
    zeros before it begins, so that every tile is right for it from here on, and no share of a tile that was begun for
    the row's former occupant finds anything to pay. Cost O((P + length) log(P + length)) a channel; the sums do not
    depend on the clock. Raises LengthError if the tiling's lags do not last for the life.
    """
    tiling, clock = state.tiling, state.clock
    assert state.lives is not None
    if tiling.taps is None or length > tiling.taps:
        raise LengthError(
            f"a row of {length} new positions needs as many lags; {tiling!r} pays those below {tiling.taps}. "
            "Ask for fewer, or make the ring for more."
        )
    for held in (state.history, state.inputs, state.partial):
        held[:, row] = 0
    state.lives[row] = range(clock, clock + length)
    if length and past.shape[1]:
        sums = past.new_zeros(past.shape[0], 1, length).permute(2, 1, 0)
        tile_conv(past.T[:, None], stack.passing, 1, out=sums)
        for t, column in stack.columns(state, state.lives[row], ALL, state.staged, state.partial):
            column[:, row] = sums[t : t + column.shape[0], 0]
