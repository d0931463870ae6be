"""Log-likelihood of given tokens, exact, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from flash_inference.engine.plan import check_memory
from flash_inference.engine.prompts import Prompt, as_rows
from flash_inference.engine.ragged import CHUNK, batches, together
from flash_inference.engine.strands import mean_of_strands, other_strand
from flash_inference.errors import LengthError, NumericsError, SettingError
from flash_inference.models.backbone import LanguageModel
from flash_inference.tiling import Blocked

Reduce = Literal["none", "sum", "mean"]
REDUCTIONS: tuple[Reduce, ...] = ("none", "sum", "mean")


def score(
    model: LanguageModel,
    tokens: Prompt,
    *,
    reverse_complement: bool = False,
    reduce: Reduce = "none",
    chunk: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Natural log-probabilities log p(token i + 1 | tokens 0 .. i), as [B, L - 1] for tokens [B, L].

    Text begins with the model's start token, so that its first character is scored too. Ragged rows, or texts of
    several lengths, give a list of [1, L_b - 1] tensors: no row is padded, each has the score that it has alone.
    `reduce` "sum" gives the log-likelihood of each row, "mean" that of a token, as float64 [B], ragged or not.
    `reverse_complement`, for DNA, gives each letter the mean of its log-probabilities on both strands, so that the
    sum is the mean of the strands' log-likelihoods; rows are text, or begin with a start token.
    `chunk` positions are taken at once, over rows of one length together; the result does not depend on it. Memory
    beyond a batch's state is that of one chunk. `progress` is called with the number of tokens scored since its last
    call. Cost: O(L log^2 L) a channel, one pass over the weights a chunk.
    Raises SettingError, LengthError, TokenError and ShapeError before any compute, PlanError, NumericsError.

    >>> bits = -flash_inference.score(model, "To be, or not to be").mean() / math.log(2)
    """
    if reduce not in REDUCTIONS:
        raise SettingError(f"reduce is {reduce!r}; expected one of {', '.join(REDUCTIONS)}.")
    rows = as_rows(model, tokens)
    forward = len(rows)
    if reverse_complement:
        rows += [other_strand(model, row) for row in rows]
    for row in rows:
        _check_length(len(row))
    scores: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in batches(rows, chunk):
        pieces: list[Tensor] = []
        for piece in score_chunks(model, torch.stack([rows[index] for index in batch]), chunk):
            pieces.append(piece)
            if progress is not None:
                progress(piece.numel())
        for index, result in zip(batch, torch.cat(pieces, dim=1), strict=True):
            scores[index] = result
    if reverse_complement:
        scores = [mean_of_strands(*pair) for pair in zip(scores[:forward], scores[forward:], strict=True)]
    if reduce == "none":
        return together(scores)
    totals = torch.stack([result.double().sum() for result in scores])
    return totals if reduce == "sum" else totals / torch.tensor([len(result) for result in scores])


def score_chunks(model: LanguageModel, tokens: Tensor, chunk: int = CHUNK) -> Iterator[Tensor]:
    """The columns of `score` for tokens [B, L], a chunk at a time: for progress on long inputs."""
    if chunk < 1:
        raise LengthError(f"chunk is {chunk}; expected at least 1 position.")
    batch, length = tokens.shape
    _check_length(length)
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


def _check_length(length: int) -> None:
    if length < 2:
        raise LengthError(
            f"{length} token was given; a score needs 2, a first one and one to score. Prepend a start token."
        )
