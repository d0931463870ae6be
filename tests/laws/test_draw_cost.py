"""What tilings cost, how evenly Spread pays, and how tilings look."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_inference.errors import TilingError
from flash_inference.tiling import (
    Blocked,
    Cost,
    Eager,
    Epoched,
    Lazy,
    Parallelogram,
    Prompted,
    Rectangle,
    Relaxed,
    Separated,
    Share,
    Spread,
    Tile,
    Tiling,
    TwiceRelaxed,
    cost,
    draw,
    fft_price,
)

Price = Callable[[Tile], float]


def pairs_price(tile: Tile) -> float:
    return tile.area


PRICES = pytest.mark.parametrize("price", [pairs_price, fft_price], ids=["pairs", "fft"])

EXAMPLES: dict[str, Tiling] = {
    "lazy": Lazy(40),
    "eager": Eager(40, taps=9),
    "relaxed": Relaxed(45),
    "blocked": Blocked(64, 8),
    "epoched": Epoched(50),
    "separated": Separated(64, near=4, block=2),
    "twice-relaxed": TwiceRelaxed(33),
    "prompted": Prompted(Relaxed(40, taps=20), 16),
    "spread": Spread(Separated(64, near=4), every=2),
    "spread-endless": Spread(Separated(None, near=2, taps=24), every=4),
    "one": Relaxed(1),
    "two": Relaxed(2),
}
examples = pytest.mark.parametrize("tiling", EXAMPLES.values(), ids=EXAMPLES.keys())


@examples
@PRICES
def test_cost_counts_what_is_paid(tiling: Tiling, price: Price) -> None:
    length = tiling.length or 100
    steps, shapes = [0.0] * length, Counter[tuple[int, int]]()
    for step in range(length):
        for item in tiling.after(step):
            tile, part = (item.tile, len(item.part) / item.parts) if isinstance(item, Share) else (item, 1.0)
            across = tile.lags if isinstance(tile, Parallelogram) else tile.targets
            steps[step] += part * price(tile)
            shapes[len(tile.sources), len(across)] += 1
    worst = max(steps)
    expected = Cost(sum(steps), worst, steps.index(worst) if worst else -1, shapes)
    assert cost(tiling, price, length) == expected


@pytest.mark.parametrize("length", [1, 2, 31, 64, 100])
@pytest.mark.parametrize("tiling", [Lazy, Eager, Relaxed, Epoched], ids=lambda tiling: tiling.__name__)
def test_tilings_pay_the_strict_triangle(tiling: Callable[[int], Tiling], length: int) -> None:
    assert cost(tiling(length)).total == length * (length - 1) // 2


def test_cost_of_an_endless_stream_needs_a_length() -> None:
    with pytest.raises(TilingError, match="cost got no length"):
        cost(Lazy(None, taps=4))
    assert cost(Lazy(None, taps=4), length=10).total == 1 + 2 + 3 * 8


def test_price_of_an_fft() -> None:
    assert fft_price(Rectangle(range(8), range(8, 16))) == 16 * 4
    assert fft_price(Rectangle(range(8), range(8, 17))) == 32 * 5
    assert fft_price(Parallelogram(range(4, 8), range(2, 6))) == 8 * 3


def test_relaxed_costs_length_times_log_squared() -> None:
    """Sum of L / (2 U) tiles of 2 U log2 2 U over U = 2^q, q < P: L (1 + .. + P) = L P (P + 1) / 2."""
    for p in range(1, 14):
        assert cost(Relaxed(1 << p), fft_price).total == (1 << p) * p * (p + 1) // 2


def test_epoched_costs_length_to_the_one_and_a_half() -> None:
    lengths = [1 << p for p in range(8, 14)]
    ratios = [_mixed(Epoched(n)) / (n**1.5 * math.sqrt(math.log2(n))) for n in lengths]
    assert max(ratios) / min(ratios) < 2.5


def _mixed(tiling: Tiling) -> float:
    """Rows as direct sums, tall tiles by FFT."""
    return cost(tiling, lambda tile: min(tile.area, fft_price(tile))).total


def test_a_longer_stream_costs_the_same_a_token() -> None:
    for tiling in (Relaxed(None, taps=64), Separated(None, near=8, taps=64), Blocked(None, 8, taps=64)):
        once, twice, more = (cost(tiling, fft_price, n).total for n in (1024, 2048, 3072))
        assert twice - once == more - twice


def test_spread_tames_the_worst_step() -> None:
    length = 4096
    relaxed, separated = Relaxed(length), Separated(length, near=16)
    spread = Spread(separated, every=16)
    worst = [cost(tiling, fft_price).worst for tiling in (relaxed, separated, spread)]
    assert worst[2] * 40 < min(worst[0], worst[1])
    assert cost(spread, fft_price).total == pytest.approx(cost(separated, fft_price).total)


@settings(deadline=None, max_examples=60)
@given(
    length=st.one_of(st.none(), st.integers(1, 700)),
    near=st.integers(0, 5),
    block=st.integers(0, 5),
    every=st.integers(0, 6),
    taps=st.one_of(st.none(), st.integers(1, 400)),
    prompt=st.integers(0, 20),
    price=st.sampled_from([pairs_price, fft_price]),
)
def test_no_step_of_spread_exceeds_its_bound(
    length: int | None, near: int, block: int, every: int, taps: int | None, prompt: int, price: Price
) -> None:
    if length is None:
        taps = taps or 150
    separated = Separated(length, 1 << near, 1 << min(block, near), taps=taps)
    if length is None and not separated.slacks:
        return
    for tiling in (Spread(separated, 1 << every), Spread(Prompted(separated, prompt), 1 << every)):
        paid = cost(tiling, price, tiling.length or 1500)
        assert paid.worst <= tiling.bound(price) * (1 + 1e-12)


@PRICES
def test_the_bound_of_spread_is_met(price: Price) -> None:
    """At powers of two, for a long enough run, some step pays all that the bound counts."""
    tiling = Spread(Separated(2048, near=32), every=16)
    assert cost(tiling, price).worst == pytest.approx(tiling.bound(price))


def test_the_bound_of_nothing_to_spread() -> None:
    assert Spread(Relaxed(64)).bound() == 32 * 32
    with pytest.raises(TilingError, match="endless"):
        Spread(Relaxed(None, taps=8)).bound()


@pytest.mark.parametrize(
    ("near", "every", "block"),
    [(32, 32, 32), (16, 16, 1), (64, 8, 8), (256, 32, 1), (8, 16, 1), (4, 32, 4)],
)
@pytest.mark.parametrize("length", [4096, 3001])
def test_at_most_one_share_a_step(near: int, every: int, block: int, length: int) -> None:
    tiling = Spread(Separated(length, near, block), every)
    shares = [[item for item in tiling.after(t) if isinstance(item, Share)] for t in range(length)]
    assert max(len(step) for step in shares) == 1
    for t, step in enumerate(shares):
        assert not step or near < 4 or (t + 1) % near or block == near, "no share on the step of the largest square"


@settings(deadline=None, max_examples=60)
@given(near=st.integers(0, 6), every=st.integers(0, 6), length=st.integers(4, 4096))
def test_shares_meet_only_where_there_is_no_room(near: int, every: int, length: int) -> None:
    tiling = Spread(Separated(length, 1 << near), 1 << every)
    density = sum(1 / min(v, tiling.every) for v in tiling.slacks)
    most = max(sum(isinstance(item, Share) for item in tiling.after(t)) for t in range(length))
    assert most <= 1 or density > 1
    if near >= every and len(tiling.slacks) <= tiling.every:
        assert density <= 1
        assert most <= 1


@examples
def test_svg_stands_on_its_own(tiling: Tiling) -> None:
    length = tiling.length or 70
    root = ElementTree.fromstring(draw(tiling, length))
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    words = [text.text for text in root.iter(f"{space}text")]
    assert words[0] == repr(tiling)
    assert {"source", "target", "paid after position", "inline"} <= set(words)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    shown = next(group for group in root.iter(f"{space}g") if group.attrib.get("class") == "tile")
    tiles = sum(1 for t in range(length) for x in tiling.after(t) if _first_target(x) < length)
    assert len(shown) == tiles
    for rectangle in root.iter(f"{space}rect"):
        assert float(rectangle.attrib.get("x", 0)) + float(rectangle.attrib["width"]) <= width
        assert float(rectangle.attrib.get("y", 0)) + float(rectangle.attrib["height"]) <= height
    inline = next(path for path in root.iter(f"{space}path") if path.attrib.get("class") == "inline")
    assert inline.attrib["d"].count("M") == sum(len(tiling.inline(t)) for t in range(length))


def _first_target(item: Tile | Share) -> int:
    return (item.tile if isinstance(item, Share) else item).due


def test_svg_of_512_positions() -> None:
    picture = draw(Separated(512, near=16))
    ElementTree.fromstring(picture)
    assert len(picture) < 400_000


@examples
@pytest.mark.parametrize("color", [False, True], ids=["plain", "coloured"])
def test_text_has_every_pair(tiling: Tiling, color: bool) -> None:
    length = min(64, tiling.length or 64)
    drawn = draw(tiling, length, format="text", color=color)
    assert ("\x1b" in drawn) == (
        color and any(_first_target(x) < length for t in range(length) for x in tiling.after(t))
    )
    lines = re.sub(r"\x1b\[[\d;]*m", "", drawn).splitlines()
    assert lines[0] == repr(tiling)
    symbols = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+/"
    paid: dict[tuple[int, int], str] = {}
    for t in range(length):
        for item in tiling.after(t):
            tile = item.tile if isinstance(item, Share) else item
            paid.update((pair, symbols[t]) for pair in tile.pairs())
        paid.update((pair, "*") for pair in tiling.inline(t))
    rows = lines[3 : 3 + length]
    assert [int(row[:7]) for row in rows] == list(range(length))
    for target, row in enumerate(rows):
        assert row[7:] == "".join(paid.get((source, target), ".") for source in range(target + 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw(Relaxed(65), format="text"), "draw got length=65; text has symbols for 64 positions"),
        (lambda: draw(Relaxed(8), format="png"), "draw got format='png'"),
        (lambda: draw(Relaxed(8), 9), "draw got length=9"),
        (lambda: draw(Relaxed(None, taps=3)), "draw got no length"),
    ],
    ids=["too long", "format", "beyond the length", "endless"],
)
def test_refused(call: Callable[[], str], message: str) -> None:
    with pytest.raises(TilingError, match=re.escape(message)):
        call()
