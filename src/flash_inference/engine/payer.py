"""Who pays the tiles, and when: at once, or beside the steps on a second core."""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from flash_inference.mixers.stack import StackState
from flash_inference.tiling import Rectangle, Share

WORTH = 256
"""Channels times rows from which a share outweighs handing it to another thread."""


class Stacked(Protocol):
    """A state whose long convolutions stand in one stack: None if there are none."""

    @property
    def stack(self) -> StackState | None: ...


class Steps(Protocol):
    """What the loop asks of a decoder: logits [B, V] behind the next tokens [B, N], and tiles to take and to apply."""

    def extend(self, state: Any, tokens: Tensor, /) -> Tensor: ...

    def take(self, state: Any, /) -> tuple[Rectangle | Share, ...]: ...

    def apply(self, state: Any, tile: Rectangle | Share, /, *, staged: bool = True) -> None: ...


class Payer:
    """Pays what is due before each step.

    With `beside`, tiles that have slack go to one worker thread, and a step waits only for those whose first target
    it is about to read: on two cores the far past costs the steps almost nothing. This is exact whatever the timing:
    a share writes only rows that no step reads or adds to before the share is due, and shares run in the order they
    were handed over, so that sums are always formed in one order. Rings pay at once, since their rows are reused; so
    do tilings with a slack below the staged block, whose rows are being moved.
    `waits` counts the steps that had to wait.
    """

    def __init__(self, decoder: Steps, state: Stacked, beside: bool) -> None:
        self.decoder, self.state = decoder, state
        stack = state.stack
        self.beside = (
            beside
            and stack is not None
            and stack.tiling.length is not None
            and bool(stack.tiling.slacks)
            and min(stack.tiling.slacks) >= stack.block
            and stack.inputs[0].numel() >= WORTH
        )
        self.waits = 0
        self._handed: deque[int] = deque()
        self._next_due = -1
        self._work: SimpleQueue[Rectangle | Share | None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Payer:
        if self.beside:
            self._thread = threading.Thread(target=self._run, name="flash-inference-payer", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            if kind is not None:
                self._drop()
            self._work.put(None)
            self._thread.join()
            self._thread = None
            if kind is None:
                self._collect(len(self._handed))

    def __call__(self, drafts: int = 0) -> None:
        """Pays, or hands over, what became payable with the last position, and waits for what the next one reads.

        `drafts` is how many positions behind that one are read as well.
        """
        stack = self.state.stack
        if stack is None:
            return
        clock = stack.clock
        if stack.paid < clock:
            near: list[Rectangle | Share] = []
            for tile in self.decoder.take(self.state):
                whole = tile.tile if isinstance(tile, Share) else tile
                if self._thread is not None and whole.slack > 0:
                    self._hand(tile, whole.due)
                else:
                    near.append(tile)
            self._settle(clock + drafts)
            if near:
                self._pay(near)

    def _pay(self, tiles: list[Rectangle | Share]) -> None:
        """Pays tiles at once: on one thread while the worker has the other core."""
        threads = torch.get_num_threads()
        if self._thread is not None and threads > 1:
            torch.set_num_threads(1)
        try:
            for tile in tiles:
                self.decoder.apply(self.state, tile)
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)

    def _hand(self, tile: Rectangle | Share, due: int) -> None:
        self._handed.append(due)
        self._next_due = due if len(self._handed) == 1 else min(self._next_due, due)
        self._work.put(tile)

    def _settle(self, clock: int) -> None:
        """Waits for every handed share that is due at `clock`."""
        if self._handed and self._next_due <= clock:
            last = max(i for i, due in enumerate(self._handed) if due <= clock)
            self.waits += self._done.qsize() <= last
            self._collect(last + 1)

    def _collect(self, count: int) -> None:
        for _ in range(count):
            self._handed.popleft()
            error = self._done.get()
            if error is not None:
                raise error
        self._next_due = min(self._handed, default=-1)

    def _drop(self) -> None:
        while not self._work.empty():
            self._work.get()

    def _run(self) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            while (tile := self._work.get()) is not None:
                try:
                    self.decoder.apply(self.state, tile, staged=False)
                    self._done.put(None)
                except BaseException as error:
                    self._done.put(error)
                    return
