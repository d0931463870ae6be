"""Who has been paid: the books that Cover is checked with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

from flash_inference.errors import TilingError

from .tile import Item, Pair, Share, sources_at, targets_of

Payment = tuple[str, Item]
"""(where it is paid, what is paid)."""


class Ledger:
    """Who has been paid: for each target a bit set of sources, once for every equal part of the channels."""

    def __init__(self, name: str, horizon: int, payments: Sequence[Payment]) -> None:
        self.name = name
        self.payments = payments
        self.parts = math.lcm(*(item.parts for _, item in payments if isinstance(item, Share)))
        self.rows = [[0] * horizon for _ in range(self.parts)]
        for label, item in payments:
            self._pay(label, item)

    def _pay(self, label: str, item: Item) -> None:
        planes = self.rows
        if isinstance(item, Share):
            scale = self.parts // item.parts
            planes = planes[item.part.start * scale : item.part.stop * scale]
        rows = targets_of(item)
        for target in range(rows.start, min(rows.stop, len(self.rows[0]))):
            run = sources_at(item, target)
            if run:
                mask = ((1 << len(run)) - 1) << run.start
                for plane in planes:
                    if plane[target] & mask:
                        self._twice(plane[target] & mask, target, label, item)
                    plane[target] |= mask

    def inline(self, step: int, pairs: Sequence[Pair]) -> None:
        """Pays the inline pairs of a step."""
        for source, target in pairs:
            for plane in self.rows:
                if plane[target] >> source & 1:
                    self._twice(1 << source, target, f"inline({step})", None)
                plane[target] |= 1 << source

    def settle(self, taps: int | None) -> None:
        """Every pair whose lag is below taps has been paid, in all channels."""
        for part, plane in enumerate(self.rows):
            for target, row in enumerate(plane):
                first = 0 if taps is None else max(0, target + 1 - taps)
                unpaid = ((1 << (target + 1)) - (1 << first)) & ~row
                if unpaid:
                    self._missing(_lowest(unpaid), target, part)

    def _missing(self, source: int, target: int, part: int) -> NoReturn:
        holders = self._holders(source, target)
        held = f"part {part} of {self.parts} of it is not in {', '.join(holders)}" if holders else "it is in no tile"
        raise TilingError(
            f"{self.name}: pair ({source}, {target}) is not paid: {held}, nor inline; Cover wants it once, at one "
            f"of the steps {source}..{max(source, target - 1)}. Add the tile that holds it."
        )

    def _twice(self, overlap: int, target: int, label: str, item: Item | None) -> NoReturn:
        source = _lowest(overlap)
        payers = [*self._holders(source, target), *([] if item else [label])]
        raise TilingError(
            f"{self.name}: pair ({source}, {target}) is paid twice, in {' and in '.join(payers)}, or twice in one "
            "of them; Cover wants it once. Drop one."
        )

    def _holders(self, source: int, target: int) -> list[str]:
        """The tiles that hold a pair, with their steps."""
        return [
            f"{label}: {item}"
            for label, item in self.payments
            if target in targets_of(item) and source in sources_at(item, target)
        ]


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
