"""Every tiling obeys Straddle and Cover, whatever its length, filter, block, cap, prompt; verify() names the others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_inference.errors import TilingError
from flash_inference.tiling import (
    TILINGS,
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
    Tile,
    Tiling,
    TwiceRelaxed,
    cost,
    verify,
)

Make = Callable[[int | None, int | None], Tiling]

FAMILIES: dict[str, Make] = {
    "lazy": lambda length, taps: Lazy(length, taps=taps),
    "eager": lambda length, taps: Eager(length, taps=taps),
    "relaxed": lambda length, taps: Relaxed(length, taps=taps),
    **{f"blocked-{b}": lambda length, taps, b=b: Blocked(length, b, taps=taps) for b in (1, 2, 4, 8, 32)},
    **{
        f"epoched-{e or 'auto'}": lambda length, taps, e=e: Epoched(length, e, taps=taps) for e in (None, 1, 3, 10, 200)
    },
    **{
        f"separated-{near}-{block}": lambda length, taps, near=near, block=block: Separated(
            length, near, block, taps=taps
        )
        for near in (4, 8, 16)
        for block in (1, 4)
    },
    "separated-1-1": lambda length, taps: Separated(length, 1, taps=taps),
    "separated-default": lambda length, taps: Separated(length, taps=taps),
    **{
        f"spread-{near}-{every}": lambda length, taps, near=near, every=every: Spread(
            Separated(length, near, min(near, 2), taps=taps), every
        )
        for near, every in ((1, 1), (2, 1), (4, 2), (4, 8), (8, 32))
    },
    **{
        f"staggered-{near}-{block}-{shift}": lambda length, taps, near=near, block=block, shift=shift: Staggered(
            length, near, block, shift, taps=taps
        )
        for near, block in ((1, 1), (4, 1), (4, 4), (8, 2))
        for shift in (0, 1, 2, 3, 7)
    },
    "staggered-default": lambda length, taps: Staggered(length, taps=taps),
    "spread-staggered": lambda length, taps: Spread(Staggered(length, 8, 2, 5, taps=taps), 4),
    "prompted-blocked": lambda length, taps: Prompted(Blocked(length, 4, taps=taps), 5),
    "prompted-spread": lambda length, taps: Prompted(Spread(Separated(length, 4, taps=taps), 2), 7),
    "spread-prompted": lambda length, taps: Spread(Prompted(Separated(length, 4, taps=taps), 7), 2),
    "prompted-twice": lambda length, taps: Prompted(Prompted(Relaxed(length, taps=taps), 3), 2),
}

LENGTHS = (1, 2, 3, 7, 8, 9, 31, 64, 65, 97)
TAPS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 200)

families = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())


@families
def test_every_length(make: Make) -> None:
    for length in range(1, 131):
        verify(make(length, None))


def test_twice_relaxed_every_length() -> None:
    for length in range(1, 131):
        verify(TwiceRelaxed(length))


@families
@pytest.mark.parametrize("taps", TAPS)
def test_filters_of_any_length(make: Make, taps: int) -> None:
    for length in LENGTHS:
        verify(make(length, taps), taps)


@families
@pytest.mark.parametrize("taps", TAPS)
def test_endless(make: Make, taps: int) -> None:
    tiling = make(None, taps)
    assert tiling.length is None
    cap = 1 << (taps - 1).bit_length()
    for horizon in (1, cap, 2 * cap + 1, min(5 * cap, 300)):
        verify(tiling, taps, horizon)


@pytest.mark.parametrize("name", TILINGS)
def test_the_list_of_tilings(name: str) -> None:
    tiling = TILINGS[name](33)
    verify(tiling)
    assert tiling == TILINGS[name](33)
    assert tiling != TILINGS[name](34)
    assert eval(repr(tiling), {type(tiling).__name__: type(tiling)}) == tiling
    assert hash(tiling) == hash(TILINGS[name](33))


@settings(deadline=None, max_examples=120)
@given(
    make=st.sampled_from(list(FAMILIES.values())),
    length=st.one_of(st.none(), st.integers(1, 260)),
    taps=st.one_of(st.none(), st.integers(1, 300)),
    prompt=st.integers(0, 40),
    horizon=st.integers(1, 300),
)
def test_any_length_filter_prompt_horizon(
    make: Make, length: int | None, taps: int | None, prompt: int, horizon: int
) -> None:
    if length is None:
        taps = taps or 12
    verify(Prompted(make(length, taps), prompt), taps, horizon)


@settings(deadline=None, max_examples=120)
@given(
    length=st.integers(1, 300),
    block=st.integers(0, 4),
    above=st.integers(0, 4),
    every=st.integers(0, 6),
    taps=st.one_of(st.none(), st.integers(1, 300)),
)
def test_any_block_cap_and_spread(length: int, block: int, above: int, every: int, taps: int | None) -> None:
    separated = Separated(length, 1 << (block + above), 1 << block, taps=taps)
    verify(separated, taps)
    verify(Spread(separated, 1 << every), taps)
    verify(Blocked(length, 1 << block, taps=taps), taps)
    verify(Epoched(length, 1 + 7 * above + block, taps=taps), taps)


@pytest.mark.parametrize("length", [1 << p for p in range(1, 11)])
def test_relaxed_uses_half_the_length_over_the_side_of_each(length: int) -> None:
    shapes = cost(Relaxed(length)).shapes
    assert shapes == {(1 << q, 1 << q): length // (2 << q) for q in range(length.bit_length() - 1)}


@pytest.mark.parametrize("near", [1, 4, 16])
@pytest.mark.parametrize(("length", "taps"), [(512, None), (509, None), (600, 100), (None, 100), (None, 129)])
def test_separated_has_slack_of_its_level(length: int | None, taps: int | None, near: int) -> None:
    tiling = Separated(length, near, taps=taps)
    seen: set[int] = set()
    for position in range(length or 700):
        tiles = tiling.after(position)
        slacks = [tile.slack for tile in tiles]
        assert slacks == sorted(set(slacks)), "one tile a level, small ones first"
        seen.update(slacks)
        for tile in tiles:
            assert len(tile.targets) <= (tile.slack or near)
            if tile.slack:
                assert (position + 1) % tile.slack == 0
                assert tile.targets.start % tile.slack == 0
    assert seen - {0} == set(tiling.slacks)
    top = min(x for x in (length, taps) if x is not None)
    assert tiling.slacks == tuple(v for v in (1 << q for q in range(9)) if near <= v <= max(near, _power(top) // 4))


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@pytest.mark.parametrize(
    "make", [*FAMILIES.values(), lambda length, taps: TwiceRelaxed(length)], ids=[*FAMILIES, "twice"]
)
def test_cover_by_counting_pairs_one_by_one(make: Make) -> None:
    tiling = make(41, None)
    assert tiling.length is not None
    paid: defaultdict[Pair, Fraction] = defaultdict(Fraction)
    for step in range(tiling.length):
        for item in tiling.after(step):
            tile, part = (
                (item.tile, Fraction(len(item.part), item.parts)) if isinstance(item, Share) else (item, Fraction(1))
            )
            for source, target in tile.pairs():
                assert source <= tile.ready <= step < tile.due <= target
                paid[source, target] += part
        for pair in tiling.inline(step):
            paid[pair] += 1
    inside = {(i, j): Fraction(1) for j in range(tiling.length) for i in range(j + 1)}
    assert {pair: count for pair, count in paid.items() if pair[1] < tiling.length} == inside


@families
def test_any_order_of_questions(make: Make) -> None:
    tiling, again = make(97, None), make(97, None)
    assert tiling.length is not None
    steps = range(tiling.length)
    forward = [(tuple(tiling.after(t)), tuple(tiling.inline(t))) for t in steps]
    backward = [(tuple(again.after(t)), tuple(again.inline(t))) for t in reversed(steps)]
    assert forward == backward[::-1]
    assert tuple(tiling.after(tiling.length - 1)) == ()


@families
def test_questions_are_cheap_at_any_length(make: Make) -> None:
    tiling = make(1 << 40, None)
    for position in (0, (1 << 39) - 1, (1 << 39) + 12345, (1 << 40) - 2):
        assert len(tiling.after(position)) <= 80


@families
def test_positions_outside(make: Make) -> None:
    tiling = make(9, None)
    assert tiling.length is not None
    for position in (-1, tiling.length):
        with pytest.raises(TilingError, match=rf"got position {position}; it has positions 0\.\.{tiling.length - 1}"):
            tiling.after(position)
        with pytest.raises(TilingError, match=f"got position {position}"):
            tiling.inline(position)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 32])
def test_blocked_has_tiles_at_block_ends_only(block: int) -> None:
    for position in range(100):
        tiles = Blocked(100, block).after(position)
        assert not tiles or (position + 1) % block == 0
        assert all(len(tile.sources) >= block for tile in tiles)


def test_prompt_of_none_changes_nothing() -> None:
    tiling = Blocked(40, 4)
    assert all(Prompted(tiling, 0).after(t) == tiling.after(t) for t in range(40))
    assert Prompted(tiling, 6).origin == 6


def test_spread_of_a_tiling_without_slack_changes_nothing() -> None:
    for tiling in (Relaxed(50), TwiceRelaxed(50), Separated(50)):
        assert all(Spread(tiling).after(t) == tiling.after(t) for t in range(50))


def test_tiles_tell_their_kind() -> None:
    rectangle, parallelogram = Rectangle(range(0, 4), range(6, 8)), Parallelogram(range(2, 4), range(1, 2))
    assert (rectangle.ready, rectangle.due, rectangle.slack, rectangle.area) == (3, 6, 2, 8)
    assert (parallelogram.ready, parallelogram.due, parallelogram.slack, parallelogram.area) == (3, 3, -1, 2)
    assert list(parallelogram.pairs()) == [(2, 3), (3, 4)]
    assert list(Clipped(parallelogram, range(4, 9)).pairs()) == [(3, 4)]
    assert sorted(rectangle.pairs()) == [(i, j) for i in range(4) for j in (6, 7)]
    assert rectangle.shift(3) == Rectangle(range(3, 7), range(9, 11))
    assert rectangle.clip(range(2, 9), range(7)) == Rectangle(range(2, 4), range(6, 7))
    assert rectangle.clip(range(4, 9), range(9)) is None
    assert not hasattr(rectangle, "lags")
    assert not hasattr(parallelogram, "targets")
    share = Share(rectangle, range(1, 3), 3)
    assert [share.channels(count) for count in (3, 7, 1)] == [range(1, 3), range(2, 7), range(0, 1)]


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_shares_partition_the_channels(parts: int, channels: int) -> None:
    tile = Rectangle(range(1), range(1, 2))
    seen = Counter(c for part in range(parts) for c in Share(tile, range(part, part + 1), parts).channels(channels))
    assert seen == Counter(range(channels))


@dataclass
class Altered:
    """A tiling with some answers changed."""

    tiling: Tiling
    steps: dict[int, tuple[Tile | Share, ...]] = field(default_factory=dict)
    pairs: dict[int, tuple[Pair, ...]] = field(default_factory=dict)
    claims: dict[str, object] = field(default_factory=dict)

    def __getattr__(self, name: str) -> object:
        return self.claims[name] if name in self.claims else getattr(self.tiling, name)

    def after(self, position: int) -> Sequence[Tile | Share]:
        return self.steps.get(position, self.tiling.after(position))

    def inline(self, position: int) -> Sequence[Pair]:
        return self.pairs.get(position, self.tiling.inline(position))

    def span(self, start: int, n: int) -> Span:
        return self.tiling.span(start, n)

    def __repr__(self) -> str:
        return f"altered {self.tiling!r}"


def box(s0: int, s1: int, t0: int, t1: int) -> Rectangle:
    return Rectangle(range(s0, s1), range(t0, t1))


SEPARATED = Separated(64, 4)
FLIGHT = SEPARATED.after(15)[-1]
SHARES = Spread(SEPARATED, 4)
SHARE_STEP, SHARE = next((t, x) for t in range(64) for x in SHARES.after(t) if isinstance(x, Share) and x.parts > 1)

BROKEN: dict[str, tuple[Altered, tuple[str, ...]]] = {
    "missing tile": (Altered(Relaxed(16), {3: ()}), (r"\(0, 4\) is not paid", "steps 0..3")),
    "missing pair": (
        Altered(Relaxed(16), {3: (box(0, 4, 4, 7),)}),
        (r"\(0, 7\) is not paid", "steps 0..6"),
    ),
    "paid twice": (
        Altered(Relaxed(16), {5: (box(3, 6, 6, 8),)}),
        (r"\(3, 6\) is paid twice", r"after\(3\): .*range\(0, 4\)", r"after\(5\): .*range\(3, 6\)"),
    ),
    "paid twice at one step": (
        Altered(Lazy(8), {2: (box(0, 3, 3, 4), box(2, 3, 3, 4))}),
        (r"\(2, 3\) is paid twice", r"after\(2\)"),
    ),
    "tile of inline pair": (
        Altered(Blocked(16, 4), {4: (box(4, 5, 5, 6),)}),
        (r"\(4, 5\) is paid twice", r"after\(4\)", r"inline\(5\)"),
    ),
    "too late": (
        Altered(Relaxed(16), {3: (), 4: (box(4, 5, 5, 6), box(0, 4, 4, 8))}),
        (r"after\(4\) pays .*range\(0, 4\)", "at step 4, .* steps 3..3 only", r"pair \(3, 4\)"),
    ),
    "too early": (
        Altered(Relaxed(16), {2: (box(2, 3, 3, 4), box(0, 4, 4, 8)), 3: ()}),
        (r"after\(2\) pays .*range\(0, 4\)", "at step 2, .* steps 3..3 only", r"pair \(3, 4\)"),
    ),
    "unknown tap": (
        Altered(TwiceRelaxed(16), {1: (Parallelogram(range(1, 2), range(1, 3)),), 2: ()}),
        (r"after\(1\) pays Parallelogram", "at step 1, .* steps 2..1 only", r"pair \(1, 2\)"),
    ),
    "missing parallelogram": (Altered(TwiceRelaxed(16), {4: ()}), (r"\(1, 5\) is not paid", "steps 1..4")),
    "short reach back": (
        Altered(Relaxed(16), claims={"reach": (4, 8)}),
        (r"after\(7\) pays .*range\(0, 8\)", r"pair \(0, 15\)", r"reach \(4, 8\)", "step 7"),
    ),
    "short reach ahead": (
        Altered(Eager(16), claims={"reach": (1, 14)}),
        (r"after\(0\) pays", r"pair \(0, 15\)", r"reach \(1, 14\)", "step 0"),
    ),
    "unnamed slack": (
        Altered(SEPARATED, claims={"slacks": (4, 8)}),
        ("of slack 16", r"pair \(15, 32\)", "step 15"),
    ),
    "beyond the length": (Altered(Relaxed(12), {7: (box(0, 8, 8, 16),)}), (r"after\(7\)", r"pair \(0, 15\)", "step 7")),
    "empty tile": (Altered(Relaxed(12), {11: (box(11, 11, 12, 12),)}), (r"after\(11\) pays .* empty",)),
    "missing inline pair": (Altered(Lazy(9), pairs={4: ()}), (r"inline\(4\) lacks pair \(4, 4\) at step 4",)),
    "missing block pair": (
        Altered(Blocked(16, 4), pairs={6: ((4, 6), (6, 6))}),
        (r"inline\(6\) lacks pair \(5, 6\) at step 6", "block=4"),
    ),
    "inline pair twice": (Altered(Lazy(9), pairs={4: ((4, 4), (4, 4))}), (r"\(4, 4\) is paid twice", r"inline\(4\)")),
    "inline pair of a tile": (
        Altered(Lazy(9), pairs={4: ((2, 4), (4, 4))}),
        (r"\(2, 4\) is paid twice", r"after\(3\)", r"inline\(4\)"),
    ),
    "inline pair of another step": (
        Altered(Lazy(9), pairs={4: ((4, 4), (4, 5))}),
        (r"inline\(4\) holds pair \(4, 5\)",),
    ),
    "missing share": (
        Altered(SHARES, {SHARE_STEP: tuple(x for x in SHARES.after(SHARE_STEP) if x != SHARE)}),
        (r"pair \(\d+, \d+\) is not paid: part \d of \d+", r"after\(\d+\): Share"),
    ),
    "share twice": (
        Altered(SHARES, {SHARE_STEP: (*SHARES.after(SHARE_STEP), SHARE)}),
        (r"pair \(\d+, \d+\) is paid twice", rf"after\({SHARE_STEP}\): Share"),
    ),
    "share beside its tile": (
        Altered(SHARES, {15: (*SHARES.after(15), FLIGHT)}),
        (r"pair \(0, 32\) is paid twice", r"after\(15\)", "Share"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tilings_are_named(name: str) -> None:
    tiling, messages = BROKEN[name]
    for message in messages:
        with pytest.raises(TilingError, match=message):
            verify(tiling)


def test_verify_counts_lags_below_taps_only() -> None:
    verify(Lazy(40, taps=5), taps=5)
    with pytest.raises(TilingError, match=r"pair \(0, 5\) is not paid"):
        verify(Lazy(40, taps=5), taps=6)
    with pytest.raises(TilingError, match="got no horizon"):
        verify(Lazy(None, taps=5))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "endless without taps": (lambda: Relaxed(None), "Relaxed got length=None and taps=None.*Pass taps="),
    "length 0": (lambda: Lazy(0), "Lazy got length=0; it must be an integer >= 1"),
    "length 1.5": (lambda: Lazy(1.5), r"Lazy got length=1\.5"),  # pyright: ignore[reportArgumentType]
    "taps 0": (lambda: Eager(4, taps=0), "Eager got taps=0"),
    "block 3": (lambda: Blocked(64, 3), "Blocked got block=3, which is no power of two. Pass block=2 or block=4"),
    "near below block": (lambda: Separated(64, near=4, block=8), "Separated got near=4; it must be an integer >= 8"),
    "epoch 0": (lambda: Epoched(64, 0), "Epoched got epoch=0"),
    "endless growing filter": (lambda: TwiceRelaxed(None), "TwiceRelaxed got length=None"),
    "prompt -1": (lambda: Prompted(Lazy(4), -1), "Prompted got prompt=-1"),
    "prompt of a growing filter": (
        lambda: Prompted(TwiceRelaxed(9), 2),
        r"Prompted got TwiceRelaxed\(9\).*span\(0, prompt",
    ),
    "every 3": (lambda: Spread(Separated(64, 4), 3), "Spread got every=3"),
    "spread twice": (lambda: Spread(Spread(Separated(64, 4))), "a tile is cut once"),
    "spread of a late tile": (
        lambda: Spread(Altered(SEPARATED, {16: (FLIGHT,)})).after(16),
        "slack 16 after position 16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(TilingError, match=message):
        make()
