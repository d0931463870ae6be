"""The command line: `flash-inference generate | score | embed | verify | plan | convert | tune | draw | ..`."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flash_inference.cli.bench import bench
from flash_inference.cli.console import close_stdout, note
from flash_inference.cli.convert import convert
from flash_inference.cli.demo import demo
from flash_inference.cli.doctor import doctor
from flash_inference.cli.draw import draw
from flash_inference.cli.embed import embed
from flash_inference.cli.generate import generate
from flash_inference.cli.plan import plan
from flash_inference.cli.score import score
from flash_inference.cli.tune import tune
from flash_inference.cli.verify import verify
from flash_inference.errors import FlashInferenceError

COMMANDS = (generate, score, embed, verify, plan, convert, tune, draw, bench, demo, doctor)
"""Every command, in the order of `--help`."""

PASSES_ARGUMENTS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


class Group(TyperGroup):
    """Ends a command that fails in one line: exit code 2 for errors, 130 for Ctrl-C, 141 for a closed pipe."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        try:
            with _notes_shown():
                result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            close_stdout()
            code = 141
        except KeyboardInterrupt:
            code = 130
        except FlashInferenceError as error:
            note(f"error: {' '.join(str(error).split())}")
            code = 2
        except OSError as error:
            note(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
            code = 2
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            close_stdout()
        raise typer.Exit(code)


class Notes(logging.Handler):
    """Shows what the library logs, such as what a loader assumed about a published checkpoint, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        note(f"note: {record.getMessage()}")


@contextmanager
def _notes_shown() -> Iterator[None]:
    log, handler = logging.getLogger("flash_inference"), Notes(logging.INFO)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


app = typer.Typer(
    name="flash-inference", cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _version(wanted: bool) -> None:
    if wanted:
        from flash_inference import __version__

        typer.echo(f"flash-inference {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Exact, near-linear-time generation from long convolution sequence models.

    Results go to stdout, progress and messages to stderr. Start with: flash-inference demo
    """


def _help(docstring: str) -> str:
    """A docstring with each paragraph on one line, but for those that begin with a backspace: they keep their lines."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(text if text.startswith("\b") else " ".join(text.split("\n")) for text in paragraphs)


for _command in COMMANDS:
    settings = PASSES_ARGUMENTS_ON if _command is bench else None
    app.command(_command.__name__, help=_help(_command.__doc__ or ""), context_settings=settings)(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, and exits the process."""
    with suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app(args=None if arguments is None else list(arguments))
    except KeyboardInterrupt:
        sys.exit(130)
