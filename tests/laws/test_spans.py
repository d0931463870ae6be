"""A chunk that arrives at once pays, with the steps around it, every pair exactly once, in few tiles."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_inference.errors import TilingError
from flash_inference.tiling import (
    Blocked,
    Clipped,
    Eager,
    Epoched,
    Lazy,
    Pair,
    Parallelogram,
    Prompted,
    Rectangle,
    Relaxed,
    Separated,
    Share,
    Span,
    Spread,
    Staggered,
    Tiling,
    TwiceRelaxed,
    verify_span,
)

Make = Callable[[int | None, int | None], Tiling]

FAMILIES: dict[str, Make] = {
    "lazy": lambda length, taps: Lazy(length, taps=taps),
    "eager": lambda length, taps: Eager(length, taps=taps),
    "relaxed": lambda length, taps: Relaxed(length, taps=taps),
    "blocked-1": lambda length, taps: Blocked(length, 1, taps=taps),
    "blocked-4": lambda length, taps: Blocked(length, 4, taps=taps),
    "blocked-32": lambda length, taps: Blocked(length, taps=taps),
    "epoched-auto": lambda length, taps: Epoched(length, taps=taps),
    "epoched-5": lambda length, taps: Epoched(length, 5, taps=taps),
    "separated-1": lambda length, taps: Separated(length, 1, taps=taps),
    "separated-4-4": lambda length, taps: Separated(length, 4, 4, taps=taps),
    "separated-8-2": lambda length, taps: Separated(length, 8, 2, taps=taps),
    "staggered-1": lambda length, taps: Staggered(length, 1, taps=taps),
    "staggered-4-4-3": lambda length, taps: Staggered(length, 4, 4, 3, taps=taps),
    "staggered-8-2-6": lambda length, taps: Staggered(length, 8, 2, 6, taps=taps),
    "spread-1-1": lambda length, taps: Spread(Separated(length, 1, taps=taps), 1),
    "spread-2-4": lambda length, taps: Spread(Separated(length, 2, 2, taps=taps), 4),
    "spread-4-2": lambda length, taps: Spread(Separated(length, 4, taps=taps), 2),
    "spread-8-32": lambda length, taps: Spread(Separated(length, 8, taps=taps)),
    "prompted-blocked": lambda length, taps: Prompted(Blocked(length, 4, taps=taps), 6),
    "prompted-spread": lambda length, taps: Prompted(Spread(Separated(length, 2, taps=taps), 2), 5),
    "spread-prompted": lambda length, taps: Spread(Prompted(Separated(length, 2, taps=taps), 5), 2),
}
GROWING: dict[str, Make] = {"twice-relaxed": lambda length, taps: TwiceRelaxed(length)}
ALL = FAMILIES | GROWING

families = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


@families
@pytest.mark.parametrize("length", [1, 2, 13, 16, 21])
def test_every_chunk_of_short_tilings(make: Make, length: int) -> None:
    tiling = make(length, None)
    assert tiling.length is not None
    for start in range(tiling.length):
        for stop in range(start + 1, tiling.length + 1):
            verify_span(tiling, start, stop - start)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), name=st.sampled_from(list(ALL)), length=st.integers(1, 200))
def test_any_chunk(data: st.DataObject, name: str, length: int) -> None:
    taps = data.draw(st.one_of(st.none(), st.integers(1, 220))) if name in FAMILIES else None
    tiling = ALL[name](length, taps)
    assert tiling.length is not None
    start = data.draw(st.integers(0, tiling.length - 1))
    n = data.draw(st.integers(1, tiling.length - start))
    verify_span(tiling, start, n, taps)


@settings(deadline=None, max_examples=100)
@given(
    make=st.sampled_from(list(FAMILIES.values())),
    taps=st.integers(1, 70),
    start=st.integers(0, 200),
    n=st.integers(1, 150),
    beyond=st.integers(0, 100),
)
def test_any_chunk_of_an_endless_stream(make: Make, taps: int, start: int, n: int, beyond: int) -> None:
    verify_span(make(None, taps), start, n, taps, horizon=start + n + beyond)


@families
def test_two_chunks_by_counting_pairs_one_by_one(make: Make) -> None:
    """The convention in full: span, loop, span again, each pair counted on its own."""
    tiling = make(40, None)
    assert tiling.length is not None
    paid: defaultdict[Pair, Fraction] = defaultdict(Fraction)

    def pay(item: Rectangle | Parallelogram | Clipped | Share) -> None:
        tile, part = (
            (item.tile, Fraction(len(item.part), item.parts)) if isinstance(item, Share) else (item, Fraction(1))
        )
        for pair in tile.pairs():
            paid[pair] += part

    def chunk(start: int, n: int) -> None:
        span = tiling.span(start, n)
        for item in span.before:
            pay(item)
        for target in range(start, start + n):
            for source in range(start, target + 1):
                paid[source, target] += 1
        for item in span.after:
            pay(item)

    def steps(first: int, stop: int) -> None:
        """Positions first .. stop - 1 one by one, position first - 1 known and not paid."""
        for position in range(first, stop):
            for item in tiling.after(position - 1):
                pay(item)
            for pair in tiling.inline(position):
                paid[pair] += 1

    chunk(0, 7)
    steps(7, 12)
    for item in tiling.after(11):
        pay(item)
    chunk(12, 15)
    steps(27, tiling.length)
    inside = {(i, j): Fraction(1) for j in range(tiling.length) for i in range(j + 1)}
    assert {pair: count for pair, count in paid.items() if pair[1] < tiling.length} == inside


FEW = {
    "lazy": 1,
    "eager": 1,
    "epoched-auto": 3,
    "epoched-5": 3,
    "prompted-lazy": 2,
    **{name: 24 for name in ("relaxed", "blocked-1", "blocked-4", "blocked-32")},
    **{name: 80 for name in ("separated-1", "separated-4-4", "separated-8-2")},
    **{name: 100 for name in ("spread-1-1", "spread-2-4", "spread-4-2", "spread-8-32")},
    "twice-relaxed": 90,
}


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(("start", "n"), [(0, 10**6), (123_457, 10**6), (65_536, 4096), (999_999, 3)])
def test_long_chunks_take_few_tiles(name: str, start: int, n: int) -> None:
    tiling = Prompted(Lazy(1 << 21), 500_000) if name == "prompted-lazy" else ALL[name](1 << 21, None)
    began = time.perf_counter()
    span = tiling.span(start, n)
    assert time.perf_counter() - began < 0.5
    assert len(span.before) + len(span.after) <= FEW[name]
    assert start or not span.before


@families
def test_a_chunk_of_one_owes_nothing_after(make: Make) -> None:
    tiling = make(32, None)
    assert all(tiling.span(start, 1).after == () for start in range(32))


def test_a_chunk_of_one_needs_the_inline_pairs_of_its_block() -> None:
    assert Blocked(32, 8).span(11, 1) == Span(11, 12, (Rectangle(range(8, 11), range(11, 12)),), ())


def test_a_chunk_in_the_prompt_takes_one_rectangle() -> None:
    tiling = Prompted(Blocked(32, 8), 20)
    assert tiling.span(5, 9) == Span(5, 14, (Rectangle(range(5), range(5, 14)),), ())
    assert tiling.span(5, 15).after == (), "after(19) is the loop's"
    assert tiling.span(5, 16).after == (Rectangle(range(20), range(21, 52)),)


def test_what_is_left_of_a_tile_in_flight_is_one_share() -> None:
    tiling = Spread(Separated(256, near=8), every=4)
    for start in range(1, 255):
        shares = [item for item in tiling.span(start, 256 - start).before if isinstance(item, Share)]
        assert len(shares) <= len(tiling.slacks)
        assert all(item.part.stop == item.parts for item in shares)


@dataclass
class Given:
    """A tiling with a span of someone else's making."""

    tiling: Tiling
    answer: Span

    def __getattr__(self, name: str) -> object:
        return getattr(self.tiling, name)

    def span(self, start: int, n: int) -> Span:
        return self.answer


def box(s0: int, s1: int, t0: int, t1: int) -> Rectangle:
    return Rectangle(range(s0, s1), range(t0, t1))


GOOD = Relaxed(16).span(5, 5)

BROKEN = {
    "nothing before": (Span(5, 10, (), GOOD.after), r"pair \(4, 6\) is not paid"),
    "nothing after": (Span(5, 10, GOOD.before, ()), r"pair \(0, 10\) is not paid"),
    "paid before already": (
        Span(5, 10, (*GOOD.before, box(0, 4, 5, 6)), GOOD.after),
        r"\(0, 5\) is paid twice.*before",
    ),
    "paid by the loop": (Span(5, 10, GOOD.before, (*GOOD.after, box(8, 9, 10, 12))), r"\(8, 10\) is paid twice.*after"),
    "source in the chunk": (Span(5, 10, (box(4, 6, 6, 8),), GOOD.after), r"before holds .*pair \(5, 6\)"),
    "target in the chunk": (Span(5, 10, GOOD.before, (box(4, 5, 9, 10),)), r"after holds .*pair \(4, 9\)"),
    "another chunk": (Span(5, 11, GOOD.before, GOOD.after), r"span\(5, 5\) says 5\.\.11"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_spans_are_named(name: str) -> None:
    answer, message = BROKEN[name]
    with pytest.raises(TilingError, match=message):
        verify_span(Given(Relaxed(16), answer), 5, 5)


def test_a_span_reads_no_tap_newer_than_its_chunk() -> None:
    good = TwiceRelaxed(16).span(5, 5)
    late = Clipped(Parallelogram(range(0, 1), range(5, 12)), range(5, 10))
    answer = Span(5, 10, (late, *good.before[1:]), good.after)
    with pytest.raises(TilingError, match="lags below 10"):
        verify_span(Given(TwiceRelaxed(16), answer), 5, 5)


@families
@pytest.mark.parametrize(("start", "n"), [(0, 0), (3, -1), (-1, 4), (30, 99), (99, 1)])
def test_chunks_outside(make: Make, start: int, n: int) -> None:
    with pytest.raises(TilingError, match=r"got a span of n=|got position"):
        make(32, None).span(start, n)
