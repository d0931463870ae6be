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
    ids = [int(token) for token in row]
    if ids[0] in complement:
        raise TokenError(
            f"the row begins with the letter {model.tokens.decode(ids[:1])}; a reverse complement needs a start token, "
            f"which stays first on both strands. Prepend {model.config.start_token}, or give text."
        )
    for place, token in enumerate(ids[1:], 1):
        if token not in complement:
            raise TokenError(
                f"token id {token} at position {place} has no complement; expected letters after the start token. "
                "Remove special tokens, or leave reverse_complement out."
            )
    return torch.tensor([ids[0], *(complement[token] for token in reversed(ids[1:]))])


def mean_of_strands(forward: Tensor, reverse: Tensor) -> Tensor:
    """Scores [L] of a sequence's letters, each the mean of both readings: (forward + reverse, last first) / 2."""
    return (forward + reverse.flip(-1)) / 2
