"""The loop on one GPU: graphs of 16 positions, large tiles in chunks beside them, no host synchronisation."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_inference.engine.device_sampling import DeviceSampler, cuts
from flash_inference.engine.graph_clock import AHEAD, GraphClock
from flash_inference.engine.plan_gpu import check_gpu_tiling
from flash_inference.engine.sampling import Sampler
from flash_inference.errors import LengthError, NumericsError
from flash_inference.models.gpu import GRAPH, GpuDecoder
from flash_inference.tiling import Tiling

FAR_AHEAD = 2 * AHEAD
"""Graphs that are launched while the host waits for a token: where others hold its core for longer, steps stall."""


class GpuLoop(GraphClock):
    """Sequences in flight that began together: iterate over their tokens, or give each by `advance`.

    prompt [P] is one sequence, whose tokens are ints; prompts [B, P], or a list of B rows of any lengths, are a batch
    on one clock, whose tokens are arrays [B]. `draw` makes tokens [B] from logits [B, V] on the device, in what a graph
    can capture; None takes the largest. `mixing=False` leaves the tiles out: the same work without them, for
    measurements.
    """

    def __init__(
        self, decoder: GpuDecoder, prompt: Tensor | list[Tensor], new: int, *, graphs: bool = True, mixing: bool = True,
        draw: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.single = isinstance(prompt, Tensor) and prompt.ndim == 1
        prompts: list[Tensor] = [prompt] if isinstance(prompt, Tensor) and self.single else list(prompt)
        longest, batch = max(len(row) for row in prompts), len(prompts)
        if longest + new - 1 > decoder.length:
            raise LengthError(
                f"a prompt of {longest} and {new} new tokens need {longest + new - 1} positions; "
                f"the decoder has {decoder.length}. Shorten the prompt, or ask for fewer new tokens."
            )
        run = decoder.init(longest, max(new - 1, 1), batch)
        super().__init__(
            decoder, run, decoder.step_of(batch), run.rows - run.lead, graphs=graphs, mixing=mixing, draw=draw,
        )  # fmt: skip
        self.new, self.count, self.position = new, (run.rows - run.lead) // GRAPH, 0
        self.logits = self._prefill(prompts)
        finite = torch.isfinite(self.logits.max(-1).values)
        if not finite.all():
            raise NumericsError(
                f"the logits after the prompt of row {int((~finite).nonzero()[0])} are not finite. "
                "Check the weights and the filter."
            )
        first = self.logits.argmax(-1) if draw is None else draw(self.logits)
        self.first = first.cpu().numpy()
        self._embed(first)
        if self.cuda:
            torch.cuda.synchronize()

    def _prefill(self, prompts: list[Tensor]) -> Tensor:
        """The logits [B, V] behind the prompts. A prompt that several rows share is read once."""
        run, logits = self.run, list[Tensor]()
        seen: dict[tuple[int, ...], int] = {}
        for row, prompt in enumerate(prompts):
            twin = seen.setdefault(tuple(int(token) for token in prompt), row)
            if twin == row:
                logits.append(self.decoder.prefill(run, prompt.to(self.device), row))
            else:
                self.decoder.repeat(run, twin, row)
                logits.append(logits[twin])
        return torch.stack(logits)

    def _embed(self, tokens: Tensor) -> None:
        self.step.start(self.decoder.exact.embedding(tokens))

    def advance(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] behind one more position, whose tokens [B] the caller chose: for choices on the host.

        Each position of a block of 16 is a graph of its own. The first block is launched kernel by kernel, so that all
        are loaded when the second captures them: short runs capture nothing.
        """
        n, offset = divmod(self.position, GRAPH)
        self.position += 1
        with self.on("main"):
            if not offset:
                self._boundary(n * GRAPH)
            self.step.token.copy_(tokens)
            if self.graphs and n and self.cuda:
                self._graph(offset, lambda: self._one(offset)).replay()
            else:
                self._one(offset)
            if offset + 1 == GRAPH:
                self._behind((n + 1) * GRAPH)
            return self.step.logits.view(self.batch, -1).cpu()

    def _one(self, offset: int) -> None:
        """One position whose tokens are given: embedded by the kernel that the graphs of 16 end with, then run."""
        run, step = self.run, self.step
        step.embed(
            run.clock, run.tokens, run.host_tokens, run.stamps, offset, last=False, greedy=False, pdl=False
        )  # fmt: skip
        step.forward(run.history, run.pending, run.clock, offset)
        if offset + 1 == GRAPH:
            # The second number says where the block began.
            run.clock[:1] += GRAPH
            run.clock[2:] += GRAPH

    def prepare(self) -> None:
        """Captures the graph that the run will replay; otherwise it is captured when it is first needed."""
        if self.cuda and self.graphs:
            with self.on("main"):
                self._sixteen()

    def __iter__(self) -> Iterator[Any]:
        """The tokens, as the device makes them.

        Python's garbage collector leaves what exists at the start alone until the end: one full collection of all that
        the imports have made stops the host for a third of a second, and the device with it.
        """
        freeze = gc.get_freeze_count() == 0
        if freeze:
            gc.freeze()
        try:
            for tokens in self._tokens():
                yield int(tokens[0]) if self.single else tokens
        finally:
            if freeze:
                gc.unfreeze()
            self.close()

    def _tokens(self) -> Iterator[Any]:
        yield self.first
        log = self.run.host_tokens.numpy()
        lead = self.run.lead
        for index in range(self.new - 1):
            while self.launched < min(self.count, index // GRAPH + AHEAD):
                self.launch()
            tokens, spins = log[lead + index], 0
            while tokens[0] == -1 or (tokens == -1).any():
                if self.launched < min(self.count, index // GRAPH + FAR_AHEAD):
                    self.launch()
                    continue
                spins += 1
                if spins % 10_000 == 0:
                    self.main.query()  # raises if the device has failed
                time.sleep(0)
            if tokens[0] == -2 or (not self.single and (tokens == -2).any()):
                row = int((tokens == -2).argmax())
                raise NumericsError(
                    f"the logits of row {row} behind position {index} after the prompt are not finite. Check the "
                    "weights and the filter for NaN or overflow."
                )
            yield tokens


def decode_gpu(
    decoder: GpuDecoder, prompt: Tensor, choose: Callable[[Tensor], Tensor], max_new_tokens: int, tiling: Tiling | None
) -> Iterator[Tensor]:
    """As `decode`, for choices made on the host: kernels are launched one by one."""
    check_gpu_tiling(tiling, decoder.channels)
    loop = GpuLoop(decoder, prompt, max_new_tokens)
    try:
        tokens = choose(loop.logits.cpu())
        yield tokens
        for _ in range(max_new_tokens - 1):
            tokens = choose(loop.advance(tokens))
            yield tokens
    finally:
        loop.close()


def stream_gpu(
    decoder: GpuDecoder, prompt: Tensor, sampler: Sampler, max_new_tokens: int, tiling: Tiling | None
) -> Iterator[Tensor]:
    """Tokens [B] of the rows of prompt [B, P], chosen on the device inside the graphs."""
    check_gpu_tiling(tiling, decoder.channels)
    draw = None
    if not sampler.sampling.plain:
        chooser = DeviceSampler.of(sampler, decoder.config.vocab_size, decoder.device)
        draw = partial(chooser.draw, ranked=cuts(sampler.sampling))
    loop = GpuLoop(decoder, prompt, max_new_tokens, draw=draw)
    return (torch.as_tensor(tokens.copy()) for tokens in loop)
