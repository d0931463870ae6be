"""The documentation is true: its Python blocks run, print what they say, and its pictures and links are up to date.

Blocks of one file run in order, as one program. Lines `# -> text` are what a block prints. A block with a line
`# needs: NAME` runs by itself, and is skipped, visibly, where the model NAME is not shipped.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from unittest import mock

import pytest

import flash_inference
from flash_inference.models.weights import shipped
from flash_inference.ops.tile_conv import TILE_CONV_IMPLS
from flash_inference.tiling import Relaxed, Separated, Staggered, draw

DOCS = Path(__file__).parents[1] / "docs"
NAMES = ("theory.md", "extending.md", "reference.md", "batching.md", "speculative.md", "tasks.md", "models.md")
FILES = [DOCS / name for name in NAMES]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"^# needs: (\w+)$", re.MULTILINE)
PRINTS = re.compile(r"^# -> (.*)$", re.MULTILINE)


def blocks(path: Path) -> list[tuple[int, str]]:
    """The Python blocks of a file with the lines that they begin at."""
    text = path.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)), found.group(1)) for found in BLOCK.finditer(text)]


def run(path: Path, line: int, block: str, names: dict[str, object]) -> None:
    """Runs a block in `names`; what it prints must be what it says, if it says anything."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * line + block, str(path), "exec", dont_inherit=True), names)
    expected = PRINTS.findall(block)
    if expected:
        assert printed.getvalue().rstrip().splitlines() == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_blocks_run_in_order(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": path.stem}
    plain = [(line, block) for line, block in blocks(path) if not NEEDS.search(block)]
    assert plain
    with mock.patch.dict(TILE_CONV_IMPLS):
        for line, block in plain:
            run(path, line, block, names)


@pytest.mark.parametrize(
    ("path", "line", "block"),
    [
        pytest.param(path, line, block, id=f"{path.name}:{line}")
        for path in FILES
        for line, block in blocks(path)
        if NEEDS.search(block)
    ],
)
def test_blocks_that_need_a_model(
    path: Path, line: int, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = set(NEEDS.findall(block)) - set(shipped())
    if absent:
        pytest.skip(f"{path.name}:{line} needs the model {', '.join(absent)}, which is not shipped")
    monkeypatch.chdir(tmp_path)
    run(path, line, block, {"__name__": path.stem})


def test_every_public_name_has_a_section_with_an_example() -> None:
    sections = re.split(r"^## ", (DOCS / "reference.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    examples = {section.split("\n")[0].strip("`"): BLOCK.findall(section) for section in sections}
    for name in flash_inference.__all__:
        assert any(re.search(rf"\b{name}\b", block) for block in examples.get(name, [])), name


@pytest.mark.parametrize(
    ("name", "tiling"),
    [
        ("triangle", Relaxed(32)),
        ("triangle-separated", Separated(64, near=4, block=2)),
        ("triangle-staggered", Staggered(64, near=4, block=2, shift=5)),
    ],
    ids=["relaxed", "separated", "staggered"],
)
def test_pictures_are_what_draw_makes(name: str, tiling: Relaxed | Separated | Staggered) -> None:
    assert (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8") == draw(tiling)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    headings = {title.strip().lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        assert (path.parent / file).exists(), target
        assert file or anchor in headings, target
