"""A long convolution as a layer: trains by FFT over whole sequences, decodes by tiles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_inference.filters import ExplicitFilter, Filter
from flash_inference.mixers.stack import Stack, StackState
from flash_inference.ops.causal_conv import causal_conv
from flash_inference.ops.tile_conv import Impl, PreparedFilter
from flash_inference.tiling import Rectangle, Share, Tiling


class LongConv(nn.Module):
    """z[t, d] = sum over i <= t of y[i, d] rho[t - i, d] + skip[d] y[t, d]: depthwise, causal, as long as its filter.

    `filter` gives the taps: one of `filters`, or any module with `channels`, `length` and `taps(n) -> [channels, n]`;
    by default explicit taps, one parameter each. Its `stride`, if it has one, makes tiles cheaper. `skip` adds the D
    term.
    """

    def __init__(self, channels: int, length: int, *, filter: Filter | None = None, skip: bool = True) -> None:
        super().__init__()
        self.channels, self.length = channels, length
        self.filter = ExplicitFilter(channels, length) if filter is None else filter
        self.skip = nn.Parameter(torch.randn(channels)) if skip else None
        self._stack: tuple[object, Stack] | None = None

    def forward(self, y: Tensor) -> Tensor:
        """The whole sequence: y [B, L, D] -> [B, L, D]. O(L log L) per channel, differentiable."""
        lanes = y.transpose(1, 2)
        z = causal_conv(lanes, self.filter.taps(y.shape[1]), self.stride)
        if self.skip is not None:
            z = z + self.skip[:, None].to(y.dtype) * lanes
        return z.transpose(1, 2)

    @property
    def stride(self) -> int:
        """The filter's taps are zero at lags that this does not divide."""
        return getattr(self.filter, "stride", 1)

    def init(self, batch: int, tiling: Tiling) -> StackState:
        """The state of an empty past, for as many positions as the tiling has."""
        return self.stack().init(batch, tiling)

    @torch.no_grad()
    def extend(self, state: StackState, y: Tensor) -> Tensor:
        """The next N positions y [B, N, D] -> [B, N, D], exact anywhere. What is still due is paid first."""
        stack, outputs, done = self.stack(), [], 0
        for size in stack.pieces(state, y.shape[1]):
            stack.begin(state, size)
            outputs.append(stack.mix(state, 0, y[:, done : done + size]))
            stack.commit(state, size)
            done += size
        return torch.cat(outputs, dim=1)

    def due(self, state: StackState) -> tuple[Rectangle | Share, ...]:
        """The tiles that became payable with the last position."""
        return self.stack().due(state)

    @torch.no_grad()
    def pay(self, state: StackState, tile: Rectangle | Share, impl: str = Impl.MEASURED) -> None:
        """Pays one of the tiles that `due` told; what is left is paid by the next `extend`."""
        self.stack().pay(state, tile, impl)

    def stack(self) -> Stack:
        """This convolution with its filter prepared; made anew when a parameter changes."""
        version = tuple((p.data_ptr(), p._version) for p in self.parameters())
        if self._stack is None or self._stack[0] != version:
            with torch.no_grad():
                filter = PreparedFilter(self.filter.taps(self.length), stride=self.stride)
                self._stack = (version, Stack(filter, self.channels, self.skip))
        return self._stack[1]
