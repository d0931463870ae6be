"""Tokens that may be taken back: what a model says behind them, before any of them is accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flash_inference.errors import LengthError, ModelError, StateError
from flash_inference.mixers.draft import StackDraft
from flash_inference.mixers.mixer import clone
from flash_inference.models.block import BlockPast
from flash_inference.ops.decode_step import HyenaChunk

if TYPE_CHECKING:
    from flash_inference.models.decoder import Decoder, ModelState


class Draft:
    """A tentative continuation of a state: `extend` reads tokens, `commit(n)` accepts the first n of them.

    The state is not written to before `commit`: to reject a draft is to forget it, and what follows is bit for bit what
    it would have been. Convolution inputs stand in a log, each mixer works on a copy of its past, and `commit` enters
    the accepted inputs as steps do, without the model's matrices. A draft belongs to the clock that it was made at.
    Where single positions run fused over numpy, drafts do too.
    Memory: n inputs of every convolution and mixer, and a copy of the mixers' pasts.
    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2023), arXiv 2211.17192.
    """

    def __init__(self, decoder: Decoder, state: ModelState) -> None:
        self.decoder, self.state, self.clock, self.length = decoder, state, state.clock, 0
        if state.stack:
            decoder.settle(state)
        self.stack = StackDraft(decoder.stack, state.stack) if decoder.stack and state.stack else None
        if state.step and self.stack and self.stack.state.step_from <= state.clock:
            state.chunk = state.chunk or HyenaChunk(state.step.step)
            self.blocks = FusedBlocks(state.chunk, state.step.short, self.stack)
        else:
            self.blocks = ModuleBlocks(decoder, state, self.stack)

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """The next tokens [B, N] -> logits [B, N, V] behind each. Raises TokenError, LengthError, StateError."""
        model, N = self.decoder.model, tokens.shape[1]
        self._check_clock()
        tokens, stop = model.check_tokens(tokens), self.clock + self.length + N
        if stop > self.state.room and not self.stack:
            raise LengthError(f"drafts up to position {stop}; the state holds {self.state.room}. Draft fewer tokens.")
        if self.stack:
            self.stack.begin(N)
        x = self.blocks.extend(model.embedding(tokens), self.clock + self.length)
        self.length += N
        return model.head(model.norm(x))

    @torch.no_grad()
    def commit(self, n: int, pay: Callable[[], None] | None = None) -> None:
        """Accepts the first n tokens and forgets the others; tiles are then due as after steps. Raises StateError.

        `pay` pays what is due before each of them (default: at once).
        """
        self._check_clock()
        if not 0 <= n <= self.length:
            raise StateError(f"cannot commit {n} of {self.length} drafts; expected 0 to {self.length}.")
        self.blocks.commit(n)
        if self.stack:
            inputs = self.stack.inputs[:n]
            while len(inputs):
                if pay:
                    pay()
                inputs = inputs[self.stack.stack.enter(self.stack.state, inputs) :]
        self.state.clock += n

    def _check_clock(self) -> None:
        if self.state.clock != self.clock:
            raise StateError(
                f"the draft was made at position {self.clock} and the state is at {self.state.clock}. Make a new draft."
            )


class ModuleBlocks:
    """The blocks as their modules, on a copy of the mixers' pasts; what entered each mixer is kept."""

    def __init__(self, decoder: Decoder, state: ModelState, stack: StackDraft | None) -> None:
        self.decoder, self.state, self.stack = decoder, state, stack
        self.pasts = [[clone(past) for past in pasts] for pasts in state.pasts]
        self.entered: list[list[Tensor]] = [[] for pasts in state.pasts for _ in pasts]

    def extend(self, x: Tensor, clock: int) -> Tensor:
        """The next positions x [B, n, D] -> [B, n, D]."""
        decoder, logs = self.decoder, iter(self.entered)
        for index, (block, pasts) in enumerate(zip(decoder.model.blocks, self.pasts, strict=True)):
            inputs: list[tuple[Any, Tensor]] = []
            moment = replace(self.state.moment, clock=clock, entered=inputs)
            x = block.extend(x, BlockPast(pasts, moment, partial(self._mix, decoder.first[index])))
            for past, mixer in zip(pasts, block.mixers, strict=True):
                next(logs).append(_entered(inputs, past, mixer))
        return x

    def commit(self, n: int) -> None:
        """Moves the state's mixers on by the first n positions."""
        state, logs = self.state, iter(self.entered)
        for block, pasts in zip(self.decoder.model.blocks, state.pasts, strict=True):
            for mixer, past in zip(block.mixers, pasts, strict=True):
                inputs = next(logs)
                if n:
                    mixer.extend(past, torch.cat(inputs, dim=1)[:, :n], state.moment)

    def _mix(self, first: int, o: int, y: Tensor) -> Tensor:
        assert self.stack is not None
        return self.stack.mix(first + o, y.transpose(0, 1)).transpose(0, 1).to(y.dtype)


class FusedBlocks:
    """The blocks fused over numpy, as steps are; every row has begun. The short convolutions' pasts are copied."""

    def __init__(self, chunk: HyenaChunk, short: np.ndarray, stack: StackDraft) -> None:
        self.chunk, self.known, self.short, self.stack = chunk, short, short.copy(), stack
        self.entered: list[np.ndarray] = []

    def extend(self, x: Tensor, clock: int) -> Tensor:
        """The next positions x [B, n, D] -> [B, n, D]."""
        y, entered = self.chunk(x.transpose(0, 1).numpy(), self.short, self._mix)
        self.chunk.advance(self.short, entered, x.shape[1])
        self.entered.append(entered)
        return torch.from_numpy(y).transpose(0, 1)

    def commit(self, n: int) -> None:
        """Moves the state's short convolutions on by the first n positions."""
        if n:
            entered = self.entered[0] if len(self.entered) == 1 else np.concatenate(self.entered, axis=1)
            self.chunk.advance(self.known, entered, n)

    def _mix(self, m: int, y: np.ndarray) -> np.ndarray:
        return self.stack.mix(m, torch.from_numpy(y)).numpy()


def _entered(inputs: list[tuple[Any, Tensor]], past: Any, mixer: Any) -> Tensor:
    """What entered the mixer with this past."""
    for of, x in inputs:
        if of is past:
            return x
    raise ModelError(
        f"{type(mixer).__name__}.extend did not let its inputs in by moment.enter(past, x), so that drafts cannot be "
        "taken back. Call it first of all."
    )
