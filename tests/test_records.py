"""Records: FASTA, FASTQ and text as they come, read one at a time; wrong ones are named by file and line."""

from __future__ import annotations

import gzip
import io
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_inference.cli.console import CommandError
from flash_inference.cli.npz import Npz
from flash_inference.cli.records import Record, Records, gather, parse, wrap
from flash_inference.cli.source import Source
from flash_inference.testing import random_model

MODEL = random_model(length=64, vocab_size=16, tokens="dna")
names = st.text("abcXYZ019_.|", min_size=1, max_size=8)
letters = st.text("ACGTNacgtn", max_size=90)


def read(text: str) -> list[Record]:
    return list(parse(Source.of_text("here.fa", text)))


def plain(found: list[Record]) -> list[tuple[str, str]]:
    return [(record.name, record.text) for record in found]


@given(
    wanted=st.lists(st.tuples(names, letters), min_size=1, max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    width=st.integers(1, 30),
    blanks=st.sampled_from(["", " ", "\t\n"]),
    packed=st.booleans(),
    last=st.booleans(),
)
def test_fasta_in_any_dress(
    wanted: list[tuple[str, str]], end: str, width: int, blanks: str, packed: bool, last: bool
) -> None:
    text = blanks + "".join(f">{name} more words\n{wrap(letters, width)}{blanks}\n" for name, letters in wanted)
    content = (text if last else text.rstrip("\n")).replace("\n", end).encode("utf-8-sig")
    source = Source("here", io.BytesIO(gzip.compress(content) if packed else content))
    assert plain(list(parse(source))) == wanted
    assert plain(list(parse(source))) == wanted  # a second time


@given(wanted=st.lists(st.tuples(names, letters, st.text("@+>!I5", min_size=90, max_size=90)), min_size=1, max_size=4))
def test_fastq_whose_qualities_look_like_headers(wanted: list[tuple[str, str, str]]) -> None:
    text = "".join(f"@{name} x\n{dna}\n+{name}\n{marks[: len(dna)]}\n" for name, dna, marks in wanted)
    assert plain(read(text)) == [(name, dna) for name, dna, _ in wanted]
    assert plain(read(text.rstrip("\n").replace("\n", "\r\n"))) == [(name, dna) for name, dna, _ in wanted]


def test_names_and_lines() -> None:
    found = read("\n>a first\nAC\n\nGT\n>\nA\n>a\n")
    assert found == [Record("a", "ACGT", 2), Record("record_2", "A", 6), Record("a", "", 8)]


def test_records_are_read_one_at_a_time() -> None:
    content = io.BytesIO(b">a\nAC\n" * 100_000)
    found = parse(Source("here", content))
    assert next(found).text == next(found).text == "AC"
    assert content.tell() < 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"here\.fa has no FASTA record"),
        ("\n \n", r"here\.fa has no FASTA record"),
        ("\nACGT\n>a\n", r"here\.fa is no FASTA: line 2 is 'ACGT', before any header"),
        ("@a\nACGT\n", r"here\.fa line 1: the FASTQ record 'a' ends before its line '\+'"),
        ("@a\nACGT\n+\n!!!\n", r"line 1: the FASTQ record 'a' has 4 letters and 3 qualities"),
        ("@a\nACGT\n+\n!!!!!\n", r"line 1: the FASTQ record 'a' has 4 letters and 5 qualities"),
        ("@a\nA\n+\n!\n\n>b\nA\n", r"here\.fa line 6 is '>b'; expected the header '@name'"),
    ],
    ids=["empty", "blank", "no-header", "no-plus", "cut", "long", "mixed"],
)
def test_what_is_no_record(text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">a\nACGT\n>b x\n\nACG\nACU\n", r"here line 6, record 'b': character 'U' at index 2 is no DNA letter"),
        ("@a\nACGT\n+\n!!!!\n@b\nA-G\n+\n!!!\n", r"here line 6, record 'b': character '-' at index 1"),
        (f">a\nA\n>b\n{'A' * 70}\n", r"here line 3, record 'b': 71 positions were given; the filter has 64"),
    ],
    ids=["fasta", "fastq", "length"],
)
def test_wrong_records_are_named(text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        Records(Source.of_text("here", text)).check(MODEL)


def test_plain_text_is_named_by_its_line() -> None:
    with pytest.raises(CommandError, match=r"here line 2, record 'text': character 'U' at index 1"):
        Records(Source.of_text("here", "ACGT\nAU\n"), "text", dna=True).check(MODEL)


def test_damaged_files(tmp_path: Path) -> None:
    content = gzip.compress(b">a\n" + b"ACGT" * 50_000 + b"\n>b\nAC\n")
    cut, latin = tmp_path / "cut.gz", tmp_path / "latin.fa"
    cut.write_bytes(content[:-20])
    latin.write_bytes(b">a\nAC\n>\xe9\nA\n")
    with pytest.raises(CommandError, match=r"cut\.gz is a damaged gzip file, after line \d"):
        list(parse(Source.of(str(cut))))
    with pytest.raises(CommandError, match=r"latin\.fa is not UTF-8 text: byte 0xe9 in line 3"):
        list(parse(Source.of(str(latin))))
    with pytest.raises(FileNotFoundError):
        Source.of(str(tmp_path / "none.fa"))


def test_check_counts_and_tells_once_of_a_repeated_name(capsys: pytest.CaptureFixture[str]) -> None:
    survey = Records(Source.of_text("here", ">a\nAC\n>b\nA\n>a\nG\n>b\nT\n")).check(MODEL)
    assert (survey.records, survey.tokens) == (4, 5)
    assert capsys.readouterr().err.splitlines() == [
        "note: here line 5 repeats the name 'a'; results keep the order of the file."
    ]


def test_windows_hold_so_many_tokens() -> None:
    lengths = [3, 3, 3, 30, 3, 3]
    records = Records(Source.of_text("here", "".join(f">r\n{'A' * n}\n" for n in lengths)))
    found = [[len(row) for _, row in window] for window in records.windows(MODEL, 10)]
    assert found == [[4, 4], [4], [31], [4, 4]]


def test_stdin_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (10, 1 << 20):
        monkeypatch.setattr("flash_inference.cli.source.SPOOL", size)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b">a\nACGT\n>b\nGATTACA\n")))
        options = {"text": None, "text_option": "--text", "text_file": None, "fasta": None, "dash": "-"}
        found = gather(**options, dna=True)
        assert plain(list(found)) == plain(list(found)) == [("a", "ACGT"), ("b", "GATTACA")]


def test_a_pipe_is_read_twice(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(gzip.compress(b">a\nACGT\n"),))
    writer.start()
    source = Source.of(str(path))
    writer.join()
    assert plain(list(parse(source))) == plain(list(parse(source))) == [("a", "ACGT")]


def test_text_keeps_its_ends_and_dna_does_not() -> None:
    options = {"text_option": "--text", "text_file": None, "fasta": None, "dash": None}
    assert plain(list(gather(text="a \r\n b\n", dna=False, **options))) == [("text", "a \r\n b\n")]
    assert plain(list(gather(text=" AC\r\n GT\n", dna=True, **options))) == [("text", "ACGT")]
    assert plain(list(gather(text="@a\nAC\n+\n!!\n", dna=True, **options))) == [("a", "AC")]


def test_npz_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    rows = torch.randn(5, 3, dtype=torch.float64)
    with Npz(str(path), "rows", (5, 3), "float64") as file:
        file.write("a", rows[:2])
        assert not path.exists()
        file.write("b", rows[2:])
    with np.load(path) as found:
        assert found["names"].tolist() == ["a", "b"]
        assert found["lengths"].tolist() == [2, 3]
        assert np.array_equal(found["rows"], rows.numpy())
    path.unlink()
    with pytest.raises(KeyboardInterrupt), Npz(str(path), "rows", (5, 3), "float32"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
