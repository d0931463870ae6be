"""Token tables: text to token ids and back, for bytes and for DNA."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from typing import Protocol

from flash_inference.errors import TokenError


class Decoder(Protocol):
    """Turns a stream of token ids into text, a piece at a time: the pieces joined equal `decode` of all ids."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still open."""
        ...

    def finish(self) -> str:
        """The text left over at the end of the stream: a replacement character if a character stayed open."""
        ...


class Table(Protocol):
    """A vocabulary: `letters` are the ids that generation should draw from, None for all of them."""

    @property
    def name(self) -> str:
        """The key in TOKENS."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def letters(self) -> tuple[int, ...] | None:
        """Ids that generation should draw from; None for all."""
        ...

    @property
    def complement(self) -> Mapping[int, int] | None:
        """The id of each letter's partner on the other strand of DNA; None for tables that have no strands."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with no start or stop token added."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of token ids."""
        ...

    def decoder(self) -> Decoder:
        """A fresh incremental decoder."""
        ...


class Bytes:
    """UTF-8 bytes: token id = byte value, `vocab_size` ids. Bytes that are no UTF-8 decode to U+FFFD.

    Ids below `printable` decode to a space and those above 255 to U+FFFD. StripedHyena's table has 512 ids (0 is both
    start and end of text, 1 padding) and prints from 32 on.
    """

    complement = None

    def __init__(self, name: str, vocab_size: int = 256, printable: int = 0) -> None:
        self.name, self.vocab_size, self._printable = name, vocab_size, printable
        self.letters = None if vocab_size == 256 else tuple(range(256))

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`. A lone surrogate raises TokenError, for it has no UTF-8 form."""
        _check_text(text)
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise TokenError(
                f"character {text[error.start]!r} at index {error.start} is a lone surrogate, which has no UTF-8 form. "
                "Remove it, or decode the source with errors='replace'."
            ) from None

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of byte values; an id outside 0..255 raises TokenError."""
        return b"".join(self.shown(token) for token in tokens).decode("utf-8", errors="replace")

    def decoder(self) -> Decoder:
        """A decoder that holds back the bytes of an unfinished character."""
        return _Utf8Decoder(self)

    def shown(self, token: int) -> bytes:
        """The bytes that an id decodes to."""
        token = _check_id(token, self)
        if token < self._printable:
            return b" "
        return bytes((token,)) if token < 256 else "\ufffd".encode()


class Dna:
    """DNA letters, one id each, after the ids of special tokens, 16 ids in all.

    HyenaDNA's table: A 7, C 8, G 9, T 10, N 11. Lower case (soft-masked sequence) reads as upper case, so decoding
    gives upper case. Special tokens decode to their names and the unused ids to their numbers ("[SEP]", "[12]"):
    nothing is hidden. No separator is put behind the text: a model that reads one has nothing left to continue.
    """

    vocab_size = 16
    alphabet = "ACGTN"

    def __init__(self, name: str, special: tuple[str, ...]) -> None:
        first = len(special)
        self.name, self.special = name, special
        self.letters = tuple(range(first, first + 4))
        unused = range(first + len(self.alphabet), self.vocab_size)
        self._texts = (*special, *self.alphabet, *(f"[{i}]" for i in unused))
        upper = {letter: first + i for i, letter in enumerate(self.alphabet)}
        self._ids = upper | {letter.lower(): i for letter, i in upper.items()}

    @property
    def complement(self) -> Mapping[int, int]:
        """A and T, C and G; N is its own."""
        return {self._ids[letter]: self._ids[partner] for letter, partner in zip("ACGTN", "TGCAN", strict=True)}

    def encode(self, text: str) -> list[int]:
        """Ids of the letters ACGTN in either case; any other character raises TokenError with its index."""
        _check_text(text)
        try:
            return [self._ids[letter] for letter in text]
        except KeyError:
            index = next(i for i, letter in enumerate(text) if letter not in self._ids)
            raise TokenError(
                f"character {text[index]!r} at index {index} is no DNA letter; the alphabet is {self.alphabet} in "
                "either case. Strip white space and headers, and write other ambiguity codes as N."
            ) from None

    def decode(self, tokens: Iterable[int]) -> str:
        """Letters of ids; an id outside 0..15 raises TokenError."""
        return "".join(self._texts[_check_id(token, self)] for token in tokens)

    def decoder(self) -> Decoder:
        """A decoder that answers each id at once."""
        return _PlainDecoder(self)


class _Utf8Decoder:
    def __init__(self, table: Bytes) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._table.shown(token))

    def finish(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class _PlainDecoder:
    def __init__(self, table: Table) -> None:
        self._table = table

    def push(self, token: int) -> str:
        return self._table.decode((token,))

    def finish(self) -> str:
        return ""


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenError(f"text is {type(text).__name__}; expected str. Decode bytes first, or pass token ids.")


def _check_id(token: int, table: Table) -> int:
    token = int(token)
    if not 0 <= token < table.vocab_size:
        raise TokenError(
            f"token id {token} is outside the {table.name!r} table, which has ids 0..{table.vocab_size - 1}. "
            "Check that the model's vocabulary matches its `tokens` setting."
        )
    return token


BYTES = Bytes("bytes")
STRIPED_BYTES = Bytes("bytes-512", 512, printable=32)
DNA = Dna("dna", ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"))
MULTIMOLECULE_DNA = Dna("dna-multimolecule", ("<pad>", "<cls>", "<eos>", "<unk>", "<mask>", "<null>"))
TOKENS: dict[str, Table] = {table.name: table for table in (BYTES, DNA, STRIPED_BYTES, MULTIMOLECULE_DNA)}

TOKENIZER = "tokenizer.json"
"""The `tokens` of a config whose table is that file of its folder (models.tokenizer)."""
