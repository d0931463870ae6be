"""A finite impulse response: a few taps per channel, shared by groups of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from flash_inference.errors import FilterError
from flash_inference.mixers.mixer import Moment
from flash_inference.shapes import check_shape

TapOrder = Literal["cross-correlation", "convolution"]


@dataclass(slots=True)
class FIRPast:
    """`inputs` [B, taps - 1, C]: the last inputs, oldest first, zero before a row's first."""

    inputs: Tensor


class FiniteResponse(nn.Module):
    """z[t] = bias + skip u[t] + sum over k < taps of h[k] u[t - k]: depthwise and causal, zero inputs before the first.

    Subclasses differ in where `kernel` takes h from. Cost O(taps) per position and channel. Exact for every number of
    positions, also below `taps`.
    """

    decodes: ClassVar[str] = "FIR ring"
    replays: ClassVar[bool] = True
    bias: nn.Parameter | None
    skip: nn.Parameter | None

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        if taps < 1:
            raise FilterError(f"taps is {taps}; expected at least 1.")
        self.channels, self.taps = channels, taps

    def kernel(self) -> Tensor:
        """h backwards, [groups, 1, taps]: the last weight multiplies the newest input."""
        raise NotImplementedError

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and device of the inputs that are kept."""
        return next(self.parameters())

    def forward(self, u: Tensor) -> Tensor:
        """The whole sequence: u [B, L, C] -> [B, L, C]."""
        check_shape("u", u, "B L C", C=self.channels)
        return self.apply_to(nn.functional.pad(u, (0, 0, self.taps - 1, 0)), u)

    def init(self, batch: int, length: int) -> FIRPast:
        """The empty past of `batch` rows: zeros, whatever the length."""
        return FIRPast(self.like.new_zeros(batch, self.taps - 1, self.channels))

    def past_bytes(self, length: int) -> int:
        """Bytes of one row's past."""
        return (self.taps - 1) * self.channels * self.like.itemsize

    @torch.no_grad()
    def extend(self, past: FIRPast, x: Tensor, moment: Moment) -> Tensor:
        """The next N positions x [B, N, C] -> [B, N, C], exact anywhere; `past` is advanced in place."""
        check_shape("x", x, "B N C", B=past.inputs.shape[0], C=self.channels)
        if x.shape[1] == 0:
            return x
        x = moment.enter(past, x)
        window = torch.cat([past.inputs.to(x.dtype), x], dim=1)
        z = self.apply_to(window, x)
        past.inputs.copy_(window[:, x.shape[1] :])
        return z

    def apply_to(self, window: Tensor, u: Tensor) -> Tensor:
        """Outputs [B, N, C] for the inputs u [B, N, C] that end window [B, taps - 1 + N, C]."""
        weight = self.kernel().to(window.dtype)
        groups = len(weight)
        if u.shape[1] == 1:
            z = (window.unflatten(-1, (groups, -1)) * weight[:, 0].T[..., None]).sum(1, keepdim=True).flatten(-2)
            z = z if self.bias is None else z + self.bias
        else:
            weight = weight.repeat_interleave(self.channels // groups, dim=0)
            z = nn.functional.conv1d(window.mT, weight, self.bias, groups=self.channels).mT
        return z if self.skip is None else torch.addcmul(z, self.skip.to(z.dtype), u)


class FIR(FiniteResponse):
    """A finite response with stored taps.

    `weight` [groups, 1, taps] holds h; each group's filter serves channels / groups channels in a row. Its `order` is
    that of "cross-correlation" (the last weight multiplies the newest input) or "convolution" (the first does).
    """

    def __init__(
        self,
        channels: int,
        taps: int,
        *,
        groups: int | None = None,
        order: TapOrder = "cross-correlation",
        bias: bool = True,
        skip: bool = False,
    ) -> None:
        super().__init__(channels, taps)
        groups = channels if groups is None else groups
        if groups < 1 or channels % groups:
            raise FilterError(f"{groups} groups of filters for {channels} channels; expected a divisor of {channels}.")
        if order not in ("cross-correlation", "convolution"):
            raise FilterError(f'order is {order!r}; expected "cross-correlation" or "convolution".')
        self.groups, self.order = groups, order
        bound = taps**-0.5
        self.weight = nn.Parameter(torch.empty(groups, 1, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.skip = nn.Parameter(torch.randn(channels)) if skip else None

    def kernel(self) -> Tensor:
        """The weight, turned round if it begins with the newest input's."""
        return self.weight if self.order == "cross-correlation" else self.weight.flip(-1)
