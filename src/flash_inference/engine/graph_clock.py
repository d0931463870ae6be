"""What runs on one GPU between a host's choices: graphs of 16 positions, and large tiles in chunks beside them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flash_inference.models.gpu import GRAPH, AnyStep, GpuDecoder, GpuRun, positions
from flash_inference.tiling import Rectangle, Relaxed
from flash_inference.tiling.schedule import Chunk, Schedule

AHEAD = 8
"""Graphs that the host may launch before it has seen their tokens."""


class GraphClock:
    """The clock of a run, moved on 16 positions at a time: `launch` runs a graph, and what tiles are due beside it.

    Without graphs, kernels are launched one by one; `mixing=False` leaves the tiles out. `schedule.forced` counts
    chunks that ran only because they were due, `late` those handed over at the very boundary that needs them. On a CPU,
    where tests run, all happens in the order of the calls.
    """

    def __init__(
        self, decoder: GpuDecoder, run: GpuRun, step: AnyStep, span: int | None, *, graphs: bool = True,
        mixing: bool = True, draw: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.decoder, self.run, self.step, self.span = decoder, run, step, span
        self.batch, self.device = run.batch, decoder.device
        self.graphs, self.draw = graphs, draw
        self.mixing = mixing and decoder.channels > 0
        self.groups = decoder.groups(span)
        self.tiling = self.groups.tilings[0] if decoder.bounded else Relaxed(span)
        self.pricing, self.schedule = decoder.pricing, Schedule(GRAPH)
        self.launched = self.late = 0
        self._captured: dict[Any, torch.cuda.CUDAGraph] = {}
        self._ends: list[tuple[int, Any]] = []
        self._paced: deque[Any] = deque()
        self.cuda = self.device.type == "cuda"
        self.main: Any = decoder.main if self.cuda else None
        self.back: Any = decoder.back if self.cuda else None

    def on(self, stream: str) -> AbstractContextManager[Any]:
        """Launches on that stream of the device: "main", "back"."""
        return torch.cuda.stream(getattr(self, stream)) if self.cuda else nullcontext()

    def close(self) -> None:
        """Waits for what the device still does on this sequence's memory."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def pace(self) -> None:
        """Waits until no more than AHEAD graphs are in flight, for callers who do not read the tokens."""
        self._paced.append(self.main.record_event())
        if len(self._paced) > AHEAD:
            self._paced.popleft().synchronize()

    def launch(self) -> None:
        """Releases the chunks of this boundary, launches the next 16 positions, and the square behind them."""
        n = self.launched * GRAPH
        with self.on("main"):
            self._boundary(n)
            if self.graphs and self.cuda:
                self._sixteen().replay()
            else:
                positions(self.decoder, self.step, self.run, self.draw)
            self._behind(n + GRAPH)
        self.launched += 1

    def _behind(self, n: int) -> None:
        """Pays the square that is due at once when n positions are known: behind the last graph, before the next."""
        side = self._side(n)
        if side:
            self.decoder.pay_square(self.run, side)

    def _side(self, n: int) -> int:
        """The side of the square that is paid at once when n positions behind the prompt are known; 0 for none."""
        if not self.mixing or (self.span is not None and n >= self.span):
            return 0
        sides = [len(tile.sources) for tile in self.tiling.after(n - 1) if not tile.slack]
        return max((side for side in sides if side <= self.decoder.near_side), default=0)

    def _chunks(self, n: int) -> list[Chunk]:
        """The chunks of the large tiles that become ready when n positions are known."""
        tiles = self.groups.after(n) if self.mixing else ()
        cut, least = self.pricing.cut, self.decoder.least
        return [chunk for size, tile, some in tiles for chunk in cut(size, tile, some, GRAPH, self.batch, least(size))]

    def _large(self, n: int) -> list[Rectangle]:
        """The large Relaxed squares that become ready when n positions are known."""
        if n <= 0 or not self.mixing:
            return []
        return [tile for tile in self.tiling.after(n - 1) if len(tile.sources) > self.decoder.near_side]

    def _boundary(self, n: int) -> None:
        """Hands chunks to the background stream, and makes the next graph wait for what it will read."""
        if not self.decoder.bounded:
            for tile in self._large(n):
                self._pay_square(tile)
            return
        chunks = self._chunks(n)
        if chunks or self.schedule:
            self._follow()
        self.schedule.add(chunks)
        released = self.schedule.release(n)
        if released:
            self.late += sum(chunk.due <= n for chunk in released)
            with self.on("back"):
                for chunk in released:
                    self._pay(chunk)
            self._ends_by(min(chunk.due for chunk in released))
        due = [i for i, (when, _) in enumerate(self._ends) if when <= n]
        if due:
            self.main.wait_event(self._ends[due[-1]][1])
            del self._ends[: due[-1] + 1]

    def _follow(self) -> None:
        """What is handed to the background stream from now on comes behind all that the main one has."""
        if self.cuda:
            self.back.wait_event(self.main.record_event())

    def _ends_by(self, n: int) -> None:
        """What the background stream has so far is done before position n is launched."""
        if self.cuda:
            self._ends.append((n, self.back.record_event()))

    def _pay(self, chunk: Chunk) -> None:
        rows = self.run.history[self.run.lead :]
        fft, scratch = self.decoder.ffts[chunk.size], self.run.scratch
        fft.pay(rows, chunk.sources, chunk.targets, chunk.channels, self.batch, scratch=scratch)

    def _pay_square(self, tile: Rectangle) -> None:
        """A Relaxed square at once."""
        rows, fft = self.run.history[self.run.lead :], self.decoder.ffts[len(tile.sources)]
        for some in self.decoder.pieces(self.batch):
            fft.pay(rows, tile.sources, tile.targets, some, self.batch, scratch=self.run.scratch)

    def _sixteen(self) -> torch.cuda.CUDAGraph:
        return self._graph(self.draw, lambda: positions(self.decoder, self.step, self.run, self.draw))

    def _graph(self, key: Any, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph of an offset, or of all with the same choice: captured when first used."""
        if key not in self._captured:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.main):
                launch()
            self._captured[key] = graph
            self.decoder.hold(self.batch)
        return self._captured[key]
