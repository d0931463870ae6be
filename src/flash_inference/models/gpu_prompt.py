"""Prompts read on a GPU by one launch each, so that the host goes on serving the rows that run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_inference.mixers.fir import FiniteResponse
from flash_inference.mixers.mixer import Moment, place
from flash_inference.mixers.short_conv import ShortConv
from flash_inference.models.block import BlockPast
from flash_inference.models.decoder import Decoder, ModelState
from flash_inference.models.gpu_memory import GRAPH, READ
from flash_inference.ops.tile_conv.triangle import triangle_conv

if TYPE_CHECKING:
    from flash_inference.models.backbone import LanguageModel


class PromptReader(Decoder):
    """A Decoder that takes in the first READ positions of a sequence by a captured graph: what `extend` does otherwise.

    There are graphs of 2^q and 3 * 2^q positions; a prompt stands at the beginning of one. Behind it the inputs of the
    convolutions are zero, and what the mixers keep is made anew from the last inputs that entered them before: so a
    prompt's numbers do not depend on what was read by the same graph. Models whose mixers reach back further than a few
    taps, several rows, and pieces that begin later run as in any Decoder. Tokens have been checked by the caller: a
    graph asks the device nothing. On a CPU, where tests run, the same is computed without graphs.
    """

    def __init__(self, model: LanguageModel, length: int) -> None:
        super().__init__(model, length)
        mixers = [mixer for block in model.blocks for mixer in block.mixers]
        short = all(isinstance(mixer, ShortConv | FiniteResponse) for mixer in mixers)
        most = min(READ, length) if self.stack and short else 0
        steps = [base << q for q in range(most.bit_length()) for base in (GRAPH, GRAPH * 3 // 2)]
        self.sizes = [size for size in steps if size < most] + ([most] if most else [])
        weight, channels = model.embedding.weight, self.stack.filter.channels if self.stack else 0
        with torch.inference_mode(False):
            self._tokens = torch.zeros(1, most, dtype=torch.long, device=weight.device)
            self._count = torch.ones(1, dtype=torch.long, device=weight.device)
            like = torch.empty(0) if self.stack is None else self.stack.filter.rho
            self._inputs = like.new_zeros(channels, most)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, list[Any]]]] = {}

    @torch.no_grad()
    def prepare(self) -> None:
        """Captures every graph on the current stream."""
        pool = None
        for size in self.sizes if self._tokens.is_cuda else ():
            self._read(size)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                made = self._read(size)
            pool = graph.pool()
            self._graphs[size] = graph, made

    @torch.no_grad()
    def extend(self, state: ModelState, tokens: Tensor, *, every: bool = False) -> Tensor:
        """As Decoder.extend; the first piece of one sequence, if it is no longer than READ, by a graph."""
        n = tokens.shape[1]
        size = next((size for size in self.sizes if n <= size), None)
        if size is None or every or state.clock or len(tokens) > 1 or not n:
            return super().extend(state, tokens, every=every)
        assert self.stack is not None
        assert state.stack is not None
        self._tokens.zero_()
        self._tokens[:, :n] = tokens
        self._count.fill_(n)
        if size in self._graphs:
            graph, (logits, pasts) = self._graphs[size]
            graph.replay()
        else:
            logits, pasts = self._read(size)
        for t, column in self.stack.columns(state.stack, range(n), slice(None), False, state.stack.inputs):
            column[:, 0] = self._inputs[:, t : t + len(column)].T
        self.stack.commit(state.stack, n)
        own = [past for of_block in state.pasts for past in of_block]
        for mine, theirs in zip(own, pasts, strict=True):
            place(mine, 0, theirs)
        state.clock += n
        return logits.clone()

    def _read(self, size: int) -> tuple[Tensor, list[Any]]:
        """The logits [1, V] behind the last of `_count` tokens, and each mixer's past there; fills `_inputs`."""
        model, entered, mixers = self.model, list[tuple[Any, Tensor]](), list[tuple[Any, Any]]()
        known = torch.arange(size, device=self._count.device) < self._count
        moment, x = Moment(0, entered=entered), model.embedding(self._tokens[:, :size])
        for index, block in enumerate(model.blocks):
            pasts = [mixer.init(1, size) for mixer in block.mixers]
            mixers += zip(block.mixers, pasts, strict=True)
            x = block.extend(x, BlockPast(pasts, moment, partial(self._causal, known, self.first[index])))
        logits = model.head(model.norm(x.index_select(1, self._count - 1)[:, 0]))
        given = {id(past): u for past, u in entered}
        return logits, [self._past(mixer, given[id(past)]) for mixer, past in mixers]

    def _causal(self, known: Tensor, first: int, o: int, y: Tensor) -> Tensor:
        """A convolution of y [1, N, D] from an empty past, inputs behind the prompt being zero."""
        assert self.stack is not None
        lanes, inputs = self.stack.lanes[first + o], self._inputs[:, : y.shape[1]]
        inputs[lanes] = torch.where(known[:, None], y[0], 0).T
        given = inputs[lanes].T[:, None]
        z = self.stack.skip[lanes] * given
        triangle_conv(given, self.stack.filter, out=z, channels=lanes)
        return z.transpose(0, 1).to(y.dtype)

    def _past(self, mixer: Any, x: Tensor) -> Any:
        """What a mixer keeps behind the prompt: as if only its last inputs had entered, zeros before the first."""
        past, reach = mixer.init(1, x.shape[1]), mixer.taps - 1
        if reach:
            at = self._count - reach + torch.arange(reach, device=x.device)
            recent = x.index_select(1, at.clamp(min=0))
            mixer.extend(past, torch.where((at >= 0)[:, None], recent, 0), Moment(0))
        return past
