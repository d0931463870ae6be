"""Blocks that keep nothing of the past but their long convolutions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flash_inference.models.block import Block, BlockPast
from flash_inference.ops.causal_conv import causal_conv

Mix = Callable[[int, Tensor], Tensor]
"""`mix(o, y)`: long convolution o of its inputs y [B, N, C], as [B, N, C]."""


class Convolving(Block):
    """A block written once, as `compute(x, mix)`: by position but for its long convolutions, which `mix` stands for."""

    def compute(self, x: Tensor, mix: Mix) -> Tensor:
        """x [B, N, D] -> [B, N, D], whoever convolves."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The whole sequence, convolved by FFT: x [B, L, D] -> [B, L, D]."""
        return self.compute(x, self.convolve)

    def extend(self, x: Tensor, past: BlockPast) -> Tensor:
        """The next positions x [B, N, D] -> [B, N, D]."""
        return self.compute(x, past.mix)

    def convolve(self, o: int, y: Tensor) -> Tensor:
        """Long convolution o of a whole sequence y [B, L, C], skip term included: [B, L, C]."""
        for group in self.convolutions:
            if o < group.count:
                lanes, channels = y.transpose(1, 2), slice(o * group.width, (o + 1) * group.width)
                z = causal_conv(lanes, group.filter.taps(y.shape[1], 0, channels), group.stride)
                if group.skip is not None:
                    z = z + group.skip[channels, None].to(y.dtype) * lanes
                return z.transpose(1, 2)
            o -= group.count
        raise IndexError(o)

    @property
    def activations(self) -> int:
        """Those of the linear layers, and the inputs and outputs of the convolutions."""
        return super().activations + 2 * sum(group.filter.channels for group in self.convolutions)
