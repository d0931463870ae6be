"""Separated: large tiles stand one side away from the diagonal, so that none is urgent."""

from __future__ import annotations

from dataclasses import dataclass, field

from .diagonal import Diagonal
from .tile import Rectangle
from .triangle import Level, next_power


@dataclass(frozen=True, repr=False)
class Separated(Diagonal):
    """Relaxed up to side `near`; above it, tiles of targets V with slack exactly V, for V = near, 2 near, .., N/4.

    Write V-block s for positions [s V, (s + 1) V). When V-block s is complete, after position (s + 1) V - 1:
    V-block s + 2 is paid from V-block s, and from V-block s - 1 too if s is odd. At the largest V, it is paid from
    every V-block <= s that has a lag below taps in it. N is the smaller of the powers of two >= length and >= taps.
    Inside an aligned `block` of positions, pairs are inline, as in Blocked.

    Why it covers: squares pay near-blocks at distance 1; level V pays V-blocks at distance 2, and 3 from even to odd.
    What is left lies at a distance >= 2 in blocks of 2 V, and the next level starts from there.
    Cost: about twice Relaxed's FFT work for the large sides; no step must pay a tile of more than `near` targets.
    Source: Gardner (1995), whose tiles stand off the diagonal for the same reason.
    """

    levels: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        Diagonal.__post_init__(self)
        top = max(next_power(self.limit) // 4, self.near)
        sizes = [1 << q for q in range(self.near.bit_length() - 1, top.bit_length())]
        object.__setattr__(self, "levels", () if self.suffices else tuple(sizes))

    @property
    def slacks(self) -> tuple[int, ...]:
        """One slack a level: V itself."""
        return self.levels

    @property
    def reach(self) -> tuple[int, int]:
        """Back to the first source of a top tile; ahead 2 V of the largest V."""
        if not self.levels:
            return self.cap, self.cap
        top = self.levels[-1]
        return max(self._back(top), 2 * top), 2 * top

    def _back(self, size: int) -> int:
        """Sources of a tile of `size` start at n - back or later."""
        if size != self.levels[-1]:
            return 2 * size
        return -(-(self.limit - 1) // size) * size - size

    def off(self, n: int) -> tuple[Rectangle, ...]:
        """One tile for every level that has a block that ends at n."""
        tiles = ()
        for size in self.levels:
            if n % size:
                break
            tiles += self._apart(size, n)
        return tiles

    def _apart(self, size: int, n: int) -> tuple[Rectangle, ...]:
        """The tile of level `size` when n positions, a multiple of size, are known."""
        if size == self.levels[-1]:
            first = 0 if self.taps is None else (n + size - self.taps + 1) // size * size
        else:
            first = n - size if (n // size) % 2 else n - 2 * size
        return self.rectangle((first, n), (n + size, n + 2 * size))

    def off_levels(self) -> list[Level]:
        """One level a size."""
        return [Level(V, self._back(V), 2 * V, lambda n, V=V: self._apart(V, n)) for V in self.levels]
