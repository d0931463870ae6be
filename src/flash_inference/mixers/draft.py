"""Positions of a stack that may be taken back: their inputs lie in a log beside the state."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_inference.mixers.stack import Stack, StackState
from flash_inference.ops.tile_conv import tile_conv, triangle_conv


class StackDraft:
    """What would follow a StackState, which stays as it is.

    A drafted position is its partial sum, and the direct sum over the drafts so far: no draft enters a tile. In one
    buffer a row that becomes an input loses its partial sum, so rows become inputs when drafts are accepted, by
    `Stack.enter`. `inputs` [n, B, M * D] are those of the drafts.
    """

    def __init__(self, stack: Stack, state: StackState) -> None:
        self.stack, self.state = stack, state
        self.inputs = self.partial = state.inputs[:0]

    def begin(self, n: int) -> None:
        """Opens the next n positions: what the known positions and the earlier drafts owe them."""
        drafted = len(self.inputs)
        self.partial = self.stack.ahead(self.state, drafted + n)[drafted:]
        if drafted:
            tile_conv(self.inputs, self.stack.filter, 1, out=self.partial)
        self.inputs = torch.cat([self.inputs, torch.zeros_like(self.partial)])

    def mix(self, m: int, y: Tensor) -> Tensor:
        """Outputs z [n, B, D] of convolution m for its inputs y [n, B, D] at the positions that `begin` opened."""
        stack, state, n = self.stack, self.state, len(y)
        lanes, drafted = stack.lanes[m], len(self.inputs) - n
        if state.clock + drafted < state.last_start:
            alive = stack.alive(state, drafted + n)[:, drafted:]
            y = y * alive.T[..., None].to(y.dtype)
        inputs, z = self.inputs[drafted:, :, lanes], self.partial[..., lanes]
        inputs.copy_(y)
        triangle_conv(inputs, stack.filter, out=z, channels=lanes)
        return z.addcmul_(stack.skip[lanes], inputs)
