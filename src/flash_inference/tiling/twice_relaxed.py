"""TwiceRelaxed: for filters that are known only as generation proceeds."""

from __future__ import annotations

from dataclasses import dataclass

from flash_inference.errors import TilingError

from .tile import Clipped, Pair, Parallelogram, Span
from .triangle import call, check_position, check_span, require


@dataclass(frozen=True, repr=False)
class TwiceRelaxed:
    """Parallelograms of sources and lags: tap k is known from position k on, as source k is.

    After position t, n = t + 1, for every U = 2^q with U | n and 2 U <= n: sources [n - U, n) x lags [U, 2 U) and,
    unless n = 2 U, sources [U, 2 U) x lags [n - U, n). Inline at t: (t, t) and (0, t), which need tap 0 and tap t.
    A pair of source i and lag k, both >= 1, stands in the tile of the largest U = 2^q <= min(i, k), paid at the first
    multiple n of U beyond max(i, k). Parts of a tile beyond the length pay nothing.
    Cost: about twice Relaxed's. Source: van der Hoeven, "Relax, but don't be too lazy" (2002).
    """

    length: int | None

    def __post_init__(self) -> None:
        if self.length is None:
            raise TilingError(
                "TwiceRelaxed got length=None; a filter that grows with the sequence has no cap. Pass the length."
            )
        require("TwiceRelaxed", "length", self.length, minimum=1)

    @property
    def _length(self) -> int:
        assert self.length is not None
        return self.length

    @property
    def taps(self) -> int | None:
        """None: every lag of the length counts."""
        return None

    @property
    def block(self) -> int:
        """1: aligned blocks hold (t, t) only."""
        return 1

    @property
    def origin(self) -> int:
        """0."""
        return 0

    @property
    def slacks(self) -> tuple[int, ...]:
        """None has slack."""
        return ()

    @property
    def reach(self) -> tuple[int, int]:
        """Back to source 1; ahead less than half the length."""
        return max(0, self._length - 2), (self._length - 1) // 2

    def after(self, position: int) -> tuple[Parallelogram, ...]:
        """One parallelogram or two for every U that divides position + 1."""
        n = check_position(self, self.length, position) + 1
        tiles: list[Parallelogram] = []
        side = 1
        while n % side == 0 and 2 * side <= n:
            tiles += self._tile((n - side, n), (side, min(2 * side, self._length - n + side)))
            if n != 2 * side:
                tiles += self._tile((side, min(2 * side, self._length - n + side)), (n - side, n))
            side *= 2
        return tuple(tiles)

    def inline(self, position: int) -> tuple[Pair, ...]:
        """(0, position) and (position, position)."""
        check_position(self, self.length, position)
        return ((0, position), (position, position)) if position else ((0, 0),)

    def span(self, start: int, n: int) -> Span:
        """Two parallelograms for every side on either side of the chunk, cut at its targets.

        Those before it have sources < start and taps < stop: the chunk's own taps are read too.
        """
        stop = check_span(self, self.length, start, n)
        chunk, beyond = range(start, stop), range(stop, self._length)
        before = self._clip((0, min(1, start)), (start, stop), chunk)
        after: list[Clipped] = []
        side = 1
        while side < stop:
            first, last = start - start % side, (stop - 1) - (stop - 1) % side
            own, far = (side, min(2 * side, start)), (side, 2 * side)
            before += self._clip((max(first, side), start), (side, 2 * side), chunk)
            before += self._clip(own, (max(first, 2 * side), stop), chunk)
            oldest = max(first, stop - 2 * side + 1)
            after += self._clip((max(oldest, side), last), (side, 2 * side), beyond)
            after += self._clip(far, (max(oldest, 2 * side), last), beyond)
            side *= 2
        return Span(start, stop, tuple(before), tuple(after))

    @staticmethod
    def _tile(sources: tuple[int, int], lags: tuple[int, int]) -> list[Parallelogram]:
        empty = sources[0] >= sources[1] or lags[0] >= lags[1]
        return [] if empty else [Parallelogram(range(*sources), range(*lags))]

    def _clip(self, sources: tuple[int, int], lags: tuple[int, int], targets: range) -> list[Clipped]:
        """The pairs with a target in `targets`; the bounds drawn in to those that have one."""
        sources = max(sources[0], targets.start - lags[1] + 1), min(sources[1], targets.stop - lags[0])
        lags = max(lags[0], targets.start - sources[1] + 1), min(lags[1], targets.stop - sources[0])
        return [Clipped(tile, targets) for tile in self._tile(sources, lags)]

    def __repr__(self) -> str:
        return call(self)
