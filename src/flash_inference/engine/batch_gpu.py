"""The rows of an Engine on one GPU: 16 tokens for each of them a graph; they come and go between two graphs."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from flash_inference.engine.batch_host import check_slots, endless, not_finite
from flash_inference.engine.device_sampling import DeviceSampler, cuts
from flash_inference.engine.graph_clock import GraphClock
from flash_inference.engine.plan import filter_bytes
from flash_inference.engine.request import Request
from flash_inference.errors import NumericsError, StateError, TilingError
from flash_inference.mixers.mixer import tensors
from flash_inference.mixers.rows import inputs_of
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.decoder import ModelState
from flash_inference.models.gpu import GRAPH, GpuDecoder, tuned_near
from flash_inference.models.gpu_memory import READ, GpuRunShape, GpuShape, free_on, gpu_bytes
from flash_inference.models.gpu_prompt import PromptReader
from flash_inference.models.rows import row_bytes
from flash_inference.ops.tile_conv.fft_rows import TileFFT
from flash_inference.tiling import Tiling
from flash_inference.tiling.schedule import Pricing

AHEAD = 6
"""Graphs whose tokens the host may not have seen when it launches one more."""
PROMPTS = 2
"""Prompts of full length for which memory is left beside the rows."""
PRICING = Pricing(target=240.0)
"""Large chunks of tiles: each costs the host three launches, and a position of many rows takes long enough for them."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A graph that was launched: its tokens come at `first` of the log, `rows` tells (row, request, how many)."""

    done: Any
    first: int
    rows: list[tuple[int, Request, int]]


@dataclass(frozen=True, slots=True)
class Sums:
    """What a prompt owes the positions behind it [N, C], once `done`, an event of the stream that sums it."""

    owed: Tensor
    done: Any


class GpuBatch(GraphClock):
    """Rows that come and go on one clock of a GPU; `requests[row]` is who has a row.

    The history is a ring: position i of the clock is row i modulo `ring`. Tiles are those of a clock without end, for
    all rows alike (`Groups`): squares behind graphs, late squares in chunks beside them. At a multiple of the ring, the
    square falls into spare rows behind its end, which are then added to its beginning.

    **A row joins** at position n, between two graphs. What its prompt's inputs owe the positions to come was summed
    beside decoding. Then, of its column alone: what stands from n on is overwritten by those sums, what stands before
    counts as zero, and the mixers' pasts and the token take their places. This is right whatever tiles of the former
    occupant are half paid:

    - a chunk handed over before n adds to the column before it is overwritten. For such chunks add only to positions
      behind the near-block that n lies in (those that add to this one are over by now), and these are overwritten on
      the background stream, which does both in this order;
    - a chunk handed over later, of a tile that was ready before n, finds `since` of the row, and reads zeros;
    - a tile that becomes ready later has sources on both sides of n: zeros before it, the row's own inputs behind it.

    Hence position t of the row gets the prompt's share, and each input of n .. t - 1 once. What the ring holds from its
    last round is never read: a row's own positions are all overwritten as it joins. The graphs wait for nothing but
    what they touch themselves: on their own stream, n's near-block becomes zeros before n, which squares behind
    them may read, and sums behind it.

    **A row leaves** when its last graph is launched, if its limit ends it: at most 15 positions are lost. The host sees
    tokens when their graph is done, with up to AHEAD graphs behind it launched already; so a stop token, a cancel or a
    NaN costs the row up to AHEAD graphs more, whose tokens are dropped. A row that nobody has runs along.

    Tokens are chosen inside the graphs, for every row by its request's settings. There are three sets of graphs, since
    to draw costs more than to take the largest, and to draw from the most likely takes a sort.
    """

    piece = READ
    """Positions of prompts that a step reads."""

    def __init__(self, gpu: GpuDecoder, memory: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            super().__init__(gpu, gpu.open(), gpu.step_of(gpu.batch), None)
            self.reader = PromptReader(gpu.exact, gpu.length)
        self.aside: Any = torch.cuda.Stream(priority=0) if self.cuda else None
        self.ring, self.top, self.near = self.run.rows, gpu.room.top, gpu.near_side
        self.period = max(self.top, self.near)
        self.fixed = gpu.plan.total + prompt_filters(gpu.model, gpu.length, gpu.room.lives)
        self.left = memory - self.fixed
        self.chooser = DeviceSampler(gpu.batch, gpu.config.vocab_size, self.device)
        self._draws = None, partial(self.chooser.draw, ranked=False), partial(self.chooser.draw, ranked=True)
        self.requests: list[Request | None] = [None] * gpu.batch
        self._left = [0] * gpu.batch
        self._since = torch.zeros(gpu.batch, dtype=torch.long, device=self.device)
        self._flights: deque[Flight] = deque()
        self._sums: dict[int, Sums] = {}
        if self.cuda:
            torch.cuda.synchronize(self.device)
            self.prepare()

    @classmethod
    def fitted(
        cls, model: LanguageModel, slots: int, new_tokens: int, length: int, tiling: Tiling | None, memory: int | None
    ) -> GpuBatch:
        """With all that it needs in `memory` bytes, spectra in what is left. Raises PlanError, TilingError."""
        if tiling is not None:
            raise TilingError(f"got {tiling!r}; on a GPU an engine runs on its own tiling. Leave tiling out.")
        device = model.embedding.weight.device
        memory = free_on(device) if memory is None else memory
        shape = GpuShape.of(model, rows=length + 2 * GRAPH)
        near = tuned_near(device, slots, shape.channels)
        prompts = PROMPTS * (row_bytes(model, length) + 4 * shape.channels * new_tokens)
        free = memory - prompts - prompt_filters(model, length, new_tokens)
        run = GpuRunShape(length, batch=slots, near=near, lives=new_tokens, pricing=PRICING)

        def needed(slots: int) -> int:
            return gpu_bytes(shape, replace(run, batch=slots), 0).total + memory - free

        check_slots(slots, new_tokens, needed(slots), memory, bisect_right(range(1, slots), memory, key=needed))
        decoder = GpuDecoder(model, length, near=near, batch=slots, lives=new_tokens, free=free, pricing=PRICING)
        return cls(decoder, memory)

    @property
    def clock(self) -> int:
        """Positions launched: the rows' common time."""
        return self.launched * GRAPH

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        run = self.run
        return sum(t.nbytes for t in (run.history, run.tokens, run.stamps)) + run.batch * self.decoder.shape.past

    @property
    def busy(self) -> bool:
        """Whether a tick would do something."""
        return any(self.requests) or bool(self._flights)

    @property
    def running(self) -> list[Request]:
        """The requests that have a row, or tokens under way."""
        flying = [request for flight in self._flights for _, request, _ in flight.rows if not request.ended]
        return list(dict.fromkeys([request for request in self.requests if request is not None] + flying))

    def prepare(self) -> None:
        """Captures every graph, one for each way to choose tokens, and runs once what else a join runs."""
        with self.on("main"):
            for draw in self._draws:
                self.draw = draw
                self._sixteen()
            self._embed(0, 0)
        with self.reading():
            self.reader.prepare()
            if self.decoder.channels:
                self._prepare_joins()

    def _prepare_joins(self) -> None:
        """Runs what sums what prompts owe: for every length on few channels, and as it is for common lengths."""
        decoder, size, length = self.decoder, GRAPH, self.decoder.length
        nothing = torch.zeros(GRAPH, decoder.channels, device=self.device)
        while size < 2 * max(length, decoder.room.lives):
            TileFFT(size, decoder.padded).warm(nothing, min(8, decoder.channels), 1)
            size *= 2
        new = decoder.room.lives
        while new:
            decoder.owed(torch.zeros(decoder.channels, GRAPH, device=self.device), new)
            new //= 2
        prompt = 2 * GRAPH
        while prompt <= min(READ, length):
            decoder.owed(torch.zeros(decoder.channels, prompt, device=self.device), decoder.room.lives)
            prompt *= 2

    def reading(self) -> AbstractContextManager[Any]:
        """Where prompts are read: on a stream of their own, beside the graphs."""
        return self.on("aside")

    @torch.no_grad()
    def prepared(self, request: Request) -> bool:
        """Whether what a request's prompt owes is summed; begins that, for PROMPTS requests at once at most."""
        if request.number not in self._sums:
            if len(self._sums) == PROMPTS:
                return False
            assert request.prefix is not None
            assert request.prefix.state is not None
            owed = self._owed(request.prefix.state, request.left)
            self._sums[request.number] = Sums(owed, self.aside.record_event() if self.cuda else None)
        done = self._sums[request.number].done
        return done is None or done.query()

    @torch.no_grad()
    def first(self, request: Request) -> int:
        """The token behind a prompt that is `prepared`, chosen as graphs choose those to come."""
        assert request.prefix is not None
        logits, sampler = request.prefix.logits, request.sampler
        assert logits is not None
        if sampler.sampling.plain:
            return int(sampler(logits[None]))
        with self.on("aside"):
            chooser = DeviceSampler.of(sampler, len(logits), self.device)
            token = chooser.draw(logits.to(self.device), ranked=cuts(sampler.sampling)).cpu()
        sampler.remember(token[None])
        return int(token)

    @torch.no_grad()
    def enter(self, row: int, request: Request) -> None:
        """A request that is `prepared`, and whose first token is known, takes a row."""
        assert request.prefix is not None
        past, new, n, near = request.prefix.state, request.left, self.clock, self.near
        assert past is not None
        owed = self._sums.pop(request.number).owed
        first = n - n % near + near
        with self.on("main"):
            self._put(row, range(first - near, n), None)
            self._put(row, range(n, min(first, n + new)), owed)
            self.decoder.steps.keep(self.run, row, past.pasts, past.clock, n)
            self.chooser.settle(row, request.sampler, drawn=len(request.tokens))
            self._embed(row, request.tokens[-1])
        with self.on("back"):
            self._since[row : row + 1].fill_(n)
        # A near-block that begins is added to by the last graph before it.
        for start, stop in ((first, first + near), (first + near, n + new)):
            with self.on("back"):
                self._put(row, range(start, min(stop, n + new)), owed[start - n :])
            self._ends_by(start - GRAPH)
        self._used_by(owed, *(t for pasts in past.pasts for each in pasts for t in tensors(each).values()))
        self.requests[row], self._left[row] = request, new
        request.prefix = None

    def forget(self, request: Request) -> None:
        """A request does not wait any more: what was summed for it is given back."""
        self._sums.pop(request.number, None)

    def leave(self, request: Request) -> ModelState:
        """A row of a GPU stays where it is."""
        raise StateError(
            f"request {request.number} has a row on a GPU, where graphs may have run on; only one that waits can "
            "pause. Cancel it, or let it end."
        )

    def vacate(self, row: int) -> None:
        """Nobody has the row any more."""
        self.requests[row], self._left[row] = None, 0

    @torch.no_grad()
    def tick(self) -> Iterator[tuple[Request, int | NumericsError]]:
        """Launches a graph, and tells the tokens of those that are done: position by position, for each row."""
        if any(self.requests):
            self._go()
        wanted = len(self._flights) > AHEAD or not any(self.requests)
        while self._flights and (wanted or self._is_done(self._flights[0])):
            wanted = False
            flight = self._flights.popleft()
            if self.cuda:
                flight.done.synchronize()
            yield from self._landed(flight)

    def _landed(self, flight: Flight) -> Iterator[tuple[Request, int | NumericsError]]:
        log = cast("list[list[int]]", self.run.host_tokens[flight.first : flight.first + GRAPH].tolist())  # pyright: ignore[reportUnknownMemberType]
        for offset, tokens in enumerate(log):
            for row, request, count in flight.rows:
                if offset < count and not request.ended:
                    yield request, tokens[row] if tokens[row] >= 0 else not_finite(request)

    def _is_done(self, flight: Flight) -> bool:
        return not self.cuda or flight.done.query()

    def _go(self) -> None:
        """Launches a graph for all rows; a row whose limit it reaches is free behind it."""
        rows = [(row, r, min(GRAPH, self._left[row])) for row, r in enumerate(self.requests) if r is not None]
        first = self.clock % self.ring
        kinds = [request.sampler.sampling for _, request, _ in rows]
        self.draw = self._draws[any(not kind.plain for kind in kinds) + any(cuts(kind) for kind in kinds)]
        self.launch()
        self._turn()
        self._flights.append(Flight(self.main.record_event() if self.cuda else None, first, rows))
        for row, _, count in rows:
            self._left[row] -= count
            if not self._left[row]:
                self.requests[row] = None

    def _turn(self) -> None:
        """Where the ring ends, adds what the last square paid behind it to its beginning, where the clock goes on."""
        if self.clock % self.ring:
            return
        spare = self.run.history[self.ring :]
        with self.on("main"):
            self.run.history[: len(spare)] += spare
            spare.zero_()
            self.decoder.steps.turn(self.run, self.ring)
            self.run.clock.zero_()

    def _owed(self, past: ModelState, new: int) -> Tensor:
        """What a prompt's inputs owe the `new` positions behind it [new, C], summed beside the graphs."""
        with self.on("aside"):
            if self.reader.stack is None or past.stack is None:
                return torch.zeros(new, 0, device=self.device)
            return self.decoder.owed(inputs_of(self.reader.stack, past.stack, 0, range(past.clock)), new)

    def _put(self, row: int, positions: range, values: Tensor | None) -> None:
        """Writes a row's part of the history at some positions: values [N, C], or zeros."""
        if not len(positions) or not self.decoder.channels:
            return
        column = self.run.history.view(-1, self.decoder.channels, self.batch)[..., row]
        for place, start, count in _stretches(positions, self.ring):
            column[start : start + count] = 0 if values is None else values[place : place + count]

    def _embed(self, row: int, token: int) -> None:
        """A row's next input is that token. The others' tokens are embedded again, to the same numbers."""
        run = self.run
        # `token[row] = ..` would wait for all that the stream has.
        self.step.token[row : row + 1].fill_(token)
        self.step.embed(run.clock, run.tokens, run.host_tokens, run.stamps, 0, last=False, greedy=False, pdl=False)

    def _pay(self, chunk: Any) -> None:
        fft, scratch = self.decoder.ffts[chunk.size], self.run.scratch
        sources, targets = chunk.sources, chunk.targets
        fft.pay(self.run.history, sources, targets, chunk.channels, self.batch, self.ring, self._since, scratch)

    def _used_by(self, *given: Tensor) -> None:
        """The allocator leaves these alone until the streams have read them."""
        for tensor in given if self.cuda else ():
            for stream in (self.main, self.back):
                tensor.record_stream(stream)


def prompt_filters(model: LanguageModel, length: int, new_tokens: int) -> int:
    """Bytes of the filters that prompts are read with."""
    return filter_bytes(model, length, endless(new_tokens))


def _stretches(positions: range, ring: int) -> list[tuple[int, int, int]]:
    """(place, row, count) of each run of rows that holds positions, the one at `place` first; two where a ring ends."""
    row = positions.start % ring
    first = min(len(positions), ring - row)
    rest = len(positions) - first
    return [(0, row, first)] + ([(first, 0, rest)] if rest else [])
