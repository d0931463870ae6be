"""The rows of an Engine by PyTorch's operations: a token for each of them at every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch

from flash_inference.engine.decode import BLOCK, LONG_RUN, NEAR, beside_blas
from flash_inference.engine.plan import WORKSPACE, filter_bytes, free_memory
from flash_inference.engine.queue import GIB
from flash_inference.engine.request import Request
from flash_inference.errors import LengthError, NumericsError, PlanError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.decoder import ModelState
from flash_inference.models.rows import enter, leave, open_rows, period, slot_bytes, vacate
from flash_inference.tiling import Blocked, Separated, Spread, Tiling

EVERY = 32


class HostBatch:
    """`slots` rows on one clock; `requests[row]` is who has a row.

    `reader` reads prompts and steps the rows. Memory, `fixed` bytes of it, is a ring of about 2 C positions for each
    row, C the power of two >= new_tokens; `left` bytes are for prompts. Raises PlanError if that is more than `memory`.
    """

    piece = 512
    """Positions of prompts that a step reads, where the caller does not say."""

    def __init__(
        self, model: LanguageModel, slots: int, new_tokens: int, length: int, tiling: Tiling | None, memory: int | None
    ) -> None:
        self.tiling = endless(new_tokens) if tiling is None else tiling
        if self.tiling.taps is not None and self.tiling.taps < new_tokens:
            raise LengthError(
                f"{self.tiling!r} pays lags below {self.tiling.taps}; rows of {new_tokens} new tokens need as many. "
                f"Build it with taps={new_tokens} or more."
            )
        self.period = period(model, self.tiling, length)
        free = free_memory() if memory is None else memory
        memory = 1 << 62 if free is None else free
        each = slot_bytes(model, self.tiling, length)
        shared = WORKSPACE + filter_bytes(model, length, self.tiling)
        self.fixed = shared + slots * each
        self.left = memory - self.fixed
        check_slots(slots, new_tokens, self.fixed, memory, max(memory - shared, 0) // max(each, 1))
        self.reader = model.decoder(length)
        self.state = open_rows(self.reader, slots, self.tiling, length)
        self.requests: list[Request | None] = [None] * slots
        self._tokens = torch.zeros(slots, 1, dtype=torch.long)

    @property
    def clock(self) -> int:
        """The rows' common time."""
        return self.state.clock

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.state.nbytes

    @property
    def busy(self) -> bool:
        """Whether a tick would do something."""
        return any(self.requests)

    @property
    def running(self) -> list[Request]:
        """The requests that have a row, in the order of the rows."""
        return [request for request in self.requests if request is not None]

    def reading(self) -> AbstractContextManager[Any]:
        """Where prompts are read."""
        return nullcontext()

    def prepared(self, request: Request) -> bool:
        """Whether a request whose prompt is read can take a row: always, here."""
        return True

    def forget(self, request: Request) -> None:
        """A request does not wait any more; nothing was prepared for it."""

    def first(self, request: Request) -> int:
        """The token behind a prompt."""
        assert request.prefix is not None
        assert request.prefix.logits is not None
        return int(request.sampler(request.prefix.logits[None]))

    def enter(self, row: int, request: Request) -> None:
        """A request whose prompt is read, and whose first token is known, takes a row."""
        assert request.prefix is not None
        assert request.prefix.state is not None
        enter(self.reader, self.state, row, request.prefix.state, request.left)
        self.requests[row] = request
        self._tokens[row, 0] = request.tokens[-1]
        self._see_starts()

    def leave(self, request: Request) -> ModelState:
        """All that a request in a row knows, as a sequence of its own again."""
        assert request.row is not None
        assert request.prefix is not None
        assert request.prefix.state is not None
        return leave(self.reader, self.state, request.row, request.prefix.state)

    def vacate(self, row: int) -> None:
        """Nobody has the row any more. It is emptied when the next request enters it."""
        self.requests[row] = None
        self._tokens[row, 0] = 0
        vacate(self.state, row)
        self._see_starts()

    def tick(self) -> Iterator[tuple[Request, int | NumericsError]]:
        """One token for every row, or why it has none."""
        device = self.reader.model.embedding.weight.device
        with beside_blas(self.state, len(self.requests)):
            logits = self.reader.extend(self.state, self._tokens.to(device)).cpu()
            best = logits.max(-1)
        finite = cast("list[bool]", best.values.isfinite().tolist())  # pyright: ignore[reportUnknownMemberType]
        indices = cast("list[int]", best.indices.tolist())  # pyright: ignore[reportUnknownMemberType]
        for row, request in enumerate(self.requests):
            if request is None:
                continue
            if not finite[row]:
                yield request, not_finite(request, f" (largest is {float(best.values[row])})")
                continue
            plain = request.sampler.sampling.plain
            token = indices[row] if plain else int(request.sampler(logits[row : row + 1]))
            self._tokens[row, 0] = token
            yield request, token

    def _see_starts(self) -> None:
        """The starts that count are those of rows in use."""
        starts = [int(self.state.start[row]) for row, request in enumerate(self.requests) if request is not None]
        self.state.first_start = min(starts, default=self.clock)
        self.state.last_start = max(starts, default=self.clock)


def endless(new_tokens: int) -> Tiling:
    """The tiling for rows that live up to `new_tokens` positions: Blocked for few, else Separated + Spread."""
    cap = max(1 << (new_tokens - 1).bit_length(), BLOCK)
    if cap <= LONG_RUN:
        return Blocked(None, taps=cap, block=BLOCK)
    return Spread(Separated(None, near=NEAR, block=BLOCK, taps=cap), every=EVERY)


def check_slots(slots: int, new_tokens: int, needed: int, memory: int, fit: int) -> None:
    """Raises PlanError if the rows need more bytes than there are; `fit` slots would do."""
    if needed > memory:
        raise PlanError(
            f"{slots} slots for {new_tokens} new tokens each need {needed / GIB:.2f} GiB; {memory / GIB:.2f} GiB are "
            f"there. {fit} slots would fit, or more with fewer new tokens."
        )


def not_finite(request: Request, note: str = "") -> NumericsError:
    """Why a row ends whose logits are NaN or infinite."""
    return NumericsError(
        f"the logits of request {request.number} are not finite after {len(request.tokens)} new tokens{note}. "
        "Check the weights and the filter for NaN or overflow."
    )
