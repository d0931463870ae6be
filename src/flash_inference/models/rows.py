"""Rows of a model's state as values: forked, let in and out of a batch whose rows come and go, and made longer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_inference.errors import ShapeError
from flash_inference.mixers import mixer as mixers
from flash_inference.mixers import rows as stack_rows
from flash_inference.mixers.mixer import Clocked
from flash_inference.mixers.stack import STAGE, ring_rows
from flash_inference.models.decoder import Decoder, ModelState
from flash_inference.tiling import Blocked, Tiling
from flash_inference.tiling.triangle import next_power

if TYPE_CHECKING:
    from flash_inference.models.backbone import LanguageModel


def fork(decoder: Decoder, state: ModelState, rows: Sequence[int]) -> ModelState:
    """The state of some rows as a value of its own: n samples of a prompt ([0] * n), beams, a batch cut down.

    Rows may come in any order and more than once. What is due is paid first; copies go on bit for bit as their rows do
    in a batch of the same size. Cost: one copy of the rows. Raises ShapeError for a row that the state lacks.
    """
    if not rows or not all(0 <= row < state.batch for row in rows):
        raise ShapeError(f"rows are {list(rows)}; expected some of 0 .. {state.batch - 1}, the rows of the state.")
    decoder.settle(state)
    stack = stack_rows.select(decoder.stack, state.stack, rows) if decoder.stack and state.stack else None
    pasts = [[mixers.select(past, rows) for past in of_block] for of_block in state.pasts]
    with torch.inference_mode(False):
        start = state.start[list(rows)]
    return decoder.bind(replace(state, pasts=pasts, start=start, stack=stack, step=None))


def open_rows(decoder: Decoder, slots: int, tiling: Tiling, room: int) -> ModelState:
    """A batch of `slots` empty rows on a clock without end; each row that enters has at most `room` positions.

    `tiling` is endless, its `taps` the most positions that a row may live. The clock begins at a multiple of `period`
    beyond `room`: every cache has come around once, so that steps look the same at all times, and no row begins at 0.
    """
    with torch.inference_mode(False), torch.no_grad():
        lives = [range(0)] * slots
        stack = decoder.stack.init(slots, tiling, lives=lives) if decoder.stack else None
        pasts = [[mixer.init(slots, room) for mixer in block.mixers] for block in decoder.model.blocks]
        every = period(decoder.model, tiling, room)
        clock = (room // every + 1) * every
        start = torch.full((slots,), clock, device=decoder.model.embedding.weight.device)
    if stack is not None:
        stack.clock = stack.paid = clock
        stack.cleared = clock + stack.history.shape[2]
    return decoder.bind(ModelState(pasts, start, room, clock, clock, clock, stack))


def period(model: LanguageModel, tiling: Tiling, room: int) -> int:
    """Clocks after which all that depends on the clock repeats: tiles, and where a cache keeps a position."""
    every = [next_power(max(tiling.taps or 1, tiling.block))]
    for block in model.blocks:
        every += [mixer.period(room) for mixer in block.mixers if isinstance(mixer, Clocked)]
    return math.lcm(*every)


@torch.no_grad()
def enter(decoder: Decoder, state: ModelState, row: int, past: ModelState, length: int) -> None:
    """A sequence of its own, `past` (one row from clock 0 on), goes on as row `row` for `length` more positions.

    Its convolutions' inputs are paid forward as one rectangle; what its mixers keep is copied.
    """
    known = range(past.clock)
    if decoder.stack and state.stack and past.stack:
        inputs = stack_rows.inputs_of(decoder.stack, past.stack, 0, known)
        stack_rows.enter(decoder.stack, state.stack, row, inputs, length)
    for mixer, mine, theirs in _mixers(decoder, state.pasts, past.pasts):
        mixers.place(mine, row, _moved(mixer, theirs, known, state.clock, state.room))
    state.start[row] = state.clock - past.clock
    state.last_start = max(state.last_start, state.clock - past.clock)


def vacate(state: ModelState, row: int) -> None:
    """Row `row` has no life any more: tiles pass it by. What is left there is wiped out when the next one enters."""
    state.start[row] = state.clock
    if state.stack is not None and state.stack.lives is not None:
        state.stack.lives[row] = range(0)


@torch.no_grad()
def leave(decoder: Decoder, state: ModelState, row: int, past: ModelState) -> ModelState:
    """Row `row`, which entered with `past`, as a sequence of its own again, with all that it has become since."""
    start = int(state.start[row])
    known = range(start, state.clock)
    inputs: list[Tensor] = []
    if decoder.stack and state.stack and past.stack:
        inputs.append(stack_rows.inputs_of(decoder.stack, past.stack, 0, range(past.clock)))
        inputs.append(stack_rows.inputs_of(decoder.stack, state.stack, row, known[past.clock :]))
    pasts = [[mixers.select(theirs, [row]) for theirs in of_block] for of_block in state.pasts]
    return _sequence(decoder, inputs, pasts, known, len(known))


@torch.no_grad()
def lengthened(decoder: Decoder, past: ModelState, length: int) -> ModelState:
    """A copy of a sequence of its own, with room for `length` positions."""
    known, inputs = range(past.clock), list[Tensor]()
    if decoder.stack and past.stack:
        inputs.append(stack_rows.inputs_of(decoder.stack, past.stack, 0, known))
    return _sequence(decoder, inputs, past.pasts, known, length)


def _sequence(decoder: Decoder, inputs: list[Tensor], pasts: list[list[Any]], known: range, length: int) -> ModelState:
    """A sequence of its own of the clocks `known`: its convolutions' inputs [C, ..] side by side, its mixers' pasts."""
    state, n = decoder.init(1, Blocked(length)), len(known)
    if decoder.stack and state.stack and n:
        torch.cat(inputs, dim=1, out=state.stack.history[:, 0, :n])
        decoder.stack.commit(state.stack, n)
    for mixer, mine, theirs in _mixers(decoder, state.pasts, pasts):
        mixers.place(mine, 0, _moved(mixer, theirs, known, n, state.room))
    state.clock = n
    return state


def _mixers(decoder: Decoder, one: list[list[Any]], other: list[list[Any]]) -> list[tuple[Any, Any, Any]]:
    """Every mixer with its past here and there."""
    return [
        (mixer, mine, theirs)
        for block, ours, others in zip(decoder.model.blocks, one, other, strict=True)
        for mixer, mine, theirs in zip(block.mixers, ours, others, strict=True)
    ]


def _moved(mixer: Any, past: Any, known: range, clock: int, room: int) -> Any:
    return mixer.moved(past, known, clock, room) if isinstance(mixer, Clocked) else past


def row_bytes(model: LanguageModel, positions: int) -> int:
    """Bytes of a sequence of its own with room for `positions`."""
    return _own_bytes(model, positions) + _column_bytes(model) * (-(-positions // STAGE) * STAGE + 2 * STAGE)


def slot_bytes(model: LanguageModel, tiling: Tiling, room: int) -> int:
    """Bytes of one row of `open_rows`."""
    block = tiling.block if tiling.block > 1 else STAGE
    return _own_bytes(model, room) + _column_bytes(model) * (ring_rows(tiling) + 2 * block)


def _column_bytes(model: LanguageModel) -> int:
    """Bytes of one position of all long convolutions."""
    groups = [group for block in model.blocks for group in block.convolutions]
    return sum(group.filter.channels for group in groups) * (8 if model.embedding.weight.itemsize == 8 else 4)


def _own_bytes(model: LanguageModel, room: int) -> int:
    return sum(mixer.past_bytes(room) for block in model.blocks for mixer in block.mixers)
