"""Rows of a state: picked into a new one, or copied onto others in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from flash_inference.mixers.mixer import tensors
from flash_inference.mixers.stack import spaced
from flash_inference.models.decoder import Decoder, ModelState


@torch.inference_mode(False)
@torch.no_grad()
def select_rows(decoder: Decoder, state: ModelState, rows: Sequence[int]) -> ModelState:
    """An independent state whose row i is row `rows[i]` of `state`. What is due is paid first."""
    decoder.settle(state)
    index = torch.tensor(rows, device=state.start.device)
    pasts = [
        [replace(past, **{name: tensor[index] for name, tensor in tensors(past).items()}) for past in of_block]
        for of_block in state.pasts
    ]
    stack = state.stack
    if stack is not None:
        assert decoder.stack is not None
        C, _, length = stack.history.shape
        history = spaced(stack.history, C, len(rows), length)
        for row, source in enumerate(rows):
            history[:, row] = stack.history[:, source]
        stack = replace(
            stack, start=stack.start[index], history=history, inputs=stack.inputs[:, index],
            partial=stack.partial[:, index], owed=None, pushes=[],
        )  # fmt: skip
        stack = decoder.stack.bind(stack)
    return decoder.bind(replace(state, pasts=pasts, start=state.start[index], stack=stack, step=None))


@torch.no_grad()
def copy_rows(state: ModelState, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Overwrites rows `targets` with rows `sources`, none of which is a target; a tile that is due pays for both."""
    stack = state.stack
    for source, target in zip(sources, targets, strict=True):
        batch_first = [tensor for of_block in state.pasts for past in of_block for tensor in tensors(past).values()]
        for tensor in (state.start, *batch_first):
            tensor[target] = tensor[source]
        if stack is not None:
            stack.start[target] = stack.start[source]
            for tensor in (stack.history, stack.inputs, stack.partial):
                tensor[:, target] = tensor[:, source]
