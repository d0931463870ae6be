"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from flash_inference.errors import ModelError
from flash_inference.filters import rpe

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **rpe.ACTIVATIONS,
    "gelu-tanh": partial(nn.functional.gelu, approximate="tanh"),
}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of a name. Raises ModelError for one that is unknown."""
    if name not in ACTIVATIONS:
        raise ModelError(f"activation {name!r} is unknown; expected one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


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
    """down(a(gate(x)) * up(x)) with an activation a: a gated linear unit.

    Source: Shazeer, GLU Variants Improve Transformer (2020), arXiv 2002.05202.
    """

    def __init__(self, width: int, inner: int, *, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.activation = activation
        activation_of(activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., D]."""
        return self.down(activation_of(self.activation)(self.gate(x)) * self.up(x))
