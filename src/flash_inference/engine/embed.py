"""Hidden states of given tokens, at any layer, exact, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from flash_inference.engine.plan import check_memory
from flash_inference.engine.prompts import Prompt, as_rows, is_text
from flash_inference.engine.ragged import CHUNK, batches, together
from flash_inference.errors import LengthError, NumericsError, SettingError
from flash_inference.models.backbone import LanguageModel
from flash_inference.tiling import Blocked

Pool = Literal["none", "mean", "last"]
POOLS: tuple[Pool, ...] = ("none", "mean", "last")


def embed(
    model: LanguageModel,
    tokens: Prompt,
    *,
    layer: int = -1,
    pool: Pool = "none",
    chunk: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Hidden states [B, L, D] of tokens [B, L]: what `layer` says of each position, from itself and its past.

    layer 0 is the embedding, n the output of block n, `layers` what enters the final norm, and -1, after it, what
    the head reads; negative numbers count from there, as in a list. `pool` "mean" and "last" give one vector a row,
    [B, D]; means are summed in float64. Text is read after the model's start token, whose own state is left out:
    the vectors are those of the text's tokens. Ragged rows, or texts of several lengths, give a list of [1, L_b, D]
    tensors, or [B, D] when pooled: no row is padded, each has the states that it has alone.
    `chunk` positions are taken at once, over rows of one length together; the result does not depend on it. Memory
    beyond a batch's state and the result is that of one chunk. `progress` is called with the number of positions
    embedded since its last call. Cost: one pass over all layers, whichever is asked for.
    Raises SettingError, LengthError, TokenError and ShapeError before any compute, PlanError, NumericsError.

    >>> vectors = flash_inference.embed(model, ["ACGT", "GATTACA"], pool="mean")
    """
    if pool not in POOLS:
        raise SettingError(f"pool is {pool!r}; expected one of {', '.join(POOLS)}.")
    check_layer(model, layer)
    rows, skips = as_rows(model, tokens), [int(text) for text in is_text(tokens)]
    for index, (row, skip) in enumerate(zip(rows, skips, strict=True)):
        if len(row) == skip:
            raise LengthError(f"row {index} is empty text; expected at least 1 character. Remove it.")
    results: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in batches(rows, chunk, skips):
        states = embed_chunks(model, torch.stack([rows[index] for index in batch]), layer, skips[batch[0]], chunk)
        if progress is not None:
            states = _told(states, progress)
        length = len(rows[batch[0]]) - skips[batch[0]]
        for index, result in zip(batch, _pooled(states, pool, length), strict=True):
            results[index] = result
    return together(results) if pool == "none" else torch.stack(results)


def embed_chunks(
    model: LanguageModel, tokens: Tensor, layer: int = -1, skip: int = 0, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """The positions of `embed` from `skip` on for tokens [B, L], a chunk [B, N, D] at a time: N may be 0 at first."""
    batch, length = tokens.shape
    tokens = model.check_tokens(tokens)
    check_memory(model, batch, length, 1)
    decoder = model.decoder(length)
    state = decoder.init(batch, Blocked(length))
    for first in range(0, length, chunk):
        piece = tokens[:, first : first + chunk].to(model.embedding.weight.device)
        x = decoder.hidden(state, piece, layer).cpu()
        if not torch.isfinite(x).all():
            raise NumericsError(
                f"the hidden states within positions {first} .. {first + piece.shape[1] - 1} are not finite. Check the "
                "weights and the filter; chunk=1 finds the position."
            )
        yield x[:, max(skip - first, 0) :]


def check_layer(model: LanguageModel, layer: int) -> None:
    """Raises SettingError unless the model has such a layer."""
    layers = len(model.blocks)
    if not -layers - 2 <= layer <= layers + 1:
        raise SettingError(
            f"layer is {layer}; this model has 0 (the embedding), 1 .. {layers} (its blocks) and -1 (after the final "
            "norm). Choose one of them."
        )


def _pooled(states: Iterator[Tensor], pool: Pool, length: int) -> Tensor:
    """[B, L, D] of chunks, or [B, D]: only what is asked for is kept."""
    if pool == "none":
        whole, done = torch.empty(0), 0
        for x in states:
            whole = whole if done else x.new_empty(x.shape[0], length, x.shape[2])
            whole[:, done : done + x.shape[1]] = x
            done += x.shape[1]
        return whole
    total, count, last = torch.zeros(()), 0, torch.empty(0)
    for x in states:
        if x.shape[1]:
            total, count, last = total + x.double().sum(1), count + x.shape[1], x[:, -1]
    return (total / count).to(last.dtype) if pool == "mean" else last.clone()


def _told(states: Iterator[Tensor], progress: Callable[[int], None]) -> Iterator[Tensor]:
    for x in states:
        yield x
        progress(x.shape[0] * x.shape[1])
