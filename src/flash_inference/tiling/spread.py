"""Spread: the work of tiles that can wait, spread evenly over the steps that they can wait."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from flash_inference.errors import TilingError

from .cost import Price, area, cost, priced
from .laws import Tiling
from .tile import Item, Pair, Parallelogram, Rectangle, Share, Span, Tile
from .triangle import call, check_span, low_bit, next_power, require


@dataclass(frozen=True, repr=False)
class Spread:
    """`tiling`, its tiles of slack V > 0 cut by channels into V // every shares, one paid every `every` steps.

    Share k of a tile that is ready at position r is paid after position r + phase + k * every < r + V, with a phase
    for every V. Phases differ modulo `every`, and keep off the steps of large tiles without slack, as far as there is
    room: if the sum of 1 / min(V, every) over the slacks is at most 1 (near >= every and at most `every` levels will
    do), no step has two shares. Tiles without slack pass through; a tiling without slacks is left as it is.

    tiling: Separated, or another whose slacks are powers of two, whose tiles of slack V have at most V targets and
    are ready only at positions origin + m V - 1, and whose spans leave tiles wholly beyond the chunk whole.
    every: a power of two. Cost: the tiling's work, in more and smaller calls.
    Source: the idea of even work over the slack is Gardner's (1995).
    """

    tiling: Tiling
    every: int = 32
    phases: tuple[int, ...] = field(init=False, repr=False, compare=False)
    period: int = field(init=False, repr=False, compare=False)
    busy: frozenset[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require("Spread", "every", self.every, minimum=1, power=True)
        if isinstance(self.tiling, Spread):
            raise TilingError(
                f"Spread got {self.tiling!r}, whose tiles are cut already; a tile is cut once. Spread the tiling in it."
            )
        for slack in self.tiling.slacks:
            require(f"Spread of {self.tiling!r}", "slack", slack, minimum=1, power=True)
        phases = choose_phases(self.tiling.slacks, self.every)
        period = max(self.every, self.tiling.block)
        turns = [(min(slack, self.every), phase) for slack, phase in zip(self.tiling.slacks, phases, strict=True)]
        busy = {n for n in range(period) if n % self.tiling.block == 0 or any(n % m == p for m, p in turns)}
        for name, value in (("phases", phases), ("period", period), ("busy", frozenset(busy))):
            object.__setattr__(self, name, value)

    @property
    def length(self) -> int | None:
        """The tiling's."""
        return self.tiling.length

    @property
    def taps(self) -> int | None:
        """The tiling's."""
        return self.tiling.taps

    @property
    def block(self) -> int:
        """The tiling's."""
        return self.tiling.block

    @property
    def origin(self) -> int:
        """The tiling's."""
        return self.tiling.origin

    @property
    def slacks(self) -> tuple[int, ...]:
        """The slacks of the tiles that are shared out."""
        return self.tiling.slacks

    @property
    def reach(self) -> tuple[int, int]:
        """The tiling's, and the longest wait further back."""
        back, ahead = self.tiling.reach
        return back + max(self.slacks, default=1) - 1, ahead

    def after(self, position: int) -> tuple[Tile | Share, ...]:
        """The tiles without slack that `position` makes ready, then the shares whose turn it is."""
        n = position + 1 - self.origin
        if n >= 0 and n % self.period not in self.busy and (self.length is None or position < self.length):
            return ()
        items: list[Tile | Share] = [*self._urgent(position)]
        for slack, phase in zip(self.slacks, self.phases, strict=True):
            part, rest = divmod(n % slack - phase, self.every)
            if not rest and 0 <= part < self._parts(slack):
                items += self._shares(slack, n - n % slack, range(part, part + 1))
        return tuple(items)

    def inline(self, position: int) -> tuple[Pair, ...]:
        """The tiling's."""
        return tuple(self.tiling.inline(position))

    def span(self, start: int, n: int) -> Span:
        """The tiling's span, with the rest of the tiles in flight at `start`, without that of those in flight after."""
        stop = check_span(self, self.length, start, n)
        inner = self.tiling.span(start, n)
        chunk, beyond = range(start, stop), range(stop, stop + self.reach[1] + 1)
        before: list[Item] = list(inner.before)
        after: list[Item] = list(inner.after)
        for slack, phase in zip(self.slacks, self.phases, strict=True):
            paid, done = self._paid(slack, phase, start), self._paid(slack, phase, stop - 1)
            flying, landing = self._event(slack, start), self._event(slack, stop - 1)
            for tile in self._tiles(slack, flying):
                turn = done if landing == flying else self._parts(slack)
                before += _share(tile.clip(range(start), chunk), range(paid, self._parts(slack)), self._parts(slack))
                after += _share(tile.clip(range(start), beyond), range(paid, turn), self._parts(slack))
            if landing > flying and done < self._parts(slack):
                for tile in self._tiles(slack, landing):
                    if tile not in after:
                        raise TilingError(
                            f"Spread got span({start}, {n}) of {self.tiling!r}, which lacks {tile} after the chunk; "
                            "Spread must cut it. Leave tiles wholly beyond the chunk whole."
                        )
                    after.remove(tile)
                    after += _share(tile, range(done), self._parts(slack))
        return Span(start, stop, tuple(before), tuple(after))

    def bound(self, price: Price = area) -> float:
        """The most that any step pays, in the unit of `price`: by default source-target pairs per channel.

        The largest, over the residues of positions modulo `every`, of the dearest tile without slack that falls there
        plus the dearest share of every level that falls there. Takes tiles without slack to repeat with the period of
        the smallest slack, but for clipping, as Separated's do. Cost: O(length / smallest slack) calls of `after`.
        """
        if not self.slacks:
            return cost(self.tiling, price).worst
        origin, end = self.origin, self.length
        period = 2 * max(self.every, self.slacks[0])
        if end is None:
            assert self.taps is not None
            end = origin + 4 * max(next_power(self.taps), period)
        dearest: defaultdict[int, float] = defaultdict(float)
        for position in {*range(max(0, origin - 1), min(end, origin + period)), *range(max(origin, end - period), end)}:
            turn = (position + 1 - origin) % self.every
            dearest[turn] = max(dearest[turn], sum(priced(tile, price) for tile in self._urgent(position)))
        for slack, phase in zip(self.slacks, self.phases, strict=True):
            steps = range(slack, end - origin + 1, slack)
            whole = max((sum(price(tile) for tile in self._tiles(slack, n)) for n in steps), default=0.0)
            for turn in range(phase, self.every, min(slack, self.every)):
                dearest[turn] += whole / self._parts(slack)
        return max(dearest.values())

    def _parts(self, slack: int) -> int:
        return max(1, slack // self.every)

    def _event(self, slack: int, position: int) -> int:
        """How many positions behind the origin were known when the newest tile of `slack` became ready."""
        return max(0, position - self.origin) // slack * slack

    def _paid(self, slack: int, phase: int, position: int) -> int:
        """How many shares of that tile are paid by after(t) for all t < position."""
        late = max(0, position - self.origin) % slack - phase
        return 0 if late < 0 else min(self._parts(slack), late // self.every + 1)

    def _shares(self, slack: int, n: int, part: range) -> list[Share]:
        return [Share(tile, part, self._parts(slack)) for tile in self._tiles(slack, n)]

    def _tiles(self, slack: int, n: int) -> list[Rectangle]:
        """The tiles of `slack` that are ready when n positions behind the origin are known."""
        if n <= 0:
            return []
        tiles = self.tiling.after(self.origin + n - 1)
        return [tile for tile in tiles if isinstance(tile, Rectangle) and tile.slack == slack]

    def _urgent(self, position: int) -> list[Tile]:
        """The tiles without slack that `position` makes ready."""
        tiles: list[Tile] = []
        for item in self.tiling.after(position):
            if isinstance(item, Share) or (isinstance(item, Parallelogram) and item.slack):
                raise TilingError(
                    f"Spread got {item} of {self.tiling!r}; it cuts rectangles only. Spread a tiling made of these."
                )
            if not item.slack:
                tiles.append(item)
            elif item.slack not in self.slacks or (position + 1 - self.origin) % item.slack or item.ready != position:
                raise TilingError(
                    f"Spread got {item} of slack {item.slack} after position {position} of {self.tiling!r}; it must be "
                    f"paid once ready, at origin + m slack - 1, its slack one of {self.slacks}. Spread another tiling."
                )
        return tiles

    def __repr__(self) -> str:
        return call(self)


def choose_phases(slacks: tuple[int, ...], every: int) -> tuple[int, ...]:
    """A phase below min(V, every) for every slack V, apart from the others' and from the large tiles without slack.

    First: as few steps as possible with another share; then: steps whose number n of known positions has few factors
    2, where tiles without slack are small; then: as far as possible from the other phases. Taken in ascending order of
    V, classes modulo powers of two fit without a clash whenever their densities 1 / min(V, every) sum to at most 1
    (Kraft).
    """
    chosen: list[tuple[int, int]] = []
    for slack in sorted(slacks):
        period = min(slack, every)

        def rank(phase: int, period: int = period) -> tuple[int, int, int, int]:
            gaps = [min((phase - other) % cycle, (other - phase) % cycle) for other, cycle in chosen]
            return gaps.count(0), low_bit(phase) if phase else period, -min(gaps, default=0), phase

        chosen.append((min(range(period), key=rank), period))
    return tuple(phase for phase, _ in chosen)


def _share(tile: Rectangle | None, part: range, parts: int) -> list[Share]:
    return [Share(tile, part, parts)] if tile is not None and part else []
