"""Norms that PyTorch does not have."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from flash_inference.errors import ModelError

EpsPlace = Literal["inside", "outside"]
EPS_PLACES: tuple[EpsPlace, ...] = ("inside", "outside")


class RMSNorm(nn.Module):
    """weight x / sqrt(mean(x^2) + eps), or weight x / (sqrt(mean(x^2)) + eps): eps "inside" the root or "outside" it.

    Formed in float32 at least. Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), arXiv
    1910.07467; StripedHyena puts eps outside. Raises ModelError for another place.
    """

    def __init__(self, width: int, eps: float, *, eps_place: EpsPlace = "inside") -> None:
        super().__init__()
        if eps_place not in EPS_PLACES:
            raise ModelError(f"eps_place is {eps_place!r}; expected one of {', '.join(EPS_PLACES)}.")
        self.eps, self.eps_place = eps, eps_place
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., D]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.eps_place == "inside":
            wide = x.to(dtype)
            return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype) * x.shape[-1] ** -0.5
        return (x / (root + self.eps)).to(x.dtype) * self.weight


class PlainRMSNorm(nn.Module):
    """x / (||x|| / sqrt(D) + eps): a root mean square norm without weights, eps outside the root."""

    def __init__(self, width: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., D]."""
        return x / (x.norm(dim=-1, keepdim=True) * self.width**-0.5 + self.eps)
