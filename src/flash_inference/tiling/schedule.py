"""Which chunk of which large tile runs between two graphs: earliest deadline first, on a budget that meets them all.

Channels are split in groups, and the clock of each group's large tiles is shifted against the others', so that there is
as much to do at every block.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from .staggered import Staggered
from .tile import Rectangle
from .triangle import next_power

GROUPS = 64
"""Groups of channels at most: those that pay a side above so many near-blocks are one at a time."""
FEWEST = 32
"""Channels a group at least."""
LEAST = 8
"""Channels a chunk at least."""


@dataclass(frozen=True, slots=True, order=True)
class Chunk:
    """Some channels of a tile, to be paid on a circle of 2 `size` places.

    It must have run when `due` positions are known; `cost` is an estimate in microseconds.
    """

    due: int
    size: int
    sources: range = field(compare=False)
    targets: range = field(compare=False)
    channels: range = field(compare=False)
    cost: float = field(compare=False)


class Groups:
    """`channels` channels in groups g = 0, 1, .., 2^q - 1, each on Staggered with the bits of g reversed as its shift.

    So groups that pay the same side at the same time stand side by side. A span of None is a clock without end, for
    rows that live at most `taps` positions: sides then end at the power of two that holds those.
    """

    def __init__(self, span: int | None, near: int, block: int, channels: int, taps: int | None = None) -> None:
        self.span, self.near, self.channels = span, near, channels
        reach = next_power(span or taps or 1)
        most = max(1, min(GROUPS, channels // FEWEST, reach // near))
        bits = most.bit_length() - 1
        width = -(-channels // (1 << bits))
        self.width = -(-width // (8 if width >= 8 else 2)) * (8 if width >= 8 else 2)
        self.tilings = [Staggered(span, near, block, _reversed(group, bits), taps=taps) for group in range(1 << bits)]
        largest = self.tilings[0].top if span is None else next_power(span) // 2
        self.sizes = [near << q for q in range((largest // near).bit_length())]
        """The sides of large tiles, ascending: near, 2 near, .. half of the span, or all that rows live."""

    def most(self, size: int) -> int:
        """Channels at most that pay a side at the same time."""
        together = max(1, len(self.tilings) // (2 * size // self.near))
        return min(self.width * together, self.channels)

    def after(self, n: int) -> Iterator[tuple[int, Rectangle, range]]:
        """What becomes payable when n positions are known: (size, tile, channels) for each side in use."""
        first = 0
        sides = [tiling.side(n) for tiling in self.tilings] if n and not n % self.near else []
        for group, side in enumerate(sides):
            if group + 1 < len(sides) and sides[group + 1] == side:
                continue
            tile = next((tile for tile in self.tilings[group].after(n - 1) if tile.slack), None)
            channels = range(first * self.width, min((group + 1) * self.width, self.channels))
            first = group + 1
            if tile is not None and channels:
                yield min(side, self.sizes[-1]), tile, channels


def _reversed(number: int, bits: int) -> int:
    return int(f"{number:0{bits}b}"[::-1], 2) if bits else 0


@dataclass(frozen=True, slots=True)
class Pricing:
    """How tiles are cut: into chunks of about `target` microseconds, at `points` (V x channels) a microsecond."""

    target: float = 60.0
    points: float = 40_000.0

    def rate(self, size: int) -> float:
        """Points a microsecond; the largest transforms move more slowly."""
        return self.points / (1.0 if size < 32768 else 1.2)

    def widths(self, size: int, channels: range, batch: int = 1, least: int = LEAST) -> list[range]:
        """The channels of each chunk of a tile of that size, each for `batch` sequences; `least` transforms at least.

        Whole blocks of 32 or 8 channels, where rows stand for one sequence: what memory moves at once.
        """
        width = max(least, int(self.target * self.rate(size) / size))
        width = width // 32 * 32 if width >= 32 else width // 8 * 8
        width = -(-width // batch)
        width += width % 2
        return [range(c, min(c + width, channels.stop)) for c in range(channels.start, channels.stop, width)]

    def cut(
        self, size: int, tile: Rectangle, channels: range, early: int, batch: int = 1, least: int = LEAST
    ) -> list[Chunk]:
        """The chunks of a tile on circles of 2 `size` places, for some channels, due `early` steps early."""
        rate, due = self.rate(size) / batch, tile.due - early
        return [
            Chunk(due, size, tile.sources, tile.targets, cut, len(cut) * size / rate)
            for cut in self.widths(size, channels, batch, least)
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
