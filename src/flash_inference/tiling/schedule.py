"""Which chunk of which large tile runs between two graphs: earliest deadline first, on a budget that meets them all."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from .tile import Rectangle


@dataclass(frozen=True, slots=True, order=True)
class Chunk:
    """Some channels of a tile from `blocks` blocks of `size` sources before `row`.

    It must have run when `due` positions are known; `cost` is an estimate in microseconds.
    """

    due: int
    size: int
    row: int
    channels: range = field(compare=False)
    blocks: int = field(compare=False)
    targets: range = field(compare=False)
    cost: float = field(compare=False)


@dataclass(frozen=True, slots=True)
class Pricing:
    """How tiles are cut: into chunks of about `target` microseconds, at `points` (V x channels) a microsecond."""

    target: float = 60.0
    points: float = 20_000.0

    def rate(self, size: int) -> float:
        """Points a microsecond; the largest transforms take more passes."""
        return self.points / (1.0 if size < 32768 else 1.4)

    def widths(self, size: int, channels: int, batch: int = 1) -> list[range]:
        """The channels of each chunk of a tile of that size, each for `batch` sequences; 8 transforms at least.

        Chunks begin at even channels: spectra of odd lengths are aligned there, and kernels are compiled for that.
        """
        width = max(8, int(self.target * self.rate(size) / size))
        width = width // 32 * 32 if width >= 32 else width // 8 * 8
        width = -(-width // batch)
        width += width % 2
        return [range(c, min(c + width, channels)) for c in range(0, channels, width)]

    def cut(self, tile: Rectangle, channels: int, early: int, batch: int = 1) -> list[Chunk]:
        """The chunks of a tile from whole V-blocks, V = its slack, for `channels` channels, due `early` steps early."""
        size, blocks = tile.slack, -(-len(tile.sources) // tile.slack)
        rate, cuts = self.rate(size) / batch, self.widths(size, channels, batch)
        due, row = tile.due - early, tile.sources.stop
        return [
            Chunk(due, size, row, cut, blocks, tile.targets, len(cut) * size * (1 + blocks) / 2 / rate) for cut in cuts
        ]


class Schedule:
    """The chunks that wait, and how many to release at each boundary.

    At a boundary with n positions known, enough work is released that every deadline can be met at an even pace with
    `margin` to spare: for each deadline, the work due by then over the boundaries left until it. A chunk whose deadline
    comes before the next boundary is released at once and counted in `forced` if it had to wait for that.
    """

    def __init__(self, every: int, margin: float = 1.3) -> None:
        self.every, self.margin = every, margin
        self.forced = 0
        self._heap: list[Chunk] = []
        self._work: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, chunks: list[Chunk]) -> None:
        """More work that may start now."""
        for chunk in chunks:
            heapq.heappush(self._heap, chunk)
            self._work[chunk.due] = self._work.get(chunk.due, 0.0) + chunk.cost

    def release(self, n: int) -> list[Chunk]:
        """What to run from this boundary on, earliest deadline first. Cost: a few steps a deadline, not a chunk."""
        budget, work = 0.0, 0.0
        for due in sorted(self._work):
            work += self._work[due]
            budget = max(budget, work * self.every / max(due - n - self.every, self.every))
        budget *= self.margin
        released: list[Chunk] = []
        spent = 0.0
        while self._heap:
            due = self._heap[0].due
            forced = due < n + 2 * self.every
            if not forced and spent >= budget:
                break
            chunk = heapq.heappop(self._heap)
            self.forced += forced and spent >= budget
            spent += chunk.cost
            self._work[due] -= chunk.cost
            if not self._heap or self._heap[0].due != due:
                del self._work[due]
            released.append(chunk)
        return released
