"""The tensors of a model by name: what a folder stores, how they are put in place, how they are converted."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, a tied one under its first name alone."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if first.setdefault(id(tensor), name) == name}


def assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put `tensors` in the place of the model's own, ties kept."""
    state = model.state_dict(keep_vars=True)
    fresh = {id(state[name]): nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    model.load_state_dict({name: fresh[id(old)] for name, old in state.items()}, assign=True)


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """The tensor in `dtype` on `device`; a filter is kept in float32 at least, for its taps need it."""
    if ".filter." in name and (dtype or tensor.dtype).itemsize < 4:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(device=device, dtype=dtype)


def shape(tensor: Tensor) -> list[int]:
    """The shape as messages print it."""
    return list(tensor.shape)
