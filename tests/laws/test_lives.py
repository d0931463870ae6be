"""The law of clipped tiles: within a row's life nothing is lost, and what a row gets depends on its own life alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flash_inference.tiling import Rectangle, clip_to_lives

tiles = st.builds(
    lambda first, size, gap, targets: Rectangle(
        range(first, first + size), range(first + size + gap, first + size + gap + targets)
    ),
    st.integers(0, 300),
    st.integers(1, 600),
    st.integers(0, 200),
    st.integers(1, 600),
)
lives = st.lists(st.builds(lambda a, n: range(a, a + n), st.integers(0, 1500), st.integers(0, 900)), max_size=6)


@given(tile=tiles, lives=lives)
def test_rows_get_all_that_they_need_of_a_tile_and_nothing_outside_it(tile: Rectangle, lives: list[range]) -> None:
    parts = clip_to_lives(tile, lives)
    for row, life in enumerate(lives):
        mine = [part for rows, part in parts if rows.start <= row < rows.stop]
        needed = set(tile.sources) & set(life), set(tile.targets) & set(life)
        assert len(mine) <= 1
        if all(needed):
            assert needed[0] <= set(mine[0].sources) <= set(tile.sources)
            assert needed[1] <= set(mine[0].targets) <= set(tile.targets)
        if life and mine:
            assert [part for _, part in clip_to_lives(tile, [life])] == mine
