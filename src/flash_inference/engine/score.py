"""Log-likelihood of given tokens, exact, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flash_inference.engine.plan import check_memory
from flash_inference.engine.prompts import Prompt, as_rows
from flash_inference.errors import LengthError, NumericsError
from flash_inference.models.backbone import LanguageModel
from flash_inference.tiling import Blocked


def score(model: LanguageModel, tokens: Prompt, *, chunk: int = 4096) -> Any:
    """Natural log-probabilities log p(token i + 1 | tokens 0 .. i), as [B, L - 1] for tokens [B, L].

    Text begins with the model's start token, so that its first character is scored too. Ragged rows, or several
    texts, give a list of [1, L_b - 1] tensors. The result does not depend on `chunk`, the positions taken at once;
    memory beyond the state is that of one chunk. Raises LengthError, TokenError, NumericsError.

    >>> bits = -flash_inference.score(model, "To be, or not to be").mean() / math.log(2)
    """
    rows = as_rows(model, tokens)
    if len({len(row) for row in rows}) > 1:
        return [_score(model, row[None], chunk) for row in rows]
    return _score(model, torch.stack(rows), chunk)


def _score(model: LanguageModel, tokens: Tensor, chunk: int) -> Tensor:
    return torch.cat(list(score_chunks(model, tokens, chunk)), dim=1)


def score_chunks(model: LanguageModel, tokens: Tensor, chunk: int = 4096) -> Iterator[Tensor]:
    """The columns of `score` for tokens [B, L], a chunk at a time: for progress on long inputs."""
    if chunk < 1:
        raise LengthError(f"chunk is {chunk}; expected at least 1 position.")
    batch, length = tokens.shape
    if length < 2:
        raise LengthError(
            f"{length} token was given; a score needs 2, a first one and one to score. Prepend a start token."
        )
    tokens = model.check_tokens(tokens)
    check_memory(model, batch, length, 1)
    decoder = model.decoder(length)
    state = decoder.init(batch, Blocked(length))
    for first in range(0, length - 1, chunk):
        last = min(first + chunk, length - 1)
        logits = decoder.extend(state, tokens[:, first:last].to(model.embedding.weight.device), every=True).cpu()
        if not torch.isfinite(logits).all():
            raise NumericsError(
                f"the logits within positions {first} .. {last - 1} are not finite. Check the weights and the filter; "
                "chunk=1 finds the position."
            )
        chances = logits.log_softmax(-1)
        yield chances.gather(-1, tokens[:, first + 1 : last + 1, None])[..., 0]
