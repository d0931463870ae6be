"""A model made ready to decode: filters prepared once, and a state that any chunk of tokens extends exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flash_inference.filters import ExplicitFilter, ImplicitFilter
from flash_inference.mixers.stack import Stack, StackState
from flash_inference.ops.decode_step import BoundStep, HyenaStep, LayerWeights
from flash_inference.ops.memory import roomy_zeros
from flash_inference.ops.tile_conv import PreparedFilter
from flash_inference.tiling import Rectangle, Share, Tiling

if TYPE_CHECKING:
    from flash_inference.models.backbone import LanguageModel
    from flash_inference.models.blocks import Block


PIECE = 1024


@dataclass(slots=True)
class ModelState:
    """The past of a batch of sequences: the long convolutions' stack, and the short convolutions' pending sums.

    `short` is [layers, taps - 1, B, (N + 1) D]. `step` holds no past: the fused step over this state's memory.
    """

    stack: StackState
    short: Tensor
    step: BoundStep | None = None

    @property
    def clock(self) -> int:
        """Positions known."""
        return self.stack.clock

    @property
    def batch(self) -> int:
        """Rows."""
        return self.short.shape[2]


class Decoder:
    """Steps a LanguageModel: `init`, then `extend` by any number of tokens; `due` and `pay` between steps.

    Filters are evaluated once, up to `length` taps. `fused` runs single positions on a CPU through numpy
    (ops.decode_step); otherwise, and for chunks, the model's own modules run.
    """

    def __init__(self, model: LanguageModel, length: int, *, spectra_bytes: int | None = None) -> None:
        self.model, self.config = model, model.config
        with torch.inference_mode(False), torch.no_grad():
            skip = torch.cat([block.mixer.skip for block in model.blocks])
            rho = _evaluate([block.mixer.filter for block in model.blocks], length)
        self.stack = Stack(PreparedFilter(rho, spectra_bytes, own=True), model.config.width, skip)
        weight = model.head.weight
        self.fused = _fused_step(model, self.stack) if _fusible(weight) else None
        if self.fused:
            self._embedding, self._head = model.embedding.weight.detach().numpy(), weight.detach().numpy().T
            self._norm = (model.norm.weight.detach(), model.norm.bias.detach(), model.norm.eps)

    @property
    def length(self) -> int:
        """Filter taps prepared, hence positions that can be run."""
        return self.stack.filter.length

    def init(
        self, batch: int, tiling: Tiling, *, dtype: torch.dtype | None = None, start: Tensor | None = None
    ) -> ModelState:
        """An empty state; `start` [B] is the clock at which each row begins, `dtype` how the history is stored."""
        stack = self.stack.init(batch, tiling, dtype=dtype, start=start)
        with torch.inference_mode(False), torch.no_grad():
            short = torch.stack([block.mixer.short.init(batch) for block in self.model.blocks])
        return self.bind(ModelState(stack, short))

    def bind(self, state: ModelState) -> ModelState:
        """The same state, with the fused step over its memory."""
        stack = state.stack
        state.step = self.fused.bind(stack.inputs, stack.partial, state.short) if self.fused else None
        return state

    def clone(self, state: ModelState) -> ModelState:
        """An independent copy: what is due is paid first, then both go their own ways."""
        self.settle(state)
        with torch.inference_mode(False), torch.no_grad():
            short = state.short.clone()
        return self.bind(ModelState(self.stack.bind(state.stack.clone()), short))

    def due(self, state: ModelState) -> tuple[Rectangle | Share, ...]:
        """The tiles that became payable with the last position."""
        return self.stack.due(state.stack)

    def pay(self, state: ModelState, tile: Rectangle | Share) -> None:
        """Pays one tile for all layers."""
        self.stack.pay(state.stack, tile)

    def settle(self, state: ModelState) -> None:
        """Pays all that is due."""
        self.stack.settle(state.stack)

    def extend(self, state: ModelState, tokens: Tensor, *, every: bool = False) -> Tensor:
        """The next tokens [B, N] -> logits [B, V] of the last position, or [B, N, V] of all with `every`.

        Exact anywhere in the sequence. What is still due is paid first. Raises TokenError and LengthError.
        """
        stack = state.stack
        if tokens.shape[1] == 1 and state.step is not None and stack.step_from <= stack.clock < stack.step_until:
            if not stack.staged or stack.paid < stack.clock:
                self.stack.begin(stack, 1)
            logits = self._step(state.step, stack, tokens)
            return logits[:, None] if every else logits
        return self._chunks(state, tokens, every)

    @torch.no_grad()
    def _chunks(self, state: ModelState, tokens: Tensor, every: bool) -> Tensor:
        tokens = self.model.check_tokens(tokens)
        outputs, done = [], 0
        for size in self.stack.pieces(state.stack, tokens.shape[1]):
            outputs.append(self._piece(state, tokens[:, done : done + size], every))
            done += size
        return torch.cat(outputs, dim=1) if every else outputs[-1]

    def _piece(self, state: ModelState, tokens: Tensor, every: bool) -> Tensor:
        stack, N = state.stack, tokens.shape[1]
        self.stack.begin(stack, N)
        x = self.model.embedding(tokens)
        alive = self.stack.alive(stack, N) if stack.clock < stack.last_start else None
        M = self.config.order - 1
        for layer, block in enumerate(self.model.blocks):
            x = block.extend(
                x, lambda o, y, first=layer * M: self.stack.mix(stack, first + o, y), state.short[layer], alive
            )
        self.stack.commit(stack, N)
        x = x if every else x[:, -1]
        return self.model.head(self.model.norm(x))

    def _step(self, step: BoundStep, stack: StackState, tokens: Tensor) -> Tensor:
        ids = tokens.numpy()[:, 0]
        if ids.min() < 0 or ids.max() >= len(self._embedding):
            self.model.check_tokens(tokens)
        np.take(self._embedding, ids, axis=0, out=step.rows_of_x, mode="clip")
        step(stack.row)
        self.stack.commit(stack, 1)
        weight, bias, eps = self._norm
        h = torch.layer_norm(step.x, weight.shape, weight, bias, eps)
        return torch.from_numpy(np.dot(h.numpy(), self._head))


def _evaluate(filters: list[ImplicitFilter | ExplicitFilter], length: int) -> Tensor:
    """The taps of all filters under one another, [channels, length]: evaluated in pieces that need little room."""
    first = filters[0].taps(1)
    dtype = first.dtype if first.dtype == torch.float64 else torch.float32
    like = torch.empty(0, dtype=dtype, device=first.device)
    rho = roomy_zeros(like, sum(filter.channels for filter in filters), length)
    row = 0
    for filter in filters:
        for start in range(0, length, PIECE):
            n = min(PIECE, length - start)
            rho[row : row + filter.channels, start : start + n] = filter.taps(n, start)
        row += filter.channels
    return rho


def _fusible(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)


def layer_weights(block: Block) -> LayerWeights:
    """The tensors that a decode step reads of one block."""

    def pair(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
        return module.weight.detach(), module.bias.detach()  # type: ignore[union-attr, return-value]

    mixer, short = block.mixer, block.mixer.short
    return LayerWeights(
        norm1=pair(block.norm1),
        in_proj=pair(mixer.in_proj),
        short=(short.weight.detach()[:, 0], short.bias.detach()),
        out_proj=pair(mixer.out_proj),
        norm2=pair(block.norm2),
        fc1=pair(block.mlp.fc1),
        fc2=pair(block.mlp.fc2),
    )


def _fused_step(model: LanguageModel, stack: Stack) -> HyenaStep:
    layers = [layer_weights(block) for block in model.blocks]
    return HyenaStep(layers, model.config.order, model.config.norm_eps, stack.diagonal)
