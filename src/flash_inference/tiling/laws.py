"""The two laws that make a tiling exact, and their check by brute force.

Straddle: what is paid after position t has ready <= t < due. Cover: every pair whose lag counts stands exactly once in
the tiles or the inline pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from flash_inference.errors import TilingError

from .ledger import Ledger, Payment
from .tile import Clipped, Item, Pair, Parallelogram, Rectangle, Share, Span, Tile, sources_at, targets_of


class Tiling(Protocol):
    """Which tiles may be paid when position t has just become known.

    Pure and random-access: any question may be asked in any order, at O(log length) integer work. Tiles are clipped to
    the length and never empty.
    """

    @property
    def length(self) -> int | None:
        """The number of positions; None: endless."""
        ...

    @property
    def taps(self) -> int | None:
        """The filter length that the tiling is built for; None: every lag counts."""
        ...

    @property
    def block(self) -> int:
        """Pairs inside one aligned block of this many positions are inline; 1: only (t, t)."""
        ...

    @property
    def origin(self) -> int:
        """Where aligned blocks start."""
        ...

    @property
    def reach(self) -> tuple[int, int]:
        """(back, ahead): what after(t) pays has sources.start >= t + 1 - back and targets.stop <= t + 1 + ahead."""
        ...

    @property
    def slacks(self) -> tuple[int, ...]:
        """The distinct slacks > 0 of the tiles, ascending."""
        ...

    def after(self, position: int) -> Sequence[Tile | Share]:
        """What is paid once `position` is known, before position + 1 is read."""
        ...

    def inline(self, position: int) -> Sequence[Pair]:
        """The pairs that the step at `position` pays itself, (position, position) among them."""
        ...

    def span(self, start: int, n: int) -> Span:
        """What a chunk of n positions that arrives at once owes before it and after it (see `Span`)."""
        ...


def verify(tiling: Tiling, taps: int | None = None, horizon: int | None = None) -> None:
    """Raises TilingError, naming the pair, the tile and the step, unless both laws hold over targets < horizon.

    taps: lags below it must be paid; the others may be, once. None: every lag must. horizon: by default the length.
    Checks the claims `reach`, `slacks` and `block` too. Cost: O(horizon) big-integer operations of horizon bits a tile.
    """
    horizon = _horizon(tiling, horizon)
    payments = list(_steps(tiling, range(horizon)))
    ledger = Ledger(repr(tiling), horizon, payments)
    for step in range(horizon):
        ledger.inline(step, _inline(tiling, step))
    ledger.settle(taps)


def verify_span(tiling: Tiling, start: int, n: int, taps: int | None = None, horizon: int | None = None) -> None:
    """Raises TilingError unless tiling.span(start, n), between the steps before and after it, obeys Cover."""
    horizon = _horizon(tiling, horizon)
    stop = start + n
    span = tiling.span(start, n)
    name = f"span({start}, {n})"
    if (span.start, span.stop) != (start, stop):
        raise TilingError(f"{tiling!r}: {name} says {span.start}..{span.stop}, not {start}..{stop}. Correct it.")
    for label, items, sources, targets in (
        ("before", span.before, range(start), range(start, stop)),
        ("after", span.after, range(stop - 1), range(stop, tiling.length or 1 << 62)),
    ):
        for item in items:
            _check_inside(f"{tiling!r}: {name}.{label}", item, sources, targets, stop)
    chunk = [("the chunk's forward", Rectangle(range(start, j + 1), range(j, j + 1))) for j in range(start, stop)]
    payments: list[Payment] = [
        *_steps(tiling, range(start)),
        *((f"{name}.before", item) for item in span.before),
        *chunk,
        *((f"{name}.after", item) for item in span.after),
        *_steps(tiling, range(stop - 1, horizon)),
    ]
    ledger = Ledger(repr(tiling), horizon, payments)
    for step in (*range(start), *range(stop, horizon)):
        ledger.inline(step, _inline(tiling, step))
    ledger.settle(taps)


def _horizon(tiling: Tiling, horizon: int | None) -> int:
    if tiling.length is None and horizon is None:
        raise TilingError(f"{tiling!r} is endless; verify got no horizon. Pass horizon=, a number of positions.")
    bounds = [x for x in (tiling.length, horizon) if x is not None]
    return min(bounds)


def _steps(tiling: Tiling, steps: range) -> Iterator[Payment]:
    """What the steps pay, each tile checked on its own: shape, Straddle, and the tiling's claims."""
    (back, ahead), slacks = tiling.reach, frozenset(tiling.slacks)
    for step in steps:
        for item in tiling.after(step):
            tile = item.tile if isinstance(item, Share) else item
            where = f"{tiling!r}: after({step}) pays {item}"
            if not tile.area or (isinstance(item, Share) and not 0 <= item.part.start < item.part.stop <= item.parts):
                raise TilingError(f"{where}, which is empty. Drop it.")
            if not tile.ready <= step < tile.due:
                raise TilingError(
                    f"{where} at step {step}, but it may be paid at steps {tile.ready}..{tile.due - 1} only: pair "
                    f"({tile.sources.stop - 1}, {tile.due}) breaks Straddle. Pay it once ready, before it is due."
                )
            stop = targets_of(tile).stop
            if isinstance(tile, Parallelogram) and tiling.length is not None:
                stop = min(stop, tiling.length)
            if tile.sources.start < 0 or (tiling.length is not None and stop > tiling.length):
                raise TilingError(
                    f"{where}, pair ({tile.sources.start}, {stop - 1}) included, at step {step}: "
                    f"outside positions 0..{tiling.length}. Clip it."
                )
            if tile.sources.start < step + 1 - back or stop > step + 1 + ahead:
                raise TilingError(
                    f"{where}, pair ({tile.sources.start}, {stop - 1}) included, beyond its reach ({back}, {ahead}) "
                    f"around {step + 1} at step {step}. State a larger reach."
                )
            if tile.slack > 0 and tile.slack not in slacks:
                raise TilingError(
                    f"{where} of slack {tile.slack}, from pair ({tile.ready}, {tile.due}), at step {step}; "
                    f"slacks says {tiling.slacks}. Name it there."
                )
            yield f"after({step})", item


def _inline(tiling: Tiling, step: int) -> Sequence[Pair]:
    """The inline pairs of a step, checked to end there and to hold what `block` promises."""
    pairs = tiling.inline(step)
    for source, target in pairs:
        if target != step or not 0 <= source <= step:
            raise TilingError(
                f"{tiling!r}: inline({step}) holds pair ({source}, {target}), no tile; step {step} can pay pairs "
                f"(0..{step}, {step}) only. Move it."
            )
    passed = (step - tiling.origin) % tiling.block if step >= tiling.origin else 0
    absent = {(source, step) for source in range(max(0, step - passed), step + 1)}.difference(pairs)
    if absent:
        raise TilingError(
            f"{tiling!r}: inline({step}) lacks pair {min(absent)} at step {step}, which block={tiling.block} says is "
            "inline, in no tile. Return it."
        )
    return pairs


def _check_inside(where: str, item: Item, sources: range, targets: range, known: int) -> None:
    """A span's item has sources in `sources`, targets in `targets`, and lags < known, as taps may be no newer."""
    rows = targets_of(item)
    lags = item.tile.lags if isinstance(item, Clipped) else item.lags if isinstance(item, Parallelogram) else range(0)
    for target in (rows.start, rows.stop - 1) if rows else ():
        run = sources_at(item, target)
        inside = not run or (run.start in sources and run[-1] in sources and target in targets)
        if not inside or lags.stop > known:
            pair = (run[-1] if run else rows.start - lags.start, target)
            raise TilingError(
                f"{where} holds {item}, pair {pair} included; sources must lie in {sources}, targets in {targets}, "
                f"lags below {known}. Clip it."
            )
