"""The loop on one GPU: graphs of 16 positions, large tiles in chunks beside them, no host synchronisation."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from flash_inference.engine.plan_gpu import check_gpu_tiling
from flash_inference.engine.sampling import DeviceSampler, Sampler
from flash_inference.errors import LengthError, NumericsError
from flash_inference.models.gpu import GRAPH, GpuDecoder, positions
from flash_inference.tiling import Rectangle, Relaxed, Tiling
from flash_inference.tiling.schedule import Chunk, Schedule

AHEAD = 8
"""Graphs that the host may launch before it has seen their tokens."""


class GpuLoop:
    """Sequences in flight: iterate over their tokens, or give each by `advance`.

    prompt [P] is one sequence, whose tokens are ints; prompts [B, P], or a list of B rows of any lengths, are a batch
    on one clock, whose tokens are arrays [B]. `draw` makes tokens [B] from logits [B, V] on the device, in what a graph
    can capture; None takes the largest. `mixing=False` leaves the tiles out: the same work without them, for
    measurements. `schedule.forced` counts chunks that ran only because they were due.
    """

    def __init__(
        self, decoder: GpuDecoder, prompt: Tensor | list[Tensor], new: int, *, graphs: bool = True, mixing: bool = True,
        draw: Callable[[Tensor], Tensor] | None = None, generators: Sequence[torch.Generator] = (),
    ) -> None:  # fmt: skip
        self.single = isinstance(prompt, Tensor) and prompt.ndim == 1
        prompts: list[Tensor] = [prompt] if isinstance(prompt, Tensor) and self.single else list(prompt)
        longest, self.batch = max(len(row) for row in prompts), len(prompts)
        if longest + new - 1 > decoder.length:
            raise LengthError(
                f"a prompt of {longest} and {new} new tokens need {longest + new - 1} positions; "
                f"the decoder has {decoder.length}. Shorten the prompt, or ask for fewer new tokens."
            )
        self.decoder, self.new, self.graphs = decoder, new, graphs
        self.mixing = mixing and decoder.channels > 0
        self.device = decoder.device
        self.step, self.draw, self.generators = decoder.step_of(self.batch), draw, generators
        self.run = decoder.init(longest, max(new - 1, 1), self.batch)
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
        span = self.run.rows - self.run.lead
        self.groups = decoder.groups(span)
        self.tiling = self.groups.tilings[0] if decoder.bounded else Relaxed(span)
        self.pricing, self.schedule = decoder.pricing, Schedule(GRAPH)
        self.count = span // GRAPH
        self.launched = self.position = 0
        self.late = 0
        self._captured: dict[tuple[int | None, int], torch.cuda.CUDAGraph] = {}
        if self.device.type == "cuda":
            self.main, self.side, self.back = decoder.main, decoder.side, decoder.back
            self._ends: list[tuple[int, Any]] = []
            self._paced: deque[Any] = deque()
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
        side = self._side((n + 1) * GRAPH) if offset + 1 == GRAPH else 0
        with torch.cuda.stream(self.main) if self.device.type == "cuda" else nullcontext():
            if not offset:
                (self._boundary if self.device.type == "cuda" else self._boundary_now)(n * GRAPH)
            self.step.token.copy_(tokens)
            if self.graphs and n and self.device.type == "cuda":
                self._graph((offset, side), lambda: self._one(offset, side)).replay()
            else:
                self._one(offset, side)
            return self.step.logits.view(self.batch, -1).cpu()

    def _one(self, offset: int, side: int) -> None:
        """One position whose tokens are given: embedded by the kernel that the graphs of 16 end with, then run."""
        run, step = self.run, self.step
        step.embed(
            run.clock, run.tokens, run.host_tokens, run.stamps, offset, last=False, greedy=False, pdl=False
        )  # fmt: skip
        step.forward(run.history, run.pending, run.clock, offset)
        if side:
            self.decoder.pay_square(run, side)
        if offset + 1 == GRAPH:
            run.clock += GRAPH

    def close(self) -> None:
        """Waits for what the device still does on this sequence's memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare(self) -> None:
        """Captures every graph that the run will replay; otherwise each is captured when it is first needed."""
        if self.device.type == "cuda" and self.graphs:
            with torch.cuda.stream(self.main):
                for side in sorted({self._side(n * GRAPH) for n in range(1, self.count + 1)}):
                    self._sixteen(side)

    def pace(self) -> None:
        """Waits until no more than AHEAD graphs are in flight, for callers who do not read the tokens."""
        self._paced.append(self.main.record_event())
        if len(self._paced) > AHEAD:
            self._paced.popleft().synchronize()

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
                    self._sixteen(side).replay()
                else:
                    positions(self.decoder, self.step, self.run, side, self.side, self.draw)
        self.launched += 1

    def _side(self, n: int) -> int:
        """The side of the square that is paid at once when n positions behind the prompt are known; 0 for none."""
        if not self.mixing or n >= self.run.rows - self.run.lead:
            return 0
        sides = [len(tile.sources) for tile in self.tiling.after(n - 1) if not tile.slack]
        return max((side for side in sides if side <= self.decoder.near_side), default=0)

    def _chunks(self, n: int) -> list[Chunk]:
        """The chunks of the large tiles that become ready when n positions are known."""
        tiles = self.groups.after(n) if self.mixing else ()
        cut = self.pricing.cut
        return [chunk for size, tile, some in tiles for chunk in cut(size, tile, some, GRAPH, self.batch)]

    def _large(self, n: int) -> list[Rectangle]:
        """The large Relaxed squares that become ready when n positions are known."""
        if n <= 0 or not self.mixing:
            return []
        return [tile for tile in self.tiling.after(n - 1) if len(tile.sources) > self.decoder.near_side]

    def _boundary_now(self, n: int) -> None:
        if self.decoder.bounded:
            for chunk in self._chunks(n):
                self._pay(chunk)
        else:
            for tile in self._large(n):
                self._pay_square(tile)

    def _boundary(self, n: int) -> None:
        """Hands chunks to the background stream, and makes the next graph wait for what it will read.

        `late` counts chunks that were handed over at the very boundary that needs them.
        """
        if not self.decoder.bounded:
            self._boundary_now(n)
            return
        chunks = self._chunks(n)
        if chunks or self.schedule:
            self.back.wait_event(self.main.record_event())
        self.schedule.add(chunks)
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
        self.decoder.ffts[chunk.size].pay(rows, chunk.sources, chunk.targets, chunk.channels, self.batch)

    def _pay_square(self, tile: Rectangle) -> None:
        """A Relaxed square at once."""
        rows, fft = self.run.history[self.run.lead :], self.decoder.ffts[len(tile.sources)]
        for some in self.decoder.pieces(self.batch):
            fft.pay(rows, tile.sources, tile.targets, some, self.batch)

    def _sixteen(self, side: int) -> torch.cuda.CUDAGraph:
        return self._graph(
            (None, side), lambda: positions(self.decoder, self.step, self.run, side, self.side, self.draw)
        )

    def _graph(self, key: tuple[int | None, int], launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph of an offset (None: all of them) and the side behind it, captured when it is first asked for."""
        if key not in self._captured:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                graph.register_generator_state(generator)  # pyright: ignore[reportUnknownMemberType]
            with torch.cuda.graph(graph, stream=self.main):
                launch()
            self._captured[key] = graph
        return self._captured[key]


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
    draw = None if sampler.sampling.plain else DeviceSampler(sampler, decoder.config.vocab_size, decoder.device)
    loop = GpuLoop(
        decoder, prompt, max_new_tokens, draw=None if draw is None else draw.draw,
        generators=() if draw is None else draw.generators,
    )  # fmt: skip
    return (torch.as_tensor(tokens.copy()) for tokens in loop)
