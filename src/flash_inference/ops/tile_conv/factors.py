"""How a circle of 2^q places is cut for a GPU: into what one program transforms, and that into what one lane does."""

from __future__ import annotations

from dataclasses import dataclass

WHOLE = 256
"""Places of a circle that one program transforms from sources to targets; larger ones are two factors in three passes.
"""


@dataclass(frozen=True, slots=True)
class Factor:
    """A transform of `size` places by one program: E numbers a lane, T after an exchange, for L channels at once."""

    size: int

    @property
    def numbers(self) -> tuple[int, int]:
        """(E, T), as equal as they can be: E T is the size."""
        e = 1 << (self.size.bit_length() - 1) // 2
        return e, self.size // e

    @property
    def channels(self) -> int:
        """L: 32 are 128 bytes of a row. More where few numbers stand in a warp, fewer where many fill its registers."""
        return 64 if self.size < 64 else max(8, min(32, 8192 // self.size))

    @property
    def launch(self) -> dict[str, int]:
        """What a launch takes."""
        E, T = self.numbers
        return {"E": E, "T": T, "L": self.channels, "num_warps": max(1, min(E * self.channels // 32, 16))}

    def programs(self, lanes: int) -> int:
        """How many programs so many channels take."""
        return -(-lanes // self.channels)


def factors(size: int) -> tuple[Factor, Factor]:
    """(outer, inner) of a circle of that many places: 1 and all of them, or two of about the same size."""
    outer = 1 if size <= WHOLE else 1 << (size.bit_length() - 1) // 2
    return Factor(outer), Factor(size // outer)


def scratch_numbers(size: int, lanes: int) -> int:
    """How many float32 numbers a circle of that size takes between its passes, for so many channels."""
    return 0 if size <= WHOLE else 2 * size * lanes
