"""What importing costs: optional parts stay optional, and tilings know integers only."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import flash_inference

PACKAGE = Path(flash_inference.__file__).parent
OPTIONAL = {
    "matplotlib",
    "typer",
    "rich",
    "hypothesis",
    "triton",
    "transformers",
    "huggingface_hub",
    "fastapi",
    "pytest",
    "scipy",
    "tokenizers",
}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after a statement, beyond those that torch itself brings."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    return {name.split(".")[0] for name in json.loads(out.stdout.splitlines()[-1])}


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}


@pytest.fixture(scope="module")
def torchs_own() -> set[str]:
    return loaded_by("import torch, numpy, safetensors")


@pytest.mark.parametrize(
    "statement",
    [
        "import flash_inference",
        "import flash_inference.tiling",
        "import flash_inference; flash_inference.generate, flash_inference.load, flash_inference.score",
        "import flash_inference.engine.plan",
        "import flash_inference.integrations",
    ],
)
def test_optional_parts_stay_optional(statement: str, torchs_own: set[str]) -> None:
    assert not (loaded_by(statement) - torchs_own) & OPTIONAL


def test_testing_needs_no_hypothesis_but_for_its_strategies(torchs_own: set[str]) -> None:
    assert "hypothesis" not in loaded_by("import flash_inference.testing") - torchs_own
    assert "hypothesis" in loaded_by("import flash_inference.testing.strategies")


def test_strategies_without_hypothesis_say_what_to_install() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import flash_inference.testing.strategies"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert out.returncode
    assert "needs hypothesis: pip install hypothesis" in out.stderr


def test_the_transformers_integration_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None; import flash_inference.integrations.transformers"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert out.returncode
    assert "needs transformers: pip install 'flash-inference[transformers]'" in out.stderr


def imported(path: Path) -> set[str]:
    """Modules that a file imports, relative ones as their names in the package."""
    names: set[str] = set()
    package = ".".join(("flash_inference", *path.relative_to(PACKAGE).parts[:-1]))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            names.add(".".join(part for part in (parent, node.module or "") if part))
    return names


@pytest.mark.parametrize("path", sorted((PACKAGE / "tiling").rglob("*.py")), ids=lambda path: path.stem)
def test_tilings_import_the_standard_library_and_errors_only(path: Path) -> None:
    for name in imported(path):
        ours = name.startswith("flash_inference.tiling") or name == "flash_inference.errors"
        typing_only = name == "_typeshed"
        assert ours or typing_only or name.split(".")[0] in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_testing_imports_hypothesis_and_nothing_imports_testing(path: Path) -> None:
    names = imported(path)
    inside = path.is_relative_to(PACKAGE / "testing")
    assert inside or not any(name.split(".")[0] in ("hypothesis", "pytest") for name in names)
    assert inside or path.is_relative_to(PACKAGE / "cli") or not any("flash_inference.testing" in n for n in names)


def test_public_names_exist() -> None:
    for name in flash_inference.__all__:
        assert getattr(flash_inference, name) is not None
        assert name in dir(flash_inference)
    with pytest.raises(AttributeError, match="module 'flash_inference' has no attribute 'generat'"):
        flash_inference.generat  # type: ignore[attr-defined]  # noqa: B018


def test_public_names_are_those_that_type_checkers_see() -> None:
    """What the package imports for type checkers is what it imports when asked, from the same places."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in branch.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == flash_inference._HOMES
    assert sorted(seen) == sorted(flash_inference.__all__)


@pytest.mark.parametrize(
    "statement",
    [
        "import flash_inference",
        "import flash_inference.tiling",
        "from flash_inference import __version__",
        "from flash_inference.cli import main\ntry: main(['--help'])\nexcept SystemExit: print()",
        "from flash_inference.cli import main\ntry: main(['generate', '--help'])\nexcept SystemExit: print()",
    ],
)
def test_help_needs_no_torch(statement: str) -> None:
    assert not loaded_by(statement) & {"torch", "numpy"}


def test_parts_of_the_package_are_there_without_importing_them() -> None:
    assert "torch" in loaded_by(
        "import flash_inference; flash_inference.tiling, flash_inference.engine, flash_inference.load"
    )
