"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu-tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "identity": torch.positive,
    "silu": nn.functional.silu,
}


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh form of GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., D]."""
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) without biases; `activation` names one of ACTIVATIONS.

    Source: Shazeer, GLU Variants Improve Transformer (2020), arXiv 2002.05202.
    """

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., D]."""
        return self.down(self.act(self.gate(x)) * self.up(x))
