"""Token tables read from a tokenizer.json, through the optional package `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flash_inference.errors import CheckpointError, ModelError, TokenError
from flash_inference.models.tokens import TOKENIZER, Decoder

OPEN = "\ufffd"
"""What the bytes of an unfinished character decode to."""


class FileTable:
    """The table that a tokenizer.json describes. `text` is that file, kept so that a model can be saved with it.

    `letters` are all ids of the table: a model whose vocabulary is padded never draws an id that has no text.
    Encoding adds no start or end token. The package `tokenizers` is needed at the first use, not before: without it
    that raises ModelError, and a model still runs on token ids.
    """

    name = TOKENIZER
    complement = None

    def __init__(self, text: str, where: str = TOKENIZER) -> None:
        self.text, self._where = text, where
        self._parsed: Any = None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens among them."""
        return self._tokenizer.get_vocab_size()

    @property
    def letters(self) -> tuple[int, ...] | None:
        """All ids."""
        return tuple(range(self.vocab_size))

    @property
    def _tokenizer(self) -> Any:
        if self._parsed is None:
            self._parsed = _parse(self.text, self._where)
        return self._parsed

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        if not isinstance(text, str):
            raise TokenError(f"text is {type(text).__name__}; expected str. Decode bytes first, or pass token ids.")
        tokenizer = self._tokenizer
        try:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # The package raises Exception itself, and TypeError for lone surrogates.
            raise TokenError(f"text cannot be encoded: {error}. Is it of the alphabet of {TOKENIZER}?") from None

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of token ids, special tokens shown."""
        return self._tokenizer.decode([self._check(token) for token in tokens], skip_special_tokens=False)

    def decoder(self) -> Decoder:
        """A decoder that holds back the bytes of an unfinished character."""
        return _FileDecoder(self)

    def _check(self, token: int) -> int:
        token = int(token)
        if not 0 <= token < self.vocab_size:
            raise TokenError(f"token id {token} is outside {TOKENIZER}, which has ids 0..{self.vocab_size - 1}.")
        return token


class _FileDecoder:
    """Decodes each new id behind those of the piece before it, since a token's text may depend on its neighbour."""

    def __init__(self, table: FileTable) -> None:
        self._table, self._before, self._open = table, list[int](), list[int]()

    def push(self, token: int) -> str:
        self._open.append(token)
        text = self._text()
        if not text or text.endswith(OPEN):
            return ""
        self._before, self._open = self._open, []
        return text

    def finish(self) -> str:
        text = self._text() if self._open else ""
        self._before, self._open = [], []
        return text

    def _text(self) -> str:
        known = self._table.decode(self._before)
        return self._table.decode([*self._before, *self._open])[len(known) :]


def read_tokenizer(path: Path) -> FileTable:
    """The table in a file. Raises CheckpointError if it cannot be read or is no JSON."""
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch it again.") from None
    return FileTable(text, str(path))


def _parse(text: str, where: str) -> Any:
    try:
        from tokenizers import Tokenizer  # type: ignore[import-not-found]
    except ImportError:
        raise ModelError(
            f"{where} needs the package tokenizers: pip install 'flash-inference[tokenizers]'. "
            "Or remove the file, and use token ids."
        ) from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # The package raises Exception itself.
        raise CheckpointError(f"{where} is no tokenizer: {error}. Fetch it again.") from None
