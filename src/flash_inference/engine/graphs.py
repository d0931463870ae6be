"""The loop on one GPU: graphs of 16 positions, large tiles in chunks beside them, no host synchronisation."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from flash_inference.engine.sampling import DeviceSampler, Sampler
from flash_inference.errors import LengthError, NumericsError, TilingError
from flash_inference.models.gpu import GRAPH, GpuDecoder, positions
from flash_inference.ops.tile_conv.triton import tile_rows
from flash_inference.tiling import Rectangle, Relaxed, Separated, Tiling
from flash_inference.tiling.schedule import Chunk, Schedule

AHEAD = 8
"""Graphs that the host may launch before it has seen their tokens."""


class GpuLoop:
    """One sequence in flight: iterate over its tokens, or give each one by `advance`.

    `draw` makes a token [1] from logits [V] on the device, in what a graph can capture; None takes the largest.
    `mixing=False` leaves the tiles out: the same work without them, for measurements. `schedule.forced` counts chunks
    that ran only because they were due.
    """

    def __init__(
        self, decoder: GpuDecoder, prompt: Tensor, new: int, *, graphs: bool = True, mixing: bool = True,
        draw: Callable[[Tensor], Tensor] | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        if len(prompt) + new - 1 > decoder.length:
            raise LengthError(
                f"a prompt of {len(prompt)} and {new} new tokens need {len(prompt) + new - 1} positions; "
                f"the decoder has {decoder.length}. Shorten the prompt, or ask for fewer new tokens."
            )
        self.decoder, self.new, self.graphs, self.mixing = decoder, new, graphs, mixing
        self.device = decoder.device
        self.run = decoder.init(len(prompt), max(new - 1, 1))
        logits = decoder.prefill(self.run, prompt.to(self.device))
        if not torch.isfinite(logits.max()):
            raise NumericsError("the logits after the prompt are not finite. Check the weights and the filter.")
        self.step, self.draw, self.generator = decoder.step.fork(), draw, generator
        self.logits = logits
        self.first = int(logits.argmax() if draw is None else draw(logits))
        self._embed(self.first)
        span = self.run.rows - self.run.lead
        self.tiling = Separated(span, near=decoder.near_side, block=GRAPH) if decoder.bounded else Relaxed(span)
        self.pricing, self.schedule = decoder.pricing, Schedule(GRAPH)
        self.count = span // GRAPH
        self.launched = self.position = 0
        self.late = 0
        self._captured: dict[int, torch.cuda.CUDAGraph] = {}
        if self.device.type == "cuda":
            self.main, self.side, self.back = decoder.main, decoder.side, decoder.back
            self._ends: list[tuple[int, Any]] = []
            self._paced: deque[Any] = deque()
            torch.cuda.synchronize()

    def _embed(self, token: int) -> None:
        self.step.x.copy_(self.decoder.exact.embedding.weight[token])

    def advance(self, token: int) -> Tensor:
        """The logits [V] behind one more position, whose token the caller chose: for choices made on the host."""
        n, offset = divmod(self.position, GRAPH)
        self.position += 1
        run, stream = self.run, torch.cuda.stream(self.main) if self.device.type == "cuda" else nullcontext()
        with stream:
            if not offset:
                (self._boundary if self.device.type == "cuda" else self._boundary_now)(n * GRAPH)
            self._embed(token)
            last = offset + 1 == GRAPH
            side = self._side((n + 1) * GRAPH) if last else 0
            self.step.forward(run.history, run.pending, run.clock, offset)
            if side:
                tile_rows(
                    run.history, self.decoder.near, range(GRAPH - side, GRAPH), range(GRAPH, GRAPH + side), run.clock
                )
            if last:
                run.clock += GRAPH
            return self.step.logits.cpu()

    def close(self) -> None:
        """Waits for what the device still does on this sequence's memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare(self) -> None:
        """Captures every graph that the run will replay; otherwise each is captured when it is first needed."""
        if self.device.type == "cuda" and self.graphs:
            with torch.cuda.stream(self.main):
                for side in sorted({self._side(n * GRAPH) for n in range(1, self.count + 1)}):
                    self._graph(side)

    def pace(self) -> None:
        """Waits until no more than AHEAD graphs are in flight, for callers who do not read the tokens."""
        self._paced.append(self.main.record_event())
        if len(self._paced) > AHEAD:
            self._paced.popleft().synchronize()

    def __iter__(self) -> Iterator[int]:
        """The tokens, as the device makes them.

        Python's garbage collector leaves what exists at the start alone until the end: one full collection of all that
        the imports have made stops the host for a third of a second, and the device with it.
        """
        freeze = gc.get_freeze_count() == 0
        if freeze:
            gc.freeze()
        try:
            yield from self._tokens()
        finally:
            if freeze:
                gc.unfreeze()
            self.close()

    def _tokens(self) -> Iterator[int]:
        yield self.first
        log = self.run.host_tokens.numpy()
        lead = self.run.lead
        for index in range(self.new - 1):
            while self.launched < min(self.count, index // GRAPH + AHEAD):
                self.launch()
            spins = 0
            while log[lead + index] == -1:
                spins += 1
                if spins % 10_000 == 0:
                    self.main.query()  # raises if the device has failed
                time.sleep(0)
            token = int(log[lead + index])
            if token == -2:
                raise NumericsError(
                    f"the logits behind position {index} after the prompt are not finite. Check the weights and the "
                    "filter for NaN or overflow."
                )
            yield token

    def launch(self) -> None:
        """Releases the chunks of this boundary and launches the next graph."""
        n = self.launched * GRAPH
        if self.device.type != "cuda":
            self._boundary_now(n)
            positions(self.decoder, self.step, self.run, self._side(n + GRAPH), None, self.draw)
        else:
            with torch.cuda.stream(self.main):
                if self.mixing:
                    self._boundary(n)
                side = self._side(n + GRAPH)
                if self.graphs:
                    self._graph(side).replay()
                else:
                    positions(self.decoder, self.step, self.run, side, self.side, self.draw)
        self.launched += 1

    def _side(self, n: int) -> int:
        """The side of the square that is paid at once when n positions behind the prompt are known; 0 for none."""
        if not self.mixing or n >= self.run.rows - self.run.lead:
            return 0
        sides = [len(tile.sources) for tile in self.tiling.after(n - 1) if not tile.slack]
        return max((side for side in sides if side <= self.decoder.near_side), default=0)

    def _large(self, n: int) -> list[Rectangle]:
        """The large tiles that become ready when n positions are known."""
        if n <= 0 or not self.mixing:
            return []
        if self.decoder.bounded:
            return [tile for tile in self.tiling.after(n - 1) if tile.slack]
        return [tile for tile in self.tiling.after(n - 1) if len(tile.sources) > self.decoder.near_side]

    def _boundary_now(self, n: int) -> None:
        for tile in self._large(n):
            if self.decoder.bounded:
                for chunk in self.pricing.cut(tile, self.decoder.channels, GRAPH):
                    self._pay(chunk)
            else:
                self._pay_square(tile)

    def _boundary(self, n: int) -> None:
        """Hands chunks to the background stream, and makes the next graph wait for what it will read.

        `late` counts chunks that were handed over at the very boundary that needs them.
        """
        large = self._large(n)
        if not self.decoder.bounded:
            for tile in large:
                self._pay_square(tile)
            return
        if large or self.schedule:
            self.back.wait_event(self.main.record_event())
        for tile in large:
            self.schedule.add(self.pricing.cut(tile, self.decoder.channels, GRAPH))
        released = self.schedule.release(n)
        if released:
            self.late += sum(chunk.due <= n for chunk in released)
            with torch.cuda.stream(self.back):
                for chunk in released:
                    self._pay(chunk)
            self._ends.append((min(chunk.due for chunk in released), self.back.record_event()))
        due = [i for i, (when, _) in enumerate(self._ends) if when <= n]
        if due:
            self.main.wait_event(self._ends[due[-1]][1])
            del self._ends[: due[-1] + 1]

    def _pay(self, chunk: Chunk) -> None:
        rows = self.run.history[self.run.lead :]
        self.decoder.ffts[chunk.size].pay(rows, chunk.row, chunk.blocks, chunk.targets, chunk.channels)

    def _pay_square(self, tile: Rectangle) -> None:
        """A Relaxed square at once, a layer at a time: smaller workspace at hardly any cost."""
        fft = self.decoder.ffts[len(tile.sources)]
        width = self.decoder.config.width
        for c in range(0, self.decoder.channels, width):
            cut = range(c, min(c + width, self.decoder.channels))
            fft.pay(self.run.history[self.run.lead :], tile.sources.stop, 1, tile.targets, cut)

    def _graph(self, side: int) -> torch.cuda.CUDAGraph:
        if side not in self._captured:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            if self.generator is not None:
                graph.register_generator_state(self.generator)  # pyright: ignore[reportUnknownMemberType]
            with torch.cuda.graph(graph, stream=self.main):
                positions(self.decoder, self.step, self.run, side, self.side, self.draw)
            self._captured[side] = graph
        return self._captured[side]


def decode_gpu(
    decoder: GpuDecoder, prompt: Tensor, choose: Callable[[Tensor], Tensor], max_new_tokens: int, tiling: Tiling | None
) -> Iterator[Tensor]:
    """As `decode`, for choices made on the host: kernels are launched one by one, and rows run one after another."""
    check_gpu_tiling(tiling)
    loops = [GpuLoop(decoder, row, max_new_tokens) for row in prompt]
    try:
        tokens = choose(torch.stack([loop.logits.cpu() for loop in loops]))
        yield tokens
        for _ in range(max_new_tokens - 1):
            tokens = choose(torch.stack([loop.advance(int(t)) for loop, t in zip(loops, tokens, strict=True)]))
            yield tokens
    finally:
        for loop in loops:
            loop.close()


def stream_gpu(
    decoder: GpuDecoder, prompt: Tensor, sampler: Sampler, max_new_tokens: int, tiling: Tiling | None
) -> Iterator[Tensor]:
    """Tokens [1] of one row, chosen on the device inside the graphs."""
    check_gpu_tiling(tiling)
    draw = None if sampler.sampling.plain else DeviceSampler(sampler, decoder.config.vocab_size, decoder.device)
    loop = GpuLoop(
        decoder, prompt[0], max_new_tokens, draw=None if draw is None else draw.draw,
        generator=None if draw is None else draw.generator,
    )  # fmt: skip
    return (torch.tensor([token]) for token in loop)


def check_gpu_tiling(tiling: Tiling | None) -> None:
    """Raises TilingError for tilings that have no graphs."""
    if tiling is not None and not isinstance(tiling, Relaxed):
        raise TilingError(f"got {tiling!r}; on a GPU generation runs on its own bounded tiling (None) or on Relaxed.")
