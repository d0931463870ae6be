"""Rows of different lengths: run in batches of one length, without padding, and given back in their order."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from flash_inference.errors import LengthError

CHUNK = 4096
"""Positions taken at once, over all rows of a batch, unless the caller says otherwise."""


def batches(rows: Sequence[Tensor], chunk: int, kinds: Sequence[Hashable] = ()) -> Iterator[list[int]]:
    """Indices of rows [L_b] that run together: of one length, and one kind if `kinds` are given, longest first.

    A batch has as many rows as make `chunk` positions, at least one. Raises LengthError unless `chunk` is positive.
    """
    if chunk < 1:
        raise LengthError(f"chunk is {chunk}; expected at least 1 position.")
    alike: dict[tuple[int, Hashable], list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault((len(row), kinds[index] if kinds else None), []).append(index)
    for (length, _), indices in sorted(alike.items(), key=lambda item: -item[0][0]):
        size = max(chunk // max(length, 1), 1)
        yield from (indices[first : first + size] for first in range(0, len(indices), size))


def together(results: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Results [L_b, ..] of rows as one tensor [B, L, ..] if all have one length, else as a list of [1, L_b, ..]."""
    if len(results) == 1:
        return results[0][None]
    if len({len(result) for result in results}) == 1:
        return torch.stack(list(results))
    return [result[None] for result in results]
