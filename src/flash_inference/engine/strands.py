"""The two strands of DNA: the same molecule, read from either end."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_inference.errors import TokenError
from flash_inference.models.backbone import LanguageModel


def other_strand(model: LanguageModel, row: Tensor) -> Tensor:
    """The reverse complement of a token row [L]: the start token that it begins with, then complements, last first.

    Raises TokenError if the model's tokens have no complement, the first token is a letter, or another one is none.
    """
    complement = model.tokens.complement
    if complement is None:
        raise TokenError(
            f"the model's tokens ({model.tokens.name}) have no complement; a reverse complement needs a table of DNA "
            "letters. Leave reverse_complement out."
        )
    partners = torch.full((model.config.vocab_size,), -1)
    partners[list(complement)] = torch.tensor(list(complement.values()))
    found = partners[row]
    if found[0] >= 0:
        raise TokenError(
            f"the row begins with the letter {model.tokens.decode([int(row[0])])}; a reverse complement needs a start "
            f"token, which stays first on both strands. Prepend {model.config.start_token}, or give text."
        )
    if (found[1:] < 0).any():
        place = 1 + int((found[1:] < 0).nonzero()[0])
        raise TokenError(
            f"token id {int(row[place])} at position {place} has no complement; expected letters after the start "
            "token. Remove special tokens, or leave reverse_complement out."
        )
    return torch.cat([row[:1], found[1:].flip(0)])


def mean_of_strands(forward: Tensor, reverse: Tensor) -> Tensor:
    """Scores [L] of a sequence's letters, each the mean of both readings: (forward + reverse, last first) / 2."""
    return (forward + reverse.flip(-1)) / 2
