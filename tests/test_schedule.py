"""Large tiles in chunks: every channel once, in time, at an even pace, and never where a square writes."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_inference.tiling import Rectangle, Staggered
from flash_inference.tiling.schedule import GROUPS, Chunk, Groups, Pricing, Schedule

EVERY = 16
NEAR = 256
FEWEST = 8

channel_counts = st.one_of(st.sampled_from((1, 31, 32, 33, 768, 1536, 18432)), st.integers(1, 20_000))
spans = st.integers(1, 512).map(lambda n: n * EVERY)


class Release(NamedTuple):
    boundary: int
    chunks: list[Chunk]


class Run(NamedTuple):
    """What a schedule did: chunks by the boundary at which they became ready, and what each boundary released."""

    added: list[tuple[int, Chunk]]
    releases: list[Release]
    forced: int


def identity(chunk: Chunk) -> tuple[range, int, range]:
    return chunk.sources, chunk.size, chunk.channels


def simulate(span: int, channels: int, pricing: Pricing, near: int = NEAR) -> Run:
    """Every boundary of a run, one after another."""
    groups, schedule = Groups(span, near, EVERY, channels), Schedule(EVERY)
    added, releases = [], []
    for n in range(0, span, EVERY):
        chunks = [chunk for size, tile, some in groups.after(n) for chunk in pricing.cut(size, tile, some, EVERY)]
        schedule.add(chunks)
        added += [(n, chunk) for chunk in chunks]
        releases.append(Release(n, schedule.release(n)))
    assert not len(schedule)
    return Run(added, releases, schedule.forced)


# -------------------------------------------------------------------------------------------------------------- groups


@given(channels=channel_counts, span=spans, near=st.sampled_from((16, 32, NEAR)))
def test_groups_pay_what_their_tilings_say(channels: int, span: int, near: int) -> None:
    """Each channel gets the large tiles of its own group's Staggered, on circles that hold them."""
    groups = Groups(span, near, EVERY, channels)
    assert {tiling.shift for tiling in groups.tilings} == set(range(len(groups.tilings)))
    for n in range(0, span, EVERY):
        got = {}
        for size, tile, some in groups.after(n):
            assert size in groups.sizes
            assert len(tile.sources) + len(tile.targets) <= 2 * size
            assert not some.start % 2
            assert len(some) <= groups.most(size)
            got |= {c: tile for c in some}
        for group, tiling in enumerate(groups.tilings):
            large = [tile for tile in tiling.after(n - 1) if tile.slack] if n else []
            for c in range(group * groups.width, min((group + 1) * groups.width, channels)):
                assert [got[c]] == large if c in got else not large


@given(
    channels=channel_counts, taps=st.integers(1, 5000), near=st.sampled_from((16, 32, NEAR)), first=st.integers(0, 50)
)
def test_groups_of_a_clock_without_end(channels: int, taps: int, near: int, first: int) -> None:
    """Each channel gets its own group's tiles, wherever the clock stands; sides reach as far as rows live."""
    groups = Groups(None, near, EVERY, channels, taps)
    assert not groups.sizes or near <= taps - 1 <= 2 * groups.sizes[-1]
    for n in range(first * near + near, (first + 5) * near, near):
        got = {}
        for size, tile, some in groups.after(n):
            assert len(tile.sources) + len(tile.targets) <= 2 * size
            assert len(some) <= groups.most(size)
            got |= {c: tile for c in some}
        for group, tiling in enumerate(groups.tilings):
            large = [tile for tile in tiling.after(n - 1) if tile.slack]
            for c in range(group * groups.width, min((group + 1) * groups.width, channels)):
                assert [got[c]] == large if c in got else not large


@pytest.mark.parametrize("channels", [13_824, 2048])
def test_every_block_has_as_much_to_do(channels: int) -> None:
    """Up to the sides of which one group is paid at a time."""
    groups, counts = Groups(1 << 17, NEAR, EVERY, channels), set()
    assert len(groups.tilings) == GROUPS
    for n in range(GROUPS * NEAR, 1 << 16, NEAR):
        small = [(size, len(some)) for size, _, some in groups.after(n) if size < GROUPS * NEAR]
        counts.add(tuple(sorted(small)))
    assert counts == {tuple((NEAR << q, channels >> (q + 1)) for q in range(6))}


@given(channels=channel_counts, span=spans, near=st.sampled_from((16, 32, 64, NEAR)))
def test_every_tile_fits_its_circle(channels: int, span: int, near: int) -> None:
    """Tiles of the largest side may have more sources, or more targets, but never more of both than two sides."""
    groups = Groups(span, near, EVERY, channels)
    for n in range(0, span, near):
        for size, tile, _ in groups.after(n):
            S, T = len(tile.sources), len(tile.targets)
            assert 2 * size >= S + T
            assert max(S, T) <= size or size == groups.sizes[-1]


# ------------------------------------------------------------------------------------------------------------- pricing


@given(
    channels=channel_counts,
    first=st.integers(0, 50).map(lambda n: 2 * n),
    log_size=st.integers(4, 20),
    target=st.floats(1, 1000),
    points=st.floats(100, 1e6),
    clip=st.integers(0, 15),
)
def test_a_cut_covers_all_channels_once(
    channels: int, first: int, log_size: int, target: float, points: float, clip: int
) -> None:
    size = 1 << log_size
    n = 4 * size
    tile = Rectangle(range(n - size, n), range(n + NEAR, n + NEAR + size - clip))
    chunks = Pricing(target, points).cut(size, tile, range(first, first + channels), EVERY)
    assert [c for chunk in chunks for c in chunk.channels] == list(range(first, first + channels))
    widths = {len(chunk.channels) for chunk in chunks[:-1]}
    assert len(widths) <= 1
    assert all(width % (32 if width >= 32 else 8) == 0 for width in widths)
    assert len(chunks[-1].channels) <= len(chunks[0].channels)
    for chunk in chunks:
        assert chunk.cost > 0
        assert (chunk.due, chunk.size) == (n + NEAR - EVERY, size)
        assert (chunk.sources, chunk.targets) == (tile.sources, tile.targets)


@given(channels=channel_counts, log_size=st.integers(8, 20))
def test_chunks_cost_about_the_target(channels: int, log_size: int) -> None:
    """A chunk costs no more than the target, unless the fewest channels already do."""
    size, pricing = 1 << log_size, Pricing()
    tile = Rectangle(range(size), range(size + NEAR, 2 * size + NEAR))
    fewest = FEWEST * size / pricing.rate(size)
    for chunk in pricing.cut(size, tile, range(channels), EVERY):
        assert chunk.cost <= max(pricing.target, fewest)


@given(channels=channel_counts, log_size=st.integers(4, 20))
def test_costs_add_up(channels: int, log_size: int) -> None:
    """How a tile is cut does not change what it costs."""
    size = 1 << log_size
    tile, all_of_them = Rectangle(range(size, 2 * size), range(3 * size, 4 * size)), range(channels)
    total = sum(chunk.cost for chunk in Pricing().cut(size, tile, all_of_them, EVERY))
    assert total == pytest.approx(channels * size / Pricing().rate(size))
    assert sum(c.cost for c in Pricing(target=500).cut(size, tile, all_of_them, EVERY)) == pytest.approx(total)


# ------------------------------------------------------------------------------------------------------------ schedule


@given(channels=channel_counts, span=spans, near=st.sampled_from((32, 64, NEAR)), target=st.sampled_from((10.0, 60.0)))
def test_every_chunk_runs_once_and_in_time(channels: int, span: int, near: int, target: float) -> None:
    run = simulate(span, channels, Pricing(target), near)
    released = {identity(chunk): n for n, chunks in run.releases for chunk in chunks}
    counts = Counter(identity(chunk) for _, chunks in run.releases for chunk in chunks)
    assert set(counts.values()) <= {1}
    assert counts.keys() == {identity(chunk) for _, chunk in run.added}
    for ready, chunk in run.added:
        assert ready == chunk.sources.stop
        assert ready <= released[identity(chunk)] <= max(chunk.due - EVERY, ready)
        assert released[identity(chunk)] < chunk.due
    for _, chunks in run.releases:
        assert [chunk.due for chunk in chunks] == sorted(chunk.due for chunk in chunks)


@given(channels=channel_counts, span=spans)
def test_nothing_is_forced_where_every_tile_has_slack_to_spare(channels: int, span: int) -> None:
    assert simulate(span, channels, Pricing()).forced == 0


@given(channels=st.sampled_from((2048, 13_824)), log_span=st.integers(13, 17), less=st.integers(0, 15))
def test_work_comes_at_an_even_pace(channels: int, log_span: int, less: int) -> None:
    """No boundary releases more than its part of the busiest block's work and one chunk that crossed the budget.

    The margin is 1.3; of a near-block's slack one graph is not counted, and the next is under way: 16 parts in 14.
    """
    span = (1 << log_span) - less * EVERY
    run = simulate(span, channels, Pricing())
    work = [sum(chunk.cost for chunk in chunks) for _, chunks in run.releases]
    largest = max(chunk.cost for _, chunk in run.added)
    per_block = [0.0] * (span // NEAR + 1)
    for n, chunk in run.added:
        per_block[n // NEAR] += chunk.cost
    assert max(work) <= 1.3 * 16 / 14 * max(per_block) * EVERY / NEAR + largest


def chunk_due(due: int, cost: float = 10.0, channels: range = range(32)) -> Chunk:
    return Chunk(due, 256, range(256), range(due + EVERY, due + EVERY + 256), channels, cost)


def test_a_chunk_that_is_due_next_runs_at_once_and_is_counted() -> None:
    """A deadline that the budget leaves behind: the first pays for it, the second is forced."""
    schedule = Schedule(EVERY, margin=0.0)
    first, second, later = chunk_due(48), chunk_due(48, channels=range(32, 64)), chunk_due(64)
    schedule.add([later, second, first])
    assert schedule.release(0) == []
    assert schedule.forced == 0
    released = schedule.release(32)
    assert sorted(chunk.channels.start for chunk in released) == [0, 32]
    assert {chunk.due for chunk in released} == {48}
    assert schedule.forced == 2
    assert len(schedule) == 1
    assert [chunk.due for chunk in schedule.release(48)] == [64]
    assert schedule.forced == 3


@given(due=st.integers(1, 40).map(lambda n: n * EVERY), cost=st.floats(0.1, 1e6))
def test_a_chunk_alone_never_waits_past_its_deadline(due: int, cost: float) -> None:
    schedule = Schedule(EVERY, margin=0.0)
    schedule.add([chunk_due(due, cost)])
    boundaries = [n for n in range(0, due + EVERY, EVERY) if schedule.release(n)]
    assert boundaries == [max(0, due - EVERY)]


def test_an_overdue_chunk_runs_at_once() -> None:
    schedule = Schedule(EVERY)
    schedule.add([chunk_due(16), chunk_due(4096)])
    assert next(chunk.due for chunk in schedule.release(64)) == 16


def test_an_empty_schedule_releases_nothing() -> None:
    assert Schedule(EVERY).release(0) == []


# --------------------------------------------------------------------------------------------- squares beside the tiles


def squares_under_way(tiling: Staggered, chunk: Chunk, ready: int) -> list[tuple[int, range]]:
    """(boundary, rows) that graphs read and write while a chunk may run: from its tile's boundary to that before `due`.

    A graph from boundary b on reads and writes the rows of its own positions, and pays the square behind them, in full.
    """
    rows = []
    for b in range(ready, chunk.due, EVERY):
        rows.append((b, range(b, b + EVERY)))
        n = b + EVERY
        if n < (tiling.length or 0):
            sides = [len(tile.sources) for tile in tiling.after(n - 1) if not tile.slack]
            rows += [(b, range(n, n + side)) for side in sides]
    return rows


def overlaps(span: int, near: int, early: int) -> int:
    groups, count = Groups(span, near, EVERY, 256), 0
    for ready in range(EVERY, span, EVERY):
        for size, tile, some in groups.after(ready):
            for chunk in Pricing().cut(size, tile, some, early):
                for _, rows in squares_under_way(groups.tilings[0], chunk, ready):
                    count += max(rows.start, tile.targets.start) < min(rows.stop, tile.targets.stop)
    return count


@pytest.mark.parametrize("near", [16, 32, 64, 256])
@pytest.mark.parametrize("span", [48, 80, 512, 528, 1040, 2048, 4096])
def test_chunks_that_wait_never_meet_a_square(span: int, near: int) -> None:
    assert overlaps(span, near, EVERY) == 0


def test_the_check_for_meetings_can_fail() -> None:
    """Due when its targets are read, a chunk could run beside the square that is paid right before."""
    assert overlaps(2048, NEAR, 0) > 0


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 17, 32, 64])
@pytest.mark.parametrize("size", [256, 512, 4096, 65536])
def test_chunks_of_a_batch_cover_the_channels_from_even_ones(size: int, batch: int) -> None:
    cuts = Pricing().widths(size, range(13_824), batch)
    assert [c for cut in cuts for c in cut] == list(range(13_824))
    assert all(cut.start % 2 == 0 for cut in cuts)
    assert all(len(cut) * batch >= 8 for cut in cuts[:-1])
