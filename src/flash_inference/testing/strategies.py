"""Hypothesis strategies for what the library is built from: lengths, chunk splits, tilings. Needs hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Iterable

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("flash_inference.testing.strategies needs hypothesis: pip install hypothesis") from error

from flash_inference.tiling import Blocked, Eager, Epoched, Lazy, Prompted, Relaxed, Separated, Spread, Tiling

PRIMES = (2, 3, 5, 7, 13, 31, 61, 97, 127, 251, 257, 509)


def lengths(most: int = 257) -> st.SearchStrategy[int]:
    """Numbers of positions up to `most`: 1, primes, powers of two and their neighbours, or any."""
    powers = [1 << q for q in range(most.bit_length())]
    corners = {1, *PRIMES, *(p + d for p in powers for d in (-1, 0, 1))}
    return st.one_of(st.sampled_from(sorted(n for n in corners if 1 <= n <= most)), st.integers(1, most))


@st.composite
def chunks(draw: st.DrawFn, total: int, most: int | None = None) -> list[int]:
    """A split of `total` positions into chunks of at most `most`: single steps, small chunks and large ones mixed."""
    sizes: list[int] = []
    left = total
    while left:
        kind = draw(st.sampled_from(("steps", "small", "large")))
        top = min(left, most or left)
        if kind == "steps":
            run = min(draw(st.integers(1, 40)), left)
            sizes += [1] * run
            left -= run
        else:
            size = draw(st.integers(1, min(top, 9) if kind == "small" else top))
            sizes.append(size)
            left -= size
    return sizes


Make = Callable[[int | None, int | None], Tiling]

KINDS: dict[str, Make] = {
    "Lazy": lambda length, taps: Lazy(length, taps=taps),
    "Eager": lambda length, taps: Eager(length, taps=taps),
    "Relaxed": lambda length, taps: Relaxed(length, taps=taps),
    "Blocked-1": lambda length, taps: Blocked(length, 1, taps=taps),
    "Blocked-4": lambda length, taps: Blocked(length, 4, taps=taps),
    "Blocked-32": lambda length, taps: Blocked(length, 32, taps=taps),
    "Epoched": lambda length, taps: Epoched(length, taps=taps),
    "Epoched-7": lambda length, taps: Epoched(length, 7, taps=taps),
    "Separated-4": lambda length, taps: Separated(length, 4, taps=taps),
    "Separated-8-4": lambda length, taps: Separated(length, 8, 4, taps=taps),
    "Separated-64-32": lambda length, taps: Separated(length, 64, 32, taps=taps),
    "Spread-4-2": lambda length, taps: Spread(Separated(length, 4, taps=taps), 2),
    "Spread-8-4-4": lambda length, taps: Spread(Separated(length, 8, 4, taps=taps), 4),
    "Spread-16-8-16": lambda length, taps: Spread(Separated(length, 16, 8, taps=taps), 16),
}
"""Every tiling of rectangles by name: (length or None, taps or None) -> tiling."""


def makers() -> st.SearchStrategy[Make]:
    """One of `KINDS`."""
    return st.sampled_from(sorted(KINDS)).map(KINDS.__getitem__)


@st.composite
def tilings(draw: st.DrawFn, length: int | None, taps: int | None = None) -> Tiling:
    """A tiling of `length` positions (None: endless, needs `taps`), perhaps after a prompt: any of `KINDS`."""
    make = draw(makers())
    if length is None or length < 2 or draw(st.booleans()):
        return make(length, taps)
    prompt = draw(st.integers(1, length - 1))
    return Prompted(make(length - prompt, taps), prompt)


def names(values: Iterable[object]) -> list[str]:
    """Test ids that read as the values do."""
    return [str(value).replace(" ", "") for value in values]
