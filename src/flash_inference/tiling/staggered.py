"""Staggered: Relaxed's large squares a near-block late, on a clock that groups of channels shift against each other."""

from __future__ import annotations

from dataclasses import dataclass

from .diagonal import Diagonal
from .tile import Rectangle
from .triangle import Level, low_bit, next_power, require


@dataclass(frozen=True, repr=False)
class Staggered(Diagonal):
    """Relaxed up to side `near`; above it, squares whose targets wait one near-block more: a slack of `near` each.

    When n positions are known, n a multiple of near: sources [n - V, n) to targets [n + near, n + near + V), with
    V = near times the largest power of two that divides n / near + shift. With `block`, pairs inside an aligned block
    of positions are inline, as in Blocked.

    Why it covers: squares up to near pay near-blocks at distance 1. Call target block j + 1 j: then Relaxed's squares
    over near-blocks, begun at block -shift, pay every source block i < j once, which is every distance >= 2.
    Cost: Relaxed's, and one more square as large as the length if shift > 0, yet no step must pay a tile of more than
    `near` targets. Where channels are split in 2^q groups with shifts 0 .. 2^q - 1, one group in two pays V = near at
    each block, one in four 2 near, and so on: the work of every block is the same, up to the largest sides.
    Source: the shifted squares are those of Oncescu et al., arXiv 2410.12982; the slack, as in Gardner (1995).
    """

    shift: int = 0

    def __post_init__(self) -> None:
        Diagonal.__post_init__(self)
        require("Staggered", "shift", self.shift, minimum=0)

    @property
    def top(self) -> int:
        """The largest side of the late squares; 0 if there are none."""
        return 0 if self.suffices else max(next_power(self.limit), self.near)

    @property
    def slacks(self) -> tuple[int, ...]:
        """near, if there are late squares."""
        return (self.near,) if self.top else ()

    @property
    def reach(self) -> tuple[int, int]:
        """Back by the largest side, ahead by that and near."""
        return max(self.top, self.cap), self.top + self.near if self.top else self.cap

    def side(self, n: int) -> int:
        """V of the late square that is paid when n positions are known; 0 for none."""
        return 0 if n % self.near else min(self.near * low_bit(n // self.near + self.shift), self.top)

    def off(self, n: int) -> tuple[Rectangle, ...]:
        """The late square."""
        side = self.side(n)
        return self.rectangle((n - side, n), (n + self.near, n + self.near + side)) if side else ()

    def off_levels(self) -> list[Level]:
        """One level a side."""
        return [self._level(self.near << q) for q in range((self.top // self.near).bit_length())]

    def _level(self, size: int) -> Level:
        every = size if size == self.top else 2 * size
        phase = ((size // self.near - self.shift) * self.near) % every
        return Level(every, size, size + self.near, self.off, phase)
