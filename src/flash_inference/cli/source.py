"""Lines of text that can be read more than once: a file, packed or not, standard input, or an option's text."""

from __future__ import annotations

import gzip
import io
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from flash_inference.cli.console import CommandError

STDIN = "-"
GZIP = b"\x1f\x8b"
SPOOL = 64 << 20
"""Bytes of a pipe that are held in memory; more goes to a temporary file."""


class Source:
    """Text under a name. `lines` can be called again: input is checked once, whole, before any of it is worked on.

    Files that begin as gzip files do are unpacked, whatever their names. Lines end with LF, CRLF or CR.
    """

    def __init__(self, name: str, content: BinaryIO | None = None) -> None:
        self.name, self._content = name, content

    @classmethod
    def of(cls, path: str) -> Source:
        """The file at `path`, or standard input for "-". Raises OSError for a file that cannot be read."""
        if path == STDIN:
            return cls("stdin", _spooled(sys.stdin.buffer))
        with Path(path).open("rb") as file:
            return cls(path, None if Path(path).is_file() else _spooled(file))

    @classmethod
    def of_text(cls, name: str, text: str) -> Source:
        """Text that is there already."""
        return cls(name, io.BytesIO(text.encode("utf-8", "surrogatepass")))

    def text(self) -> str:
        """All of it, line ends as they are."""
        return "".join(line for _, line in self._decoded())

    def lines(self) -> Iterator[tuple[int, str]]:
        """Line numbers, from 1, and lines without their ends."""
        count = 0
        for _, block in self._decoded():
            for line in block.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n"):
                count += 1
                yield count, line

    def _decoded(self) -> Iterator[tuple[int, str]]:
        """What stands up to each LF, decoded. Raises CommandError with the line of what is not UTF-8, or not whole."""
        number = 0
        try:
            for number, content in enumerate(self._bytes(), 1):
                text = content.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text
        except UnicodeDecodeError as error:
            raise CommandError(
                f"{self.name} is not UTF-8 text: byte {error.object[error.start]:#04x} in line {number}. Convert it to "
                "UTF-8 first."
            ) from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CommandError(
                f"{self.name} is a damaged gzip file, after line {number}: {error}. Copy it again."
            ) from None

    def _bytes(self) -> Iterator[bytes]:
        if self._content is None:
            with Path(self.name).open("rb") as file:
                yield from _unpacked(file)
        else:
            self._content.seek(0)
            yield from _unpacked(self._content)


def _spooled(stream: BinaryIO) -> BinaryIO:
    """What a pipe gives, kept so that it can be read again."""
    spool = tempfile.SpooledTemporaryFile(SPOOL)  # noqa: SIM115
    shutil.copyfileobj(stream, spool)
    return cast("BinaryIO", spool)


def _unpacked(file: BinaryIO) -> Iterator[bytes]:
    packed = file.read(len(GZIP)) == GZIP
    file.seek(0)
    # An iterator: `yield from` would close the file itself when a reader stops early.
    yield from iter((gzip.GzipFile(fileobj=file, mode="rb") if packed else file).readline, b"")
