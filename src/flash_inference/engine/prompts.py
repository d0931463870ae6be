"""What a caller may give as a prompt, and the checks that it passes before any compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_inference.errors import LengthError, ShapeError, TokenError
from flash_inference.mixers.stack import check_tiling as pays_every_lag
from flash_inference.models.backbone import LanguageModel
from flash_inference.tiling import Tiling

Prompt = Tensor | str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor] | None


def as_rows(model: LanguageModel, prompt: Prompt) -> list[Tensor]:
    """The prompt as token rows [P_b], each of at least one token: an empty row becomes the model's start token.

    Takes a tensor [B, P] or [P], a list of ids, a list of such rows (ragged ones too), text, a list of texts, or
    None for one empty row. Text is encoded with the model's tokens and begins with the start token.
    """
    rows = [_as_row(model, row) for row in _rows(prompt)]
    if not rows:
        raise ShapeError("the prompt has no rows; expected at least one. Pass None, or [[]], to start from nothing.")
    return [model.check_tokens(row[None], first_row=index)[0] for index, row in enumerate(rows)]


def is_text(prompt: Prompt) -> list[bool]:
    """For each row of `as_rows`: whether it was given as text, hence begins with a start token that was not given."""
    return [row is None or isinstance(row, str) for row in _rows(prompt)]


def _rows(prompt: Any) -> list[Any]:
    if prompt is None or isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, Tensor):
        if prompt.ndim not in (1, 2):
            raise ShapeError(f"the prompt has shape {tuple(prompt.shape)}; expected [B, P] or [P] token ids.")
        return [prompt] if prompt.ndim == 1 else list(prompt)
    if isinstance(prompt, Sequence):
        items: list[Any] = list(prompt)  # type: ignore[reportUnknownArgumentType]
        nested = any(isinstance(item, str | Tensor | Sequence) for item in items)
        return items if nested else [items]
    raise TokenError(f"the prompt is a {type(prompt).__name__}; expected token ids (tensor or lists), text, or None.")


def _as_row(model: LanguageModel, row: Any) -> Tensor:
    start = model.config.start_token
    if row is None:
        return torch.tensor([start])
    if isinstance(row, str):
        return torch.tensor([start, *model.tokens.encode(row)])
    if isinstance(row, Tensor):
        tokens = row.detach().cpu()
    else:
        try:
            tokens = torch.tensor(list(row), dtype=None if len(row) else torch.long)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TokenError(f"a prompt row is not a list of integer ids ({error}). Encode text first.") from None
    return tokens if tokens.numel() else torch.tensor([start])


def check_tiling(tiling: Tiling | None, positions: int) -> None:
    """Raises LengthError or TilingError unless a tiling that the caller gave covers the run."""
    if tiling is None:
        return
    if tiling.length is not None and tiling.length < positions:
        raise LengthError(
            f"{tiling!r} covers {tiling.length} positions; prompt and new tokens take {positions}, the last one aside. "
            f"Build it for {positions}."
        )
    pays_every_lag(tiling, positions)


def check_room(model: LanguageModel, longest: int, max_new_tokens: int) -> None:
    """Raises LengthError unless prompt and new tokens fit the filter."""
    if max_new_tokens < 1:
        raise LengthError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    limit = model.config.length
    if longest + max_new_tokens > limit:
        raise LengthError(
            f"{longest} prompt tokens + {max_new_tokens} new tokens = {longest + max_new_tokens}; this model's filter "
            f"has {limit} taps, the most positions it can run. Ask for at most {max(limit - longest, 0)} new tokens, "
            "or shorten the prompt."
        )
