"""What a filter is, and what all filters check alike."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flash_inference.errors import FilterError, LengthError


@runtime_checkable
class Filter(Protocol):
    """Taps rho [channels, length] of causal convolutions, lag 0 first, evaluated in any pieces.

    Tap k does not depend on how many taps are asked for, so that prefixes agree. A filter may have an attribute
    `stride`: taps are zero at lags that it does not divide, and tiles then pay the others only.
    """

    channels: int
    length: int

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n], in float32 at least."""
        ...


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64 if it is, in float32 otherwise: taps are never evaluated in less."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def check_span(n: int, start: int, length: int) -> None:
    """Raises LengthError unless taps start .. start + n - 1 lie among the `length` taps that a filter stores."""
    if start < 0 or n < 0 or start + n > length:
        raise LengthError(
            f"taps {start} .. {start + n - 1} were asked for; the filter stores taps 0 .. {length - 1}. "
            "Run shorter sequences: there are no weights for later taps."
        )


def check_choice(name: str, value: object, known: tuple[object, ...], reason: str = "") -> None:
    """Raises FilterError unless a setting has one of the values that the library evaluates."""
    if value not in known:
        names = ", ".join(repr(item) for item in known)
        raise FilterError(f"filter setting {name} is {value!r}; expected one of {names}. {reason}".rstrip())
