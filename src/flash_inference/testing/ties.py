"""Ties: positions whose greedy token is not determined by the precision, the only excuse for a difference.

A tie is a position at which the gap between the two largest logits is below 8 times the largest difference, at that
position, between the logits in float32 and in float64.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

FACTOR = 8


class Tie(NamedTuple):
    """One position: the top-2 gap of its float64 logits, and how far its float32 logits lie from them at most."""

    row: int
    position: int
    gap: float
    difference: float


def find_ties(logits: Tensor, exact: Tensor) -> list[Tie]:
    """The ties among positions with float32 logits [B, L, V] and float64 logits `exact` [B, L, V]."""
    top = exact.topk(2, dim=-1).values
    gap = top[..., 0] - top[..., 1]
    difference = (logits.double() - exact).abs().amax(-1)
    places = (gap < FACTOR * difference).nonzero().tolist()
    return [Tie(b, t, float(gap[b, t]), float(difference[b, t])) for b, t in places]


@torch.no_grad()
def greedy_differences(model: nn.Module, prompt: Tensor, tokens: Tensor) -> tuple[list[Tie], list[Tie]]:
    """Where greedy `tokens` [B, N] after `prompt` [B, P] differ from a full recompute: (unexcused, ties).

    The recompute is one teacher-forced forward over prompt and tokens: its argmax at every position. Differing
    positions, counted from the first new token, come back as `Tie`s, split by whether they are ties.
    """
    sequence = torch.cat([prompt, tokens], dim=1)[:, :-1]
    first = prompt.shape[1] - 1
    logits = model(sequence)[:, first:]
    wrong = {(b, t) for b, t in (logits.argmax(-1) != tokens).nonzero().tolist()}
    if not wrong:
        return [], []
    exact = copy.deepcopy(model).double()(sequence)[:, first:]
    ties = {(tie.row, tie.position): tie for tie in find_ties(logits, exact)}
    excused = [ties[place] for place in sorted(wrong & ties.keys())]
    top = exact.topk(2, dim=-1).values
    unexcused = [
        Tie(b, t, float(top[b, t, 0] - top[b, t, 1]), float((logits[b, t].double() - exact[b, t]).abs().max()))
        for b, t in sorted(wrong - ties.keys())
    ]
    return unexcused, excused
