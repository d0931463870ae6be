"""How positions of any model run on a GPU: by its own modules, in what a graph can hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_inference.mixers.mixer import Clocked, Moment, place, tensors
from flash_inference.models.block import BlockPast
from flash_inference.models.fused import unfused
from flash_inference.ops.decode_step.triton import Step
from flash_inference.ops.decode_step.triton_log import log_tokens
from flash_inference.ops.tile_conv.triton import mix_rows

if TYPE_CHECKING:
    from flash_inference.models.backbone import LanguageModel
    from flash_inference.models.gpu import GpuRun


def unreplayed(model: LanguageModel) -> str | None:
    """Why no graph can hold a model's step, in a line; None if one can."""
    if unfused(model) is None:
        return None
    for i, block in enumerate(model.blocks):
        for mixer in block.mixers:
            if not getattr(mixer, "replays", False):
                return f"block {i} has a {type(mixer).__name__}, which does not say that it can be captured (`replays`)"
    return None


@dataclass
class Pasts:
    """What the mixers keep of a batch: `mixers[i][j]` is the past of block i's mixer j; row b begins at `start[b]`.

    Starts count on a clock that is never set back: the run's own and `turned` [1], by how much that has been.
    """

    mixers: list[list[Any]]
    start: Tensor
    turned: Tensor


class ModuleStep(Step):
    """One position of `batch` sequences through embedding, blocks, norm and head, in the model's dtype.

    All of it are operations on the device, at fixed addresses; rows of long convolutions are read and written by one
    kernel (`mix_rows`). x [B, D], logits [B, V] in float32 at least, token [B]. `lanes[i][o]` are the channels of block
    i's convolution o. Other layers launch what PyTorch launches for them.
    """

    pdl = False

    def __init__(
        self, model: LanguageModel, lanes: list[list[range]], *, batch: int, near: Tensor, diagonal: Tensor, block: int
    ) -> None:
        self.model, self.lanes, self.batch = model, lanes, batch
        self.near, self.diagonal, self.block = near, diagonal, block
        self._scratch()

    def _scratch(self) -> None:
        weight = self.model.embedding.weight
        self.x = weight.new_zeros(self.batch, weight.shape[1])
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.logits = weight.new_zeros(self.batch, self.model.head.out_features, dtype=dtype)
        self.token = torch.zeros(self.batch, dtype=torch.long, device=weight.device)

    def start(self, rows: Tensor) -> None:
        """Puts embeddings [B, D] where the next position reads them."""
        self.x.copy_(rows)

    @torch.no_grad()
    def forward(self, history: Tensor, pending: Any, clock: Tensor, offset: int) -> None:
        """x -> logits, the mixers' rows written and their pasts advanced. history [rows, C B]."""
        x, moment = self.x[:, None], Moment(clock[:1] + pending.turned + offset, pending.start)
        for number, (block, pasts) in enumerate(zip(self.model.blocks, pending.mixers, strict=True)):
            mix = partial(self._mix, history, clock, offset, self.lanes[number])
            x = block.extend(x, BlockPast(pasts, moment, mix))
        self.logits.copy_(self.model.head(self.model.norm(x))[:, 0])

    def _mix(self, history: Tensor, clock: Tensor, offset: int, lanes: list[range], o: int, y: Tensor) -> Tensor:
        z = mix_rows(history, self.near, self.diagonal, y[:, 0], clock, offset, lanes[o].start, self.block)
        return z[:, None]

    @torch.no_grad()
    def embed(
        self, clock: Tensor, tokens: Tensor, host_tokens: Tensor, stamps: Tensor, offset: int, *, last: bool,
        greedy: bool, pdl: bool,
    ) -> None:  # fmt: skip
        """Chooses every row's token, or takes those drawn, and embeds them."""
        if greedy:
            best = self.logits.max(-1)
            self.token.copy_(torch.where(best.values.isfinite(), best.indices, -2))
        log_tokens(self.token, clock, tokens, host_tokens, stamps, offset, self.block if last else 0)
        self.x.copy_(self.model.embedding(self.token))


class ModuleSteps:
    """The steps of a model by its modules, and the mixers' pasts beside the history."""

    def __init__(
        self, model: LanguageModel, lanes: list[list[range]], *, near: Tensor, diagonal: Tensor, block: int
    ) -> None:
        self.model = model
        self._step = partial(ModuleStep, model, lanes, near=near, diagonal=diagonal, block=block)

    def make(self, batch: int, shapes: object = None) -> ModuleStep:
        """The step of a batch of sequences."""
        return self._step(batch=batch)

    def pending(self, batch: int, rows: int) -> Pasts:
        """Empty pasts, with room for `rows` positions; rows of the batch begin at clock 0."""
        with torch.inference_mode(False), torch.no_grad():
            pasts = [[mixer.init(batch, rows) for mixer in block.mixers] for block in self.model.blocks]
            zeros = torch.zeros(batch + 1, dtype=torch.long, device=self.model.embedding.weight.device)
            return Pasts(pasts, zeros[:batch], zeros[batch:])

    def keep(self, run: GpuRun, row: int, pasts: list[list[Any]], prompt: int, clock: int) -> None:
        """Puts a row's pasts in their places, as if its prompt had ended at `clock`."""
        run.pending.start[row] = clock - prompt
        for block, ours, theirs in zip(self.model.blocks, run.pending.mixers, pasts, strict=True):
            for mixer, own, past in zip(block.mixers, ours, theirs, strict=True):
                if isinstance(mixer, Clocked):
                    past = mixer.moved(past, range(prompt), clock, run.room)
                place(own, row, past)

    def repeat(self, run: GpuRun, twin: int, row: int) -> None:
        """Gives a row the pasts of another."""
        run.pending.start[row] = run.pending.start[twin]
        for past in (past for pasts in run.pending.mixers for past in pasts):
            for tensor in tensors(past).values():
                tensor[row] = tensor[twin]

    def turn(self, run: GpuRun, by: int) -> None:
        """Time goes on for the pasts."""
        run.pending.turned += by
