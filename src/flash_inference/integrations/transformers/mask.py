"""Attention masks, read as the positions at which rows begin and end."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_inference.errors import ShapeError


def ranges(mask: Tensor | None, tokens: Tensor, past: int = 0) -> tuple[Tensor, Tensor]:
    """Where each row begins and ends, [B] each, by a mask [B, past + N] of the tokens [B, N] and those before them.

    Without a mask rows are whole; an empty row begins and ends behind the last position. Raises ShapeError for another
    shape, and for ones with a zero between them.
    """
    (batch, new), device = tokens.shape, tokens.device
    length = past + new
    if mask is None:
        return torch.zeros(batch, dtype=torch.long, device=device), torch.full((batch,), length, device=device)
    if mask.shape != (batch, length):
        raise ShapeError(
            f"attention_mask has shape {list(mask.shape)}; expected {[batch, length]}: the rows of input_ids, and a "
            f"column for each of {past} past and {new} new positions."
        )
    real = mask.to(device) != 0
    count = real.sum(-1)
    start = torch.where(count > 0, real.long().argmax(-1), length)
    stop = torch.where(count > 0, length - real.long().flip(-1).argmax(-1), length)
    torn = stop - start != count
    if torn.any():
        raise ShapeError(
            f"attention_mask has a 0 between the ones of row {int(torn.nonzero()[0])}; expected padding at the ends "
            "only. Join the row's pieces."
        )
    return start, stop


def starts(mask: Tensor | None, tokens: Tensor, past: int = 0) -> Tensor:
    """Where each row [B] begins, as `ranges`; raises ShapeError for rows that are padded on the right."""
    start, stop = ranges(mask, tokens, past)
    short = stop != past + tokens.shape[1]
    if short.any():
        raise ShapeError(
            f"attention_mask pads row {int(short.nonzero()[0])} on the right; with a cache rows are padded on the "
            "left, since all of them go on behind the last column. Set tokenizer.padding_side = 'left'."
        )
    return start
