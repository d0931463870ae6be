"""Named sequences from an option, a file or stdin: plain text, FASTA or FASTQ, streamed and located."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from flash_inference.cli.console import CommandError, note
from flash_inference.cli.source import STDIN, Source
from flash_inference.errors import FlashInferenceError, TokenError

if TYPE_CHECKING:
    from torch import Tensor

    from flash_inference.models.backbone import LanguageModel

HEADERS = (">", "@")
"""What a record of FASTA and of FASTQ begins with."""
WINDOW = 1 << 15
"""Tokens of records that are held at once, but for longer records."""


@dataclass(frozen=True, slots=True)
class Record:
    """A named sequence, and the line of its source that it begins at."""

    name: str
    text: str
    line: int = 1


@dataclass(frozen=True, slots=True)
class Records:
    """The records of a source, read anew by each iteration, one at a time.

    `name` is that of the one record of plain text; None for a source of FASTA or FASTQ.
    """

    source: Source
    name: str | None = None
    dna: bool = False

    def __iter__(self) -> Iterator[Record]:
        if self.name is None:
            return parse(self.source)
        text = self.source.text()
        return iter([Record(self.name, "".join(text.split()) if self.dna else text)])

    def rows(self, model: LanguageModel) -> Iterator[tuple[Record, Tensor]]:
        """Each record with its tokens; what the model cannot read raises CommandError with the file and the line."""
        from flash_inference.engine.prompts import as_rows

        for record in self:
            try:
                yield record, as_rows(model, record.text)[0]
            except FlashInferenceError as error:
                raise self.error(record, error, model) from None

    def check(self, model: LanguageModel, each: Callable[[Tensor], None] = lambda row: None) -> Survey:
        """Reads all records, and calls `each` with their rows, before any is worked on; tells of a repeated name."""
        count = tokens = 0
        names, repeated = set[str](), False
        for record, row in self.rows(model):
            try:
                each(row)
            except FlashInferenceError as error:
                raise self.error(record, error) from None
            count, tokens = count + 1, tokens + len(row) - 1
            if record.name in names and not repeated:
                place = f"{self.source.name} line {record.line}"
                note(f"note: {place} repeats the name {record.name!r}; results keep the order of the file.")
                repeated = True
            names.add(record.name)
        return Survey(count, tokens)

    def error(self, record: Record, error: FlashInferenceError, model: LanguageModel | None = None) -> CommandError:
        """The same error with the record's file and line: that of a wrong letter, where one line has it."""
        line = record.line
        if isinstance(error, TokenError) and model is not None:
            for number, text in islice(self.source.lines(), record.line - (self.name is not None), None):
                if self.name is None and text.startswith((*HEADERS, "+")):
                    break
                try:
                    model.tokens.encode("".join(text.split()))
                except TokenError as found:
                    line, error = number, found
                    break
        return CommandError(f"{self.source.name} line {line}, record {record.name!r}: {error}")

    def windows(self, model: LanguageModel, tokens: int = WINDOW) -> Iterator[list[tuple[Record, Tensor]]]:
        """Records with their tokens, so many together as make `tokens`, at least one: rows of one length share work."""
        window: list[tuple[Record, Tensor]] = []
        held = 0
        for record, row in self.rows(model):
            if window and held + len(row) > tokens:
                yield window
                window, held = [], 0
            window.append((record, row))
            held += len(row)
        if window:
            yield window


@dataclass(frozen=True, slots=True)
class Survey:
    """How many records there are, and tokens in them, start tokens aside."""

    records: int
    tokens: int


def gather(
    *,
    text: str | None,
    text_option: str,
    text_file: str | None,
    fasta: str | None,
    dash: str | None,
    dna: bool,
    default: str | None = None,
) -> Records:
    """The records of the one source that was given; without any, `default` as text, or else stdin.

    For a DNA model, text that begins with > or @ is read as FASTA or FASTQ, and white space is left out.
    """
    if dash not in (None, STDIN):
        raise CommandError(f"unexpected argument {dash!r}; only - (standard input) may stand there. Use {text_option}.")
    given = {text_option: text, f"{text_option}-file": text_file, "--fasta": fasta, "- (stdin)": dash}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise CommandError(f"{' and '.join(names)} were given; expected one source of text. Leave the others out.")
    if fasta is not None:
        return Records(Source.of(fasta))
    if text is None and text_file is None and dash is None and default is not None:
        text = default
    if text is not None:
        source, name = Source.of_text(text_option, text), "text"
    else:
        path = text_file or STDIN
        if path == STDIN and dash is None and sys.stdin.isatty():
            raise CommandError(
                f"there is no text: no option names one, and stdin is a terminal. Give {text_option}, "
                f"{text_option}-file or --fasta, or pipe text in."
            )
        source, name = Source.of(path), "stdin" if path == STDIN else Path(path).stem
    first = next((line.lstrip() for _, line in source.lines() if line.strip()), "") if dna else ""
    return Records(source) if first.startswith(HEADERS) else Records(source, name, dna)


def parse(source: Source) -> Iterator[Record]:
    """The records of a FASTA or FASTQ source, named by the first word of their headers, one at a time.

    Blank lines, and white space in sequences, are left out. FASTQ qualities are checked for their number only.
    """
    lines = ((number, line.strip()) for number, line in source.lines())
    first = next(((number, line) for number, line in lines if line), None)
    if first is None:
        raise CommandError(
            f"{source.name} has no FASTA record. A record begins with a line '>name', its letters follow."
        )
    if not first[1].startswith(HEADERS):
        raise CommandError(
            f"{source.name} is no FASTA: line {first[0]} is {first[1][:20]!r}, before any header. A record begins with "
            "a line '>name' (FASTQ: '@name')."
        )
    return _fasta(first, lines) if first[1].startswith(">") else _fastq(source.name, first, lines)


Line = tuple[int, str]


def _fasta(header: Line, lines: Iterator[Line]) -> Iterator[Record]:
    count, letters = 1, list[str]()
    for number, line in lines:
        if line.startswith(">"):
            yield Record(_name(header, count), "".join(letters), header[0])
            header, count, letters = (number, line), count + 1, []
        elif line:
            letters.append("".join(line.split()))
    yield Record(_name(header, count), "".join(letters), header[0])


def _fastq(source: str, header: Line | None, lines: Iterator[Line]) -> Iterator[Record]:
    count = 0
    while header is not None:
        count += 1
        place = f"{source} line {header[0]}"
        if not header[1].startswith("@"):
            raise CommandError(f"{place} is {header[1][:20]!r}; expected the header '@name' of a FASTQ record.")
        letters = quality = ""
        for _, line in lines:
            if line.startswith("+"):
                break
            letters += "".join(line.split())
        else:
            raise CommandError(f"{place}: the FASTQ record {_name(header, count)!r} ends before its line '+'.")
        while len(quality) < len(letters):
            more = next(lines, None)
            if more is None:
                break
            quality += more[1]
        if len(quality) != len(letters):
            raise CommandError(
                f"{place}: the FASTQ record {_name(header, count)!r} has {len(letters)} letters and {len(quality)} "
                "qualities; expected as many. The file is damaged or cut short."
            )
        yield Record(_name(header, count), letters, header[0])
        header = next((line for line in lines if line[1]), None)


def _name(header: Line, count: int) -> str:
    words = header[1][1:].split()
    return words[0] if words else f"record_{count}"


def wrap(letters: str, width: int = 70) -> str:
    """Letters in lines of `width`, as FASTA files have them."""
    return "".join(f"{letters[i : i + width]}\n" for i in range(0, len(letters), width))
