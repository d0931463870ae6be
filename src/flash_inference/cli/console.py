"""What the commands share of the terminal: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flash_inference.errors import FlashInferenceError


class CommandError(FlashInferenceError, ValueError):
    """Options or input files that make no request."""


def write(text: str) -> None:
    """Writes to stdout, and makes sure that it is out."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """One line of JSON on stdout; numbers that JSON lacks (NaN, infinities) become null."""
    write(json.dumps(_plain(value), ensure_ascii=False) + "\n")


def note(text: str) -> None:
    """One line on stderr."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def write_table(columns: list[str], rows: list[list[str]], left: bool = False) -> None:
    """A table on stdout: figures to the right of a first column, or, with `left`, text that wraps."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and not left else "left", no_wrap=not (number and left))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), force_terminal=terminal, highlight=False, width=None if terminal else 160)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    write("".join(f"{line.rstrip()}\n" for line in lines))


def close_stdout() -> None:
    """Lets what is still buffered for a closed pipe go nowhere, so that nothing complains at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class Meter:
    """A progress bar on stderr with rate and time left, where stderr is a terminal; silent otherwise.

    `add` may be called for every token: the bar is told ten times a second.
    """

    def __init__(self, label: str, total: float, unit: str = "", show: bool = True) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Rate(unit), TimeRemainingColumn(),
            console=console, transient=True, redirect_stdout=False, redirect_stderr=False,
            disable=not (show and console.is_terminal),
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=total)
        self._waiting, self._told = 0.0, time.monotonic()

    def add(self, amount: float = 1) -> None:
        """Counts `amount` more."""
        self._waiting += amount
        if time.monotonic() - self._told > 0.1:
            self._bar.advance(self._task, self._waiting)
            self._waiting, self._told = 0.0, time.monotonic()

    def label(self, text: str) -> None:
        """Says what is being done."""
        self._bar.update(self._task, description=text)

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class _Rate(ProgressColumn):
    """So many units a second; nothing where there is no unit."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The rate of the last seconds."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self.unit}/s" if speed and self.unit else "")


def size(count: float) -> str:
    """Bytes as people read them: 1.5 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
