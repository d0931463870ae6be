"""Request: one sequence that an engine generates, from its prompt to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import torch

from flash_inference.engine.generate import Stops
from flash_inference.engine.prefix import Prefix
from flash_inference.engine.sampling import Sampler
from flash_inference.errors import FlashInferenceError


class Status(StrEnum):
    """Where a request stands. The last three are final."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(eq=False, slots=True)
class Request:
    """What was asked for, and the `tokens` made so far.

    `prefix` is its past while that is not in a row of the batch, and what the row entered with while it is; None when
    the request has ended. `row` and `joined` tell its row and the clock at which it joined, while it runs. `error` says
    why it failed. Its turn is `turn`, smallest first.
    """

    number: int
    prefix: Prefix | None
    max_new_tokens: int
    sampler: Sampler
    stops: Stops
    turn: tuple[int, int]
    status: Status = Status.WAITING
    tokens: list[int] = field(default_factory=list[int])
    row: int | None = None
    joined: int | None = None
    error: FlashInferenceError | None = None

    @property
    def ended(self) -> bool:
        """Whether it will make no more tokens."""
        return self.status in (Status.FINISHED, Status.CANCELLED, Status.FAILED)

    @property
    def left(self) -> int:
        """Tokens that it may still make."""
        return self.max_new_tokens - len(self.tokens)

    def take(self, token: int) -> bool:
        """Notes a token, and tells whether it is the last."""
        self.tokens.append(token)
        if self.stops.strings:
            self.stops.see(torch.tensor([token]))
        return self.left == 0 or self.stops.all_ended or token in self.stops.ids


class Event(NamedTuple):
    """What happened to a request in a step: a token (None if it failed), and whether it has ended."""

    request: Request
    token: int | None
    ended: bool
