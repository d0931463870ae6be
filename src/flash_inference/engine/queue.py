"""Queue: the requests that have no row yet, in their turn, and the memory that their prompts may take."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from flash_inference.engine.prefix import Prefix
from flash_inference.engine.request import Request, Status
from flash_inference.errors import PlanError
from flash_inference.models.decoder import Decoder

GIB = 2**30


class Queue:
    """Requests in their turn. `read` takes their prompts in, a piece at a time, within `memory` bytes.

    A prompt holds memory from its first piece until its request ends; a prefix that a caller keeps, until he lets it
    go. A request whose bytes are not free waits for them, and no prompt behind it is begun meanwhile.
    """

    def __init__(self, decoder: Decoder, memory: int) -> None:
        self.decoder, self.memory = decoder, memory
        self._requests: list[Request] = []
        self._prefixes: weakref.WeakSet[Prefix] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests))

    @property
    def held(self) -> int:
        """Bytes that prompts hold now, those of running requests included."""
        return sum(prefix.nbytes for prefix in self._prefixes)

    def __contains__(self, prefix: Prefix) -> bool:
        """Whether a prefix was noted here."""
        return prefix in self._prefixes

    def note(self, prefix: Prefix) -> Prefix:
        """Counts a prefix's bytes from now on."""
        self._prefixes.add(prefix)
        return prefix

    def add(self, request: Request) -> None:
        """Queues a request at its turn."""
        request.status = Status.WAITING
        self._requests.append(request)
        self._requests.sort(key=lambda request: request.turn)

    def remove(self, request: Request) -> None:
        """Takes a request out, if it is there."""
        if request in self._requests:
            self._requests.remove(request)

    def check(self, prefix: Prefix, new_tokens: int) -> None:
        """Raises PlanError if a request would not fit even if nothing else held memory."""
        needed = self.cost(prefix, new_tokens)
        if needed <= self.memory:
            return
        fits = max(int(self.memory * len(prefix) / needed) - new_tokens, 0)
        raise PlanError(
            f"a prompt of {len(prefix)} tokens with {new_tokens} new ones needs {needed / GIB:.3f} GiB; beside the "
            f"rows {self.memory / GIB:.3f} GiB are there. About {fits} prompt tokens would fit, or fewer slots."
        )

    def cost(self, prefix: Prefix, new_tokens: int) -> int:
        """Bytes that a request takes beside its row: its past, and what that is paid forward to."""
        stack = self.decoder.stack
        sums = 0 if stack is None else stack.filter.channels * stack.filter.rho.itemsize * new_tokens
        return prefix.cost(self.decoder.model) + sums

    def read(self, budget: int, first: int, alone: bool) -> tuple[Request, PlanError] | None:
        """Reads prompts of the first `first` requests, about `budget` positions of them.

        `alone` says that no row is in use. If then the first in turn still has no room, since callers hold prefixes or
        paused requests, it never will: it comes back with its error.
        """
        left, blocked = budget, None
        for request in self._requests[:first]:
            prefix = request.prefix
            assert prefix is not None
            if prefix.state is None and (blocked or not self._fits(request, prefix)):
                blocked = blocked or request
                continue
            while not prefix.ready and left > 0:
                left -= prefix.read(self.decoder)
        if blocked is None or not alone or any(request.prefix.state for request in self._requests if request.prefix):
            return None
        return blocked, PlanError(
            f"request {blocked.number} has no room: prefixes that are kept and paused requests hold "
            f"{self.held / GIB:.3f} of {self.memory / GIB:.3f} GiB. Let some of them go."
        )

    def _fits(self, request: Request, prefix: Prefix) -> bool:
        more = self.cost(prefix, request.left) - prefix.held
        return self.held + more <= self.memory
