"""A model made ready to decode: filters prepared once, and a state that any chunk of tokens extends exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flash_inference.errors import LengthError
from flash_inference.mixers.mixer import Moment, clone, tensors
from flash_inference.mixers.stack import Stack, StackState
from flash_inference.models.block import BlockPast, Convolutions, common_stride
from flash_inference.models.draft import Draft
from flash_inference.models.fused import fused_step, pack_short
from flash_inference.ops.decode_step import BoundStep, HyenaChunk
from flash_inference.ops.memory import roomy_zeros
from flash_inference.ops.tile_conv import PreparedFilter
from flash_inference.tiling import Rectangle, Share, Tiling

if TYPE_CHECKING:
    from flash_inference.models.backbone import LanguageModel


PIECE = 1024


@dataclass(slots=True)
class ModelState:
    """The past of a batch of sequences, as one value.

    `pasts[i][j]` is the past of block i's mixer j; `stack` the past of all long convolutions, None where there are
    none. `start` [B] is the clock at which each row begins, `last_start` the largest, `first_start` the smallest that
    counts; `clock` counts the positions known, `room` those that a row's mixers' pasts were made for. `step` holds no
    past: the fused step over this memory; nor does `chunk`, by which drafts run fused.
    """

    pasts: list[list[Any]]
    start: Tensor
    room: int
    last_start: int = 0
    first_start: int = 0
    clock: int = 0
    stack: StackState | None = None
    step: BoundStep | None = None
    chunk: HyenaChunk | None = None

    @property
    def batch(self) -> int:
        """Rows."""
        return self.start.shape[0]

    @property
    def moment(self) -> Moment:
        """When the next `extend` happens."""
        return Moment(self.clock, self.start if self.last_start else None, self.last_start, self.first_start)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        own = sum(tensor.nbytes for pasts in self.pasts for past in pasts for tensor in tensors(past).values())
        return own + (self.stack.nbytes if self.stack else 0)


class Decoder:
    """Steps a LanguageModel: `init`, then `extend` by any number of tokens; `due` and `pay` between steps.

    `length` positions can be run: filters are evaluated once, up to so many taps. `stack` holds the long convolutions
    of all blocks, None where there are none. `fused` runs single positions and drafts of a Hyena model on a CPU through
    numpy (ops.decode_step); otherwise, and for chunks, the model's own modules run.
    """

    def __init__(self, model: LanguageModel, length: int, *, spectra_bytes: int | None = None) -> None:
        self.model, self.config, self.length = model, model.config, length
        groups = [block.convolutions for block in model.blocks]
        counts = [sum(group.count for group in of_block) for of_block in groups]
        self.first = [0, *accumulate(counts)]
        self.stack = _stack([group for of_block in groups for group in of_block], length, spectra_bytes)
        self.fused = fused_step(model, self.stack.diagonal) if self.stack else None
        if self.fused:
            weight, norm = model.head.weight, model.norm
            self._embedding, self._head = model.embedding.weight.detach().numpy(), weight.detach().numpy().T
            self._norm = (norm.weight.detach(), norm.bias.detach(), norm.eps)

    def init(
        self, batch: int, tiling: Tiling, *, dtype: torch.dtype | None = None, start: Tensor | None = None
    ) -> ModelState:
        """An empty state; `start` [B] is the clock at which each row begins, `dtype` how the history is stored.

        The tiling's length is the room that the mixers' pasts get (endless: the decoder's length). A model without
        long convolutions takes any tiling, and has no other use for it.
        """
        stack = self.stack.init(batch, tiling, dtype=dtype, start=start) if self.stack else None
        room = self.length if tiling.length is None else tiling.length
        with torch.inference_mode(False), torch.no_grad():
            device = self.model.embedding.weight.device
            own = torch.zeros(batch, dtype=torch.long) if start is None else start.detach().clone()
            pasts = [[mixer.init(batch, room) for mixer in block.mixers] for block in self.model.blocks]
        return self.bind(ModelState(pasts, own.to(device), room, int(own.max()), stack=stack))

    def bind(self, state: ModelState) -> ModelState:
        """The same state, with the fused step over its memory."""
        if self.fused and state.stack:
            short = pack_short([pasts[0] for pasts in state.pasts])
            state.step = self.fused.bind(state.stack.inputs, state.stack.partial, short)
        return state

    def clone(self, state: ModelState) -> ModelState:
        """An independent copy: what is due is paid first, then both go their own ways."""
        self.settle(state)
        stack = self.stack.bind(state.stack.clone()) if self.stack and state.stack else None
        pasts = [[clone(past) for past in pasts] for pasts in state.pasts]
        with torch.inference_mode(False):
            start = state.start.clone()
        return self.bind(replace(state, pasts=pasts, start=start, stack=stack, step=None, chunk=None))

    def due(self, state: ModelState) -> tuple[Rectangle | Share, ...]:
        """The tiles that became payable with the last position."""
        return self.stack.due(state.stack) if self.stack and state.stack else ()

    def pay(self, state: ModelState, tile: Rectangle | Share) -> None:
        """Pays one tile for all layers."""
        if self.stack and state.stack:
            self.stack.pay(state.stack, tile)

    def take(self, state: ModelState) -> tuple[Rectangle | Share, ...]:
        """All that is due, now the caller's to `apply` before the tiles' targets are read."""
        return self.stack.take(state.stack) if self.stack and state.stack else ()

    def apply(self, state: ModelState, tile: Rectangle | Share, *, staged: bool = True) -> None:
        """Pays a taken tile for all layers, as `Stack.apply` does."""
        if self.stack and state.stack:
            self.stack.apply(state.stack, tile, staged=staged)

    def settle(self, state: ModelState) -> None:
        """Pays all that is due."""
        if self.stack and state.stack:
            self.stack.settle(state.stack)

    def extend(self, state: ModelState, tokens: Tensor, *, every: bool = False) -> Tensor:
        """The next tokens [B, N] -> logits [B, V] of the last position, or [B, N, V] of all with `every`.

        Exact anywhere in the sequence. What is still due is paid first. Raises TokenError and LengthError.
        """
        stack, past, step = self.stack, state.stack, state.step
        if not (step and stack and past and tokens.shape[1] == 1 and past.step_from <= past.clock < past.step_until):
            return self._chunks(state, tokens, every)
        if not past.staged or past.paid < past.clock:
            stack.begin(past, 1)
        self._step(step, past.row, tokens)
        stack.commit(past, 1)
        state.clock += 1
        weight, bias, eps = self._norm
        h = torch.layer_norm(step.alike, weight.shape, weight, bias, eps)
        logits = torch.from_numpy(np.dot(h.numpy(), self._head)[: len(tokens)])
        return logits[:, None] if every else logits

    def draft(self, state: ModelState) -> Draft:
        """A tentative continuation: its `extend` reads tokens without writing to the state, its `commit` accepts some.

        What is due is paid first.
        """
        return Draft(self, state)

    @torch.no_grad()
    def hidden(self, state: ModelState, tokens: Tensor, layer: int = -1) -> Tensor:
        """The next tokens [B, N] -> hidden states [B, N, D]: after the embedding (layer 0), each block, the final norm.

        `layer` indexes these as a list. Extends the state as `extend` does, through all blocks. Raises TokenError and
        LengthError.
        """
        layer %= len(self.model.blocks) + 2
        states = torch.cat(list(self._states(state, tokens, layer)), dim=1)
        return self.model.norm(states) if layer > len(self.model.blocks) else states

    @torch.no_grad()
    def _chunks(self, state: ModelState, tokens: Tensor, every: bool) -> Tensor:
        pieces = self._states(state, tokens, len(self.model.blocks))
        outputs = [self.model.head(self.model.norm(x if every else x[:, -1])) for x in pieces]
        return torch.cat(outputs, dim=1) if every else outputs[-1]

    def _states(self, state: ModelState, tokens: Tensor, layer: int) -> Iterator[Tensor]:
        """[B, n, D] after `layer` blocks, a piece of the tokens at a time."""
        tokens = self.model.check_tokens(tokens)
        done = 0
        for size in self._sizes(state, tokens.shape[1]):
            yield self._piece(state, tokens[:, done : done + size], layer)
            done += size

    def _sizes(self, state: ModelState, n: int) -> list[int]:
        """Sizes of the pieces in which n further positions are taken."""
        if self.stack and state.stack:
            return self.stack.pieces(state.stack, n)
        if state.clock + n - state.first_start > state.room:
            raise LengthError(
                f"{n} more positions after {state.clock} make {state.clock + n}; the state holds {state.room}. "
                "Make the tiling longer."
            )
        return [n] if n else []

    def _piece(self, state: ModelState, tokens: Tensor, layer: int) -> Tensor:
        """Runs all blocks; [B, N, D] after `layer` of them."""
        N = tokens.shape[1]
        if self.stack and state.stack:
            self.stack.begin(state.stack, N)
        x, moment = self.model.embedding(tokens), state.moment
        wanted = x
        for index, (block, pasts) in enumerate(zip(self.model.blocks, state.pasts, strict=True)):
            x = block.extend(x, BlockPast(pasts, moment, partial(self._mix, state, self.first[index])))
            wanted = x if index < layer else wanted
        if self.stack and state.stack:
            self.stack.commit(state.stack, N)
        state.clock += N
        return wanted

    def _mix(self, state: ModelState, first: int, o: int, y: Tensor) -> Tensor:
        assert self.stack is not None
        assert state.stack is not None
        return self.stack.mix(state.stack, first + o, y)

    def _step(self, step: BoundStep, row: int, tokens: Tensor) -> None:
        """Runs a token through the blocks at once."""
        ids = tokens.numpy()[:, 0]
        if ids.min() < 0 or ids.max() >= len(self._embedding):
            self.model.check_tokens(tokens)
        np.take(self._embedding, ids, axis=0, out=step.rows_of_x, mode="clip")
        step(row)


def _stack(groups: Sequence[Convolutions], length: int, spectra_bytes: int | None) -> Stack | None:
    """The convolutions of all blocks side by side; None if there are none."""
    if not groups:
        return None
    with torch.inference_mode(False), torch.no_grad():
        rho = _evaluate(groups, length)
        skips = [rho.new_zeros(g.filter.channels) if g.skip is None else g.skip.detach().to(rho) for g in groups]
    widths = [group.width for group in groups for _ in range(group.count)]
    filter = PreparedFilter(rho, spectra_bytes, own=True, stride=common_stride(groups))
    return Stack(filter, widths, torch.cat(skips))


def _evaluate(groups: Sequence[Convolutions], length: int) -> Tensor:
    """The taps of all filters under one another, [channels, length], zero behind a filter's end.

    They are evaluated in pieces, which need little room.
    """
    filters = [group.filter for group in groups]
    first = filters[0].taps(1)
    dtype = first.dtype if first.dtype == torch.float64 else torch.float32
    like = torch.empty(0, dtype=dtype, device=first.device)
    rho = roomy_zeros(like, sum(filter.channels for filter in filters), length)
    row = 0
    for filter in filters:
        stop = min(length, filter.length)
        for start in range(0, stop, PIECE):
            n = min(PIECE, stop - start)
            rho[row : row + filter.channels, start : start + n] = filter.taps(n, start)
        row += filter.channels
    return rho
