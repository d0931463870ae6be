"""The feed-forward part of a block."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh form of GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., D]."""
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))
