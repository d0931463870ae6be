"""Engine: requests that join and leave a batch between any two steps, all on one clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flash_inference.engine.batch_host import HostBatch
from flash_inference.engine.decode import PREFILL_CHUNK, on_graphs
from flash_inference.engine.generate import Stops
from flash_inference.engine.prefix import Prefix
from flash_inference.engine.prompts import Prompt, as_rows, check_room, is_text
from flash_inference.engine.queue import Queue
from flash_inference.engine.request import Event, Request, Status
from flash_inference.engine.sampling import Sampler, Sampling
from flash_inference.errors import FlashInferenceError, LengthError, ShapeError, StateError
from flash_inference.models.backbone import LanguageModel
from flash_inference.tiling import Tiling

if TYPE_CHECKING:
    from flash_inference.engine.batch_gpu import GpuBatch

PATIENCE = 256


class Engine:
    """Generates for many requests at once: `submit` them, then `step`, iterate, or `run`.

    `slots` rows decode together; each request that has read its prompt takes one and gives it back when it ends.
    `new_tokens` is the most tokens that a request may ask for, `length` the most positions that prompt and new tokens
    may have (default: all that the model's filter allows). All rows share one clock, hence one tile a step; a row's
    inputs before it joined are zero, and its prompt is paid forward at once as it joins. Memory is fixed: a ring of
    about 2 C positions for each slot, C the power of two >= new_tokens, and the prompts of what waits and runs.

    A request is alone in what it computes: for the same clock of joining modulo `period` its numbers are the same, bit
    for bit, in any row, with any neighbours, in an engine of as many slots; at any other, within rounding.

    A step reads at most `prefill` positions of prompts, in pieces of as many at most (default 512, on a GPU 2,048),
    lets in who is ready, and makes one token for each row. On a GPU it makes 16, which come some steps later
    (`batch_gpu.GpuBatch`). Turns: a request of priority p stands before those that came up to p * PATIENCE steps
    earlier with priority 0; equals go in the order of submission. So nobody waits for ever.

    `memory` bounds the bytes of all that, the weights aside (default: what is free now). Raises PlanError if the slots
    do not fit, before anything is allocated. Calls are not thread-safe: one thread submits and steps.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int,
        new_tokens: int,
        length: int | None = None,
        memory: int | None = None,
        prefill: int | None = None,
        tiling: Tiling | None = None,
    ) -> None:
        if slots < 1 or (prefill is not None and prefill < 1):
            raise ShapeError(f"slots is {slots} and prefill is {prefill}; expected at least 1 of each.")
        check_room(model, 1, new_tokens)
        self.model, self.slots = model, slots
        self.length = model.config.length if length is None else length
        check_room(model, self.length - new_tokens, new_tokens)
        self.new_tokens = new_tokens
        self.batch = open_batch(model, slots, new_tokens, self.length, tiling, memory)
        self.prefill = min(prefill or self.batch.piece, PREFILL_CHUNK)
        self.queue = Queue(self.batch.reader, self.batch.left)
        self.steps = self.submitted = 0

    @property
    def clock(self) -> int:
        """The batch's common time: with every step that has a row it moves on by one, on a GPU by 16."""
        return self.batch.clock

    @property
    def period(self) -> int:
        """Clocks after which all that depends on the clock of joining repeats."""
        return self.batch.period

    @property
    def running(self) -> list[Request]:
        """The requests that have a row, in the order of the rows."""
        return self.batch.running

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not len(self.queue) and not self.batch.busy

    @property
    def nbytes(self) -> int:
        """Bytes held now: the rows, and the prompts of what waits and runs."""
        return self.batch.nbytes + self.queue.held

    def prefix(self, tokens: Prompt) -> Prefix:
        """Tokens that several requests begin with, to be read once: `submit(prompt, prefix=...)`.

        It holds its memory for as long as the caller holds it.
        """
        rows = as_rows(self.model, tokens)
        if len(rows) != 1:
            raise ShapeError(f"the prefix has {len(rows)} rows; expected one. Make one prefix for each.")
        return self.queue.note(Prefix(rows[0], self.prefill))

    def submit(
        self,
        prompt: Prompt = None,
        *,
        max_new_tokens: int,
        prefix: Prefix | None = None,
        priority: int = 0,
        stop_tokens: Sequence[int] | None = None,
        stop: Sequence[str] | str = (),
        allowed: Sequence[int] | None = None,
        **settings: Any,
    ) -> Request:
        """Queues a request: one prompt, as `generate` takes it, and its own settings of `Sampling`, seed and stops.

        With `prefix` the prompt's token ids come behind it, or none do (None). Tokens are those of `generate` with the
        same settings. Raises LengthError, TokenError, SamplingError, ShapeError, and PlanError for a prompt that would
        not fit even alone; nothing is allocated then, and the other requests go on as they are.
        """
        read = self._prefix(prompt, prefix)
        check_room(self.model, len(read), max_new_tokens)
        if max_new_tokens > self.new_tokens or len(read) + max_new_tokens > self.length:
            raise LengthError(
                f"{len(read)} prompt tokens and {max_new_tokens} new ones were asked for; this engine has room "
                f"for {self.new_tokens} new ones, {self.length} in all. Ask for fewer, or make an engine with larger "
                "new_tokens or length."
            )
        chosen = None if allowed is None else tuple(int(token) for token in allowed)
        sampler = Sampler(Sampling(allowed=chosen, **settings), 1, self.model.config.vocab_size, [read.tokens])
        stops = Stops(self.model, 1, stop_tokens, stop)
        self.queue.check(read, max_new_tokens)
        self.submitted += 1
        turn = (self.steps - priority * PATIENCE, self.submitted)
        request = Request(self.submitted, self.queue.note(read), max_new_tokens, sampler, stops, turn)
        self.queue.add(request)
        return request

    def step(self) -> list[Event]:
        """Reads prompts within the budget, lets in who is ready, and makes a token for every row."""
        self.steps += 1
        events = self._read() + self._join()
        if self.batch.busy:
            events += self._tick()
        return events

    def __iter__(self) -> Iterator[Event]:
        """Steps until nothing is left to do; requests may be submitted and cancelled meanwhile."""
        while not self.idle:
            yield from self.step()

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while not self.idle:
            self.step()

    def cancel(self, request: Request) -> None:
        """Ends a request; its row is free at once. One that has ended already stays as it is."""
        if not request.ended:
            self._end(request, Status.CANCELLED)

    def pause(self, request: Request) -> None:
        """Takes a request out of its row, or the queue, with all that it knows; `resume` queues it again."""
        if request.status not in (Status.WAITING, Status.RUNNING):
            raise StateError(f"request {request.number} is {request.status}; only one that waits or runs can pause.")
        if request.row is not None:
            state = self.batch.leave(request)
            assert request.prefix is not None
            made = request.tokens[len(request.prefix) - state.clock - 1 : -1]
            past = Prefix(torch.cat([request.prefix.tokens, torch.tensor(made, dtype=torch.long)]), self.prefill)
            past.state = state
            request.prefix = self.queue.note(past)
        self._vacate(request)
        request.status = Status.PAUSED

    def resume(self, request: Request) -> None:
        """Queues a paused request, at its old turn; it rejoins: what it knows is paid forward as one rectangle."""
        if request.status is not Status.PAUSED:
            raise StateError(f"request {request.number} is {request.status}; only a paused one can resume.")
        self.queue.add(request)

    def _prefix(self, prompt: Prompt, prefix: Prefix | None) -> Prefix:
        """The past that a request begins with: a prompt's, a prefix's, or a prompt's behind a prefix."""
        if prefix is not None and prefix not in self.queue:
            raise StateError("the prefix is another engine's; make it with this engine's prefix().")
        if prefix is not None and prompt is None:
            return prefix
        rows = as_rows(self.model, prompt)
        if len(rows) != 1:
            raise ShapeError(f"the prompt has {len(rows)} rows; a request takes one. Submit one request for each.")
        row = rows[0]
        if prefix is None:
            return Prefix(row, self.prefill)
        row = row[1:] if is_text(prompt)[0] else row
        return Prefix(row, self.prefill, prefix) if len(row) else prefix

    def _read(self) -> list[Event]:
        """Reads prompts for the rows that are free and for the next one that will be."""
        with self.batch.reading():
            refused = self.queue.read(self.prefill, 1 + self.batch.requests.count(None), not self.batch.busy)
        return [self._fail(*refused)] if refused else []

    def _join(self) -> list[Event]:
        """Requests whose past is ready take the free rows, in their turn."""
        events: list[Event] = []
        for request in self.queue:
            prefix = request.prefix
            if prefix is None or not prefix.ready:
                if None not in self.batch.requests:
                    break
                continue
            ready = self.batch.prepared(request)
            if None not in self.batch.requests:
                break
            if not ready:
                continue
            if (error := prefix.error) is not None:
                events.append(self._fail(request, error))
            elif not request.tokens:
                events.append(self._take(request, self.batch.first(request)))
            if not request.ended:
                self._enter(request)
        return events

    def _enter(self, request: Request) -> None:
        row = self.batch.requests.index(None)
        self.queue.remove(request)
        request.row, request.joined, request.status = row, self.clock, Status.RUNNING
        self.batch.enter(row, request)

    def _tick(self) -> list[Event]:
        """The tokens of the rows that have some."""
        events: list[Event] = []
        for request, made in self.batch.tick():
            if not request.ended:
                events.append(self._take(request, made) if isinstance(made, int) else self._fail(request, made))
        return events

    def _take(self, request: Request, token: int) -> Event:
        last = request.take(token)
        if last:
            self._end(request, Status.FINISHED)
        return Event(request, token, last)

    def _fail(self, request: Request, error: FlashInferenceError) -> Event:
        request.error = error
        self._end(request, Status.FAILED)
        return Event(request, None, True)

    def _end(self, request: Request, status: Status) -> None:
        self._vacate(request)
        request.prefix, request.status = None, status

    def _vacate(self, request: Request) -> None:
        """Takes a request out of its row or the queue. The row is emptied when the next request enters it."""
        self.queue.remove(request)
        self.batch.forget(request)
        if request.row is not None:
            row, request.row = request.row, None
            if self.batch.requests[row] is request:
                self.batch.vacate(row)


def open_batch(
    model: LanguageModel, slots: int, new_tokens: int, length: int, tiling: Tiling | None, memory: int | None
) -> HostBatch | GpuBatch:
    """The rows of an engine: graphs on a GPU that can replay the model's steps, PyTorch's operations elsewhere."""
    if on_graphs(model):
        from flash_inference.engine.batch_gpu import GpuBatch

        return GpuBatch.fitted(model, slots, new_tokens, length, tiling, memory)
    return HostBatch(model, slots, new_tokens, length, tiling, memory)
