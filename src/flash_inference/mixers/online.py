"""Convolution of a stream: samples in, samples out, no delay, for ever in fixed memory."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flash_inference.errors import FilterError, NumericsError, ShapeError
from flash_inference.mixers.stack import Stack
from flash_inference.ops.tile_conv import PreparedFilter
from flash_inference.tiling import Separated, Spread, Tiling

BLOCK, EVERY = 64, 512
SIDE, NEAR_WORK = 4096, 1 << 19


class OnlineConvolution:
    """out[t, c] = sum over k < taps of filter[k, c] x[t - k, c], for samples that arrive in blocks of any size.

    filter [taps, channels] (or [taps] for one channel, whose blocks are then [N]); torch tensor or numpy array,
    float32 or float64. Each block's output comes with the block: no latency, no approximation. Cost O(log^2 taps) per
    sample and channel; the work of large tiles is spread, so that no push waits for one. Memory: a ring of a few
    times `taps` samples, whatever the stream's length. `tiling` is endless (length None) with `taps` given.
    Raises FilterError for an empty or non-finite filter.

    >>> room = OnlineConvolution(impulse_response)          # [48000, 2]
    >>> wet = room.push(dry)                                # [N, 2] -> [N, 2]
    """

    def __init__(self, filter: Tensor | np.ndarray, *, tiling: Tiling | None = None) -> None:
        taps = torch.as_tensor(filter)
        if taps.dtype not in (torch.float32, torch.float64):
            raise ShapeError(f"filter is {taps.dtype}; expected float32 or float64. Convert it, e.g. filter.float().")
        if taps.ndim not in (1, 2):
            raise ShapeError(f"filter has shape {tuple(taps.shape)}; expected [taps, channels] or [taps].")
        if 0 in taps.shape:
            raise FilterError(f"the filter is empty: shape {tuple(taps.shape)}; expected at least 1 tap and 1 channel.")
        self.flat = taps.ndim == 1
        taps = taps[:, None] if self.flat else taps
        self.taps, self.channels = taps.shape
        self._stack = Stack(PreparedFilter(taps.T), self.channels)
        self._tiling = default_stream_tiling(self.taps, self.channels) if tiling is None else tiling
        self.reset()

    def reset(self) -> None:
        """Forgets the past."""
        self._state = self._stack.init(1, self._tiling)
        self._rows = list(zip(self._state.inputs, self._state.partial, strict=True))
        self._diagonal = self._stack.diagonal[None]
        self._dtype = self._diagonal.dtype

    @property
    def position(self) -> int:
        """Samples pushed so far."""
        return self._state.clock

    @property
    def nbytes(self) -> int:
        """Bytes of the state, constant for the stream's life."""
        return self._state.nbytes

    @torch.no_grad()
    def push(self, block: Tensor | np.ndarray) -> Tensor:
        """The outputs [N, channels] of the next N >= 0 samples [N, channels] (N-vectors for a one-axis filter)."""
        x = block if isinstance(block, Tensor) else torch.as_tensor(block)
        if self.flat and x.ndim == 1:
            x = x[:, None]
        if x.ndim != 2 or x.shape[1] != self.channels or x.dtype != self._dtype:
            wanted = "[N]" if self.flat else f"[N, {self.channels}]"
            raise ShapeError(
                f"block is {x.dtype} of shape {tuple(torch.as_tensor(block).shape)}; expected {self._dtype} "
                f"{wanted}, as the filter is."
            )
        out = self._one(x) if x.shape[0] == 1 else self._many(x)
        return out[:, 0] if self.flat else out

    def _one(self, x: Tensor) -> Tensor:
        stack, state = self._stack, self._state
        if not math.isfinite(float(x.sum())):
            check_samples(x)
        if not state.staged or state.paid < state.clock:
            stack.begin(state, 1)
        inputs, partial = self._rows[state.row]
        out = torch.addcmul(partial, self._diagonal, x)
        inputs.copy_(x)
        stack.commit(state, 1)
        return out

    def _many(self, x: Tensor) -> Tensor:
        stack, state, outputs, done = self._stack, self._state, [x[:0]], 0
        check_samples(x)
        for size in stack.pieces(state, x.shape[0]):
            stack.begin(state, size)
            outputs.append(stack.mix(state, 0, x[None, done : done + size])[0])
            stack.commit(state, size)
            done += size
        return torch.cat(outputs)


def check_samples(x: Tensor) -> None:
    """Raises NumericsError if a sample is NaN or infinite: it would spread over all later outputs."""
    bad = ~torch.isfinite(x)
    if bad.any():
        n, c = (int(i) for i in bad.nonzero()[0])
        raise NumericsError(
            f"sample {n} of the block, channel {c}, is {float(x[n, c])}, which would spread over all later outputs; "
            "expected finite numbers. Clean the input."
        )


def default_stream_tiling(taps: int, channels: int) -> Tiling:
    """Separated + Spread, endless. Tiles without slack may grow until one costs about a millisecond: side * channels is
    bounded. One channel alone is so little work that only the largest tiles need slack.
    """
    near = max(BLOCK, min(SIDE, 1 << max(NEAR_WORK // channels, 1).bit_length() - 1))
    return Spread(Separated(None, near=near, block=BLOCK, taps=taps), every=min(near, EVERY))
