"""`flash-inference bench`: runs a benchmark file."""

from __future__ import annotations

import ast
import difflib
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from flash_inference.cli.console import CommandError, write, write_json, write_table
from flash_inference.cli.options import Json


def bench(
    context: typer.Context,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="Which one, as the list names it.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the questions and stop.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repeats.")] = False,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Where rows and plots go.")] = None,
    json: Json = False,
) -> None:
    """Answer a question by measurement: run one of the benchmark files.

    They stand in the folder benchmarks of a source checkout, each with the question that it answers. Without a
    question, lists them. Further options go to the benchmark as they are; its exit code is passed on. --json is for
    the list.

    \b
    Examples:
      flash-inference bench
      flash-inference bench cpu_length --quick
    """
    files = {path.stem: path for path in sorted(folder().glob("*.py"))}
    questions = {name: asked for name, path in files.items() if (asked := _question(path)) is not None}
    if question is None or listed:
        if json:
            write_json([{"name": name, "question": asked} for name, asked in questions.items()])
        elif questions:
            write_table(["benchmark", "question"], [[name, asked] for name, asked in questions.items()], left=True)
        else:
            write("There are no benchmarks yet.\n")
        return
    name = question.removesuffix(".py").replace("-", "_")
    if name not in questions:
        near = difflib.get_close_matches(name, questions, 1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise CommandError(f"benchmark {question!r} is unknown. {hint}Known: {', '.join(questions) or 'none'}.")
    command = [sys.executable, str(files[name]), *context.args]
    command += ["--quick"] * quick + (["--out", out] if out else [])
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    raise typer.Exit(code if code >= 0 else 128 - code)


def folder() -> Path:
    """The folder of benchmarks: that of the current directory, or of the source checkout around the package."""
    places = [Path.cwd(), Path(__file__).parents[3]]
    for place in places:
        if (place / "benchmarks").is_dir():
            return place / "benchmarks"
    raise CommandError(
        "there is no folder 'benchmarks' here; an installed package comes without it. Run this in a source checkout."
    )


def _question(path: Path) -> str | None:
    """The first line of a file's docstring; None for a file without a function main, which is no benchmark."""
    try:
        module = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        return f"(cannot be read: {error.msg}, line {error.lineno})"
    if not any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
        return None
    docstring = ast.get_docstring(module)
    return docstring.splitlines()[0] if docstring else "(no question written)"
