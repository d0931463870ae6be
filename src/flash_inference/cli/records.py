"""Named sequences from an option, a file or stdin: plain text or FASTA."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from flash_inference.cli.console import CommandError

STDIN = "-"


@dataclass(frozen=True, slots=True)
class Record:
    """A named sequence."""

    name: str
    text: str


def gather(
    *,
    text: str | None,
    text_option: str,
    text_file: str | None,
    fasta: str | None,
    dash: str | None,
    dna: bool,
    default: str | None = None,
) -> list[Record]:
    """The records of the one source that was given; without any, `default` as text, or else stdin.

    For a DNA model, text that begins with > is read as FASTA, and white space is left out.
    """
    if dash not in (None, STDIN):
        raise CommandError(f"unexpected argument {dash!r}; only - (standard input) may stand there. Use {text_option}.")
    given = {text_option: text, f"{text_option}-file": text_file, "--fasta": fasta, "- (stdin)": dash}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise CommandError(f"{' and '.join(names)} were given; expected one source of text. Leave the others out.")
    if fasta is not None:
        return parse_fasta(read(fasta), fasta)
    if text is None and text_file is None and dash is None and default is not None:
        text = default
    if text is None:
        source = text_file or STDIN
        if source == STDIN and sys.stdin.isatty():
            note = f"Give {text_option}, {text_option}-file or --fasta, or pipe text in."
            if dash is None:
                raise CommandError(f"there is no text: no option names one, and stdin is a terminal. {note}")
        text, name = read(source), "stdin" if source == STDIN else Path(source).stem
    else:
        source, name = text_option, "text"
    if dna and text.lstrip().startswith(">"):
        return parse_fasta(text, source)
    return [Record(name, "".join(text.split()) if dna else text)]


def read(source: str) -> str:
    """The UTF-8 text of a file, or of stdin for "-"."""
    content = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"{'stdin' if source == STDIN else source} is not UTF-8 text: byte {content[error.start]:#04x} at offset "
            f"{error.start}. Convert it to UTF-8 first."
        ) from None


def parse_fasta(content: str, source: str) -> list[Record]:
    """The records of a FASTA text, named by the first word of their headers; white space in sequences is left out."""
    source = "stdin" if source == STDIN else source
    records: list[tuple[str, list[str]]] = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.startswith(">"):
            words = line[1:].split()
            records.append((words[0] if words else f"record_{len(records) + 1}", []))
        elif line.strip():
            if not records:
                raise CommandError(
                    f"{source} is no FASTA: line {number} is {line[:20]!r}, before any header. A record begins with a "
                    "line '>name'."
                )
            records[-1][1].append("".join(line.split()))
    if not records:
        raise CommandError(f"{source} has no FASTA record. A record begins with a line '>name', its letters follow.")
    return [Record(name, "".join(lines)) for name, lines in records]


def wrap(letters: str, width: int = 70) -> str:
    """Letters in lines of `width`, as FASTA files have them."""
    return "".join(f"{letters[i : i + width]}\n" for i in range(0, len(letters), width))
