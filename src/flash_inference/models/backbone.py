"""Embed, blocks, norm, head: the same for every family."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from flash_inference.errors import LengthError, ModelError, TokenError
from flash_inference.models.config import ModelConfig
from flash_inference.models.decoder import Decoder
from flash_inference.models.tokens import TOKENIZER, TOKENS, Table


class LanguageModel(nn.Module):
    """A language model of any family: tokens [B, L] -> logits [B, L, V]. Its config builds the parts that differ.

    `notes` tell what a loader assumed; `table` is a token table of the model's own, beside those of `models.tokens`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # What a family has beyond ModelConfig and Block is known to those who know the family.
        self.config: Any = config
        self.embedding = config.embedding()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = cast("list[Any]", nn.ModuleList(config.blocks()))
        self.norm: Any = config.final_norm()
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.table: Table | None = None
        self.notes: tuple[str, ...] = ()
        self._decoder: tuple[object, Decoder] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: not the decoders, which belong to this model's own weights."""
        return {name: value for name, value in self.__dict__.items() if name != "_gpu_decoder"} | {"_decoder": None}

    @property
    def tokens(self) -> Table:
        """The table between text and this model's token ids: `table`, where the model came with one of its own."""
        if self.table is not None:
            return self.table
        if self.config.tokens == TOKENIZER:
            raise ModelError(f"this model's text needs its family's {TOKENIZER}, which its folder does not have.")
        if self.config.tokens not in TOKENS:
            raise ModelError(f"token table {self.config.tokens!r} is unknown; expected one of {', '.join(TOKENS)}.")
        return TOKENS[self.config.tokens]

    def forward(self, tokens: Tensor) -> Tensor:
        """The full forward: tokens [B, L] -> logits [B, L, V], each position from itself and its past."""
        x = self.dropout(self.embedding(self.check_tokens(tokens)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def check_tokens(self, tokens: Tensor, first_row: int = 0) -> Tensor:
        """tokens [B, L] as int64. Raises unless they are ids of the vocabulary and no more than the filter's length."""
        if tokens.ndim != 2:
            raise TokenError(
                f"tokens have shape {tuple(tokens.shape)}; expected [B, L]. Add a batch axis: tokens[None]."
            )
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TokenError(f"tokens are {tokens.dtype}; expected integer ids. Convert with tokens.long().")
        tokens = tokens.long()
        bad = (tokens < 0) | (tokens >= self.config.vocab_size)
        if bad.any():
            row, place = (int(i) for i in bad.nonzero()[0])
            raise TokenError(
                f"token id {int(tokens[row, place])} at row {first_row + row}, position {place} is outside the "
                f"vocabulary; expected 0 .. {self.config.vocab_size - 1}. "
                "Was the text encoded with this model's tokens?"
            )
        if tokens.shape[1] > self.config.length:
            raise LengthError(f"{tokens.shape[1]} positions were given; {self.config.limit}")
        return tokens

    def decoder(self, length: int | None = None) -> Decoder:
        """This model made ready to decode `length` positions (default: all its filter allows).

        Kept and reused while the weights stay the same and the length suffices.
        """
        limit: int = self.config.length
        length = limit if length is None else length
        if not 1 <= length <= limit:
            raise LengthError(
                f"{length} positions were asked for; this model's filter allows 1 .. {limit}. "
                "Shorten the prompt, or ask for fewer new tokens."
            )
        version = tuple((p.data_ptr(), p._version) for p in self.parameters())
        if self._decoder is None or self._decoder[0] != version or self._decoder[1].length < length:
            self._decoder = (version, Decoder(self, length))
        return self._decoder[1]
