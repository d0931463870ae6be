"""The dimension letters, and the checks that turn a mismatch into a readable error.

B batch, L length, P prompt, N positions in this call, S / T a tile's sources and targets, D channels of one layer,
M convolutions side by side, C = M * D filter channels, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from flash_inference.errors import ShapeError


def check_shape(name: str, tensor: Tensor, letters: str, **sizes: int) -> None:
    """Raises ShapeError unless `tensor` has one axis per letter and the given sizes.

    >>> check_shape("y", torch.zeros(3, 2), "N C", C=2)
    """
    names = letters.split()
    got = tuple(tensor.shape)
    if len(got) != len(names):
        raise ShapeError(f"{name} has shape {got}; expected {len(names)} axes [{', '.join(names)}].")
    for letter, size in zip(names, got, strict=True):
        if letter in sizes and sizes[letter] != size:
            wanted = ", ".join(f"{n}={sizes[n]}" if n in sizes else n for n in names)
            raise ShapeError(f"{name} has shape {got}; expected [{wanted}]: its {letter} axis is {size}.")


def check_dtype(name: str, tensor: Tensor, like: Tensor, remedy: str) -> None:
    """Raises ShapeError unless `tensor` has the dtype and device of `like`."""
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ShapeError(
            f"{name} is {tensor.dtype} on {tensor.device}; expected {like.dtype} on {like.device}. {remedy}"
        )
