"""Noise that is a function of where it is asked for: the same on every device, in every batch."""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9 and 0x94d049bb133111eb as signed numbers of 64 bits."""


def exponential(streams: Tensor, drawn: Tensor, count: int) -> Tensor:
    """Exponential variates e [B, count] of mean 1, float32: those numbered drawn[b] * count .. of stream streams[b].

    streams and drawn are int64 [B]. Number i of stream s is -log(1 - w) with w in (0, 1) from the upper 53 bits of
    SplitMix64's output i + 1 from state s: small variates keep float32's relative precision. O(1) each, in any order.
    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014), the generator SplitMix64.
    """
    if streams.is_cuda:
        from flash_inference.ops.noise.triton import exponential_rows

        return exponential_rows(streams, drawn, count)
    number = drawn[:, None] * count + torch.arange(1, count + 1, device=streams.device)
    x = mixed(streams[:, None] + GAMMA * number)
    w = (_shifted(x, 11).double() + 0.5) * 2.0**-53
    return -torch.log1p(-w).float()


def stream(seed: int) -> int:
    """The stream of a seed, so that those of neighbouring seeds have nothing to do with each other."""
    return int(mixed(torch.tensor([(seed + 2**63) % 2**64 - 2**63]))[0])


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's output function of states x, int64 [..], modulo 2^64."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by with zeros from above."""
    return (x >> by) & ((1 << (64 - by)) - 1)
