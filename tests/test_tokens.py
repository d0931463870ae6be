"""Token tables: round trips, streams, and errors that name what was wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_inference.errors import TokenError
from flash_inference.models.tokens import BYTES, DNA, TOKENS

HYENADNA = {"A": 7, "C": 8, "G": 9, "T": 10, "N": 11}

utf8 = st.text(st.characters(exclude_categories=("Cs",)))


def streamed(table, tokens):
    decoder = table.decoder()
    return "".join([*(decoder.push(token) for token in tokens), decoder.finish()])


@settings(max_examples=100, deadline=None)
@given(utf8)
def test_bytes_round_trip_and_stream(text):
    tokens = BYTES.encode(text)
    assert tokens == list(text.encode())
    assert BYTES.decode(tokens) == streamed(BYTES, tokens) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255)))
def test_any_bytes_stream_as_they_decode(tokens):
    assert streamed(BYTES, tokens) == BYTES.decode(tokens) == bytes(tokens).decode("utf-8", errors="replace")


def test_split_character_comes_out_when_complete():
    decoder = BYTES.decoder()
    assert [decoder.push(token) for token in "€!".encode()] == ["", "", "€", "!"]
    assert [decoder.push(0xE2), decoder.finish(), decoder.finish()] == ["", "\ufffd", ""]


def test_lone_surrogate_is_named():
    with pytest.raises(TokenError, match=r"'\\ud800' at index 2.*errors='replace'"):
        BYTES.encode("ab\ud800")


def test_dna_table_is_hyenadna():
    assert DNA.encode("ACGTN") == [HYENADNA[letter] for letter in "ACGTN"]
    assert DNA.decode(range(16)) == "[CLS][SEP][BOS][MASK][PAD][RESERVED][UNK]ACGTN[12][13][14][15]"
    assert DNA.decode(DNA.letters) == "ACGT"


def test_letters_pair():
    assert BYTES.complement is None
    assert DNA.decode(DNA.complement[token] for token in DNA.encode("ACGTN")) == "TGCAN"
    assert {DNA.complement[token] for token in DNA.complement} == set(DNA.complement)


@given(st.text("ACGTNacgtn"))
def test_dna_round_trip_is_upper_case(text):
    tokens = DNA.encode(text)
    assert DNA.decode(tokens) == streamed(DNA, tokens) == text.upper()


@pytest.mark.parametrize(("text", "named"), [("ACXG", r"'X' at index 2.*ACGTN"), ("AC\n", r"'\\n' at index 2")])
def test_foreign_letters_are_named(text, named):
    with pytest.raises(TokenError, match=named):
        DNA.encode(text)


@pytest.mark.parametrize("table", TOKENS.values(), ids=TOKENS.keys())
def test_ids_outside_the_table_are_named(table):
    for token in (-1, table.vocab_size):
        for call in (lambda: table.decode([token]), lambda: table.decoder().push(token)):  # noqa: B023
            with pytest.raises(TokenError, match=rf"{token} is outside the '{table.name}' table"):
                call()
    with pytest.raises(TokenError, match="expected str"):
        table.encode(b"ACGT")
