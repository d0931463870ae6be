"""Heads of H3 and MultiHyena: outer products of keys and values, contracted with queries after the convolution."""

from __future__ import annotations

from torch import Tensor

ORDERS = ("head-place", "place-head")


def outer(k: Tensor, v: Tensor, width: int) -> Tensor:
    """[.., D], [.., D] -> [.., D width]: k[h, a] v[h, b] of each head h, in the order (h, a, b)."""
    k, v = k.unflatten(-1, (-1, width)), v.unflatten(-1, (-1, width))
    return (k[..., :, None] * v[..., None, :]).flatten(-3)


def contract(q: Tensor, z: Tensor, width: int, order: str = "head-place") -> Tensor:
    """[.., D], [.., D width] -> [.., D]: sum over a of q[h, a] z[h, a, b], laid out (h, b), or (b, h): "place-head"."""
    q, z = q.unflatten(-1, (-1, width)), z.unflatten(-1, (-1, width, width))
    y = (q[..., None] * z).sum(-2)
    return (y if order == "head-place" else y.mT).flatten(-2)
