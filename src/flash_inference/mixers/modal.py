"""Convolution with a modal filter as a recurrence: a fixed state, whatever the length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from flash_inference.errors import FilterError, ShapeError
from flash_inference.filters.modal import Modal, check_growth
from flash_inference.filters.powers import Powers, parts
from flash_inference.mixers.mixer import Moment
from flash_inference.ops.causal_conv import causal_conv
from flash_inference.shapes import check_shape

CHUNK = 1024
STEPS, FULL = 8, 512


@dataclass(slots=True)
class ModalPast:
    """`state` [B, C, S] is the sum over past i of p^(newest - i) y_i; for complex poles [B, C, 2 S], parts in turn."""

    state: Tensor


class ModalConv(nn.Module):
    """z[t] = sum over i <= t of h[t - i] y[i] + skip y[t], depthwise; h is a sum of modes, so s <- p s + y, z = Re R s.

    The filter's channels are repeated, each `channels / filter.channels` times in a row. A single position costs a few
    vector operations on the state, O(S) per channel; chunks cost O(log CHUNK + S) per position, in a bounded workspace.

    The state is kept in `accumulate`: float64 by default, since a pole rounded to float32 puts tap t off by t 2^-24.
    With float32 the state takes half the memory. Measured over 10^5 single steps of float32 inputs, largest error over
    the outputs' root mean square, for complex and for positive real poles: 2e-6 and 2e-5 if modes last 100 positions,
    2e-5 and 4e-4 if they last 10^4; with a float64 state 2e-7 for all, the rounding of the outputs.
    Raises FilterError if the filter has overflowed by the length asked for.
    """

    decodes: ClassVar[str] = "recurrence"
    replays: ClassVar[bool] = True

    def __init__(
        self, channels: int, filter: Modal, *, skip: bool = True, accumulate: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        if channels % filter.channels:
            raise FilterError(
                f"the filter has {filter.channels} channels; expected a divisor of {channels}, the channels to "
                "convolve. Make the filter for these channels, or for groups of them."
            )
        if accumulate not in (torch.float32, torch.float64):
            raise ShapeError(f"accumulate is {accumulate}; expected torch.float32 or torch.float64.")
        self.channels, self.filter, self.accumulate = channels, filter, accumulate
        self.skip = nn.Parameter(torch.randn(channels)) if skip else None
        self._recurrence: tuple[object, Recurrence] | None = None

    def forward(self, y: Tensor) -> Tensor:
        """The whole sequence: y [B, L, C] -> [B, L, C], by FFT. O(L (log L + S)) per channel, differentiable."""
        check_shape("y", y, "B L C", C=self.channels)
        rho = self.filter.taps(y.shape[1]).repeat_interleave(self.channels // self.filter.channels, dim=0)
        z = causal_conv(y.mT, rho).mT
        return z if self.skip is None else z + self.skip.to(y.dtype) * y

    def init(self, batch: int, length: int) -> ModalPast:
        """The empty past of `batch` rows: zeros, whatever the length."""
        recurrence = self.recurrence()
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        check_growth(recurrence.log_poles, recurrence.residues, length, dtype)
        return ModalPast(parts(torch.zeros_like(recurrence.poles).repeat(batch, 1, 1)))

    def past_bytes(self, length: int) -> int:
        """Bytes of one row's past."""
        state = parts(self.recurrence().poles)
        return state.numel() * state.itemsize

    @torch.no_grad()
    def extend(self, past: ModalPast, x: Tensor, moment: Moment) -> Tensor:
        """The next N positions x [B, N, C] -> [B, N, C], exact anywhere; `past` is advanced in place."""
        check_shape("x", x, "B N C", B=past.state.shape[0], C=self.channels)
        x = moment.enter(past, x)
        recurrence = self.recurrence()
        y, state = x.to(recurrence.readout.dtype), past.state
        with torch.autocast(x.device.type, enabled=False):
            z = recurrence.steps(state, y) if stepwise(y) else recurrence.chunks(state, y)
            if self.skip is not None:
                z = torch.addcmul(z, self.skip.to(z.dtype), y)
        return z.to(x.dtype)

    def recurrence(self) -> Recurrence:
        """The modes in the precision of the state, [C, S] each; made anew when a parameter changes."""
        version = (*((p.data_ptr(), p._version) for p in self.parameters()), self.accumulate)
        if self._recurrence is None or self._recurrence[0] != version:
            repeats = self.channels // self.filter.channels
            with torch.no_grad():
                log_poles, residues = (mode.repeat_interleave(repeats, dim=0) for mode in self.filter.modes())
            dtype = torch.promote_types(next(self.parameters()).dtype, self.accumulate)
            dtype = dtype.to_complex() if log_poles.is_complex() else dtype
            self._recurrence = (version, Recurrence(log_poles, residues.to(dtype)))
        return self._recurrence[1]


class Recurrence:
    """s[t] = p s[t - 1] + y[t], z[t] = Re sum R s[t], a position or a chunk at a time. All [C, S]."""

    def __init__(self, log_poles: Tensor, residues: Tensor) -> None:
        self.log_poles, self.residues = log_poles, residues
        self.poles = torch.exp(log_poles).to(residues.dtype)
        self.readout = parts(residues.conj())

    def view(self, state: Tensor) -> Tensor:
        """A past's state as [B, C, S], complex for complex poles: the same memory."""
        return torch.view_as_complex(state.unflatten(-1, (-1, 2))) if self.poles.is_complex() else state

    def steps(self, state: Tensor, y: Tensor) -> Tensor:
        """N positions y [B, N, C] -> [B, N, C], one by one: s <- p s + y; Re sum R s."""
        z, s = torch.empty_like(y), self.view(state)
        for t, one in enumerate(y.unbind(1)):
            s.mul_(self.poles).add_(one[..., None])
            z[:, t] = (state * self.readout).sum(-1)
        return z

    def chunks(self, state: Tensor, y: Tensor) -> Tensor:
        """N positions y [B, N, C] -> [B, N, C]: per chunk h * y, and what the past adds, Re sum R p^(t + 1) s."""
        n = min(CHUNK, y.shape[1])
        powers = Powers(self.log_poles, n, self.residues.dtype)
        h, z, s = powers.weigh(self.residues, n), torch.empty_like(y), self.view(state)
        for piece, out in zip(y.mT.split(n, dim=-1), z.mT.split(n, dim=-1), strict=True):
            size = piece.shape[-1]
            out.copy_(causal_conv(piece, h))
            out += powers.weigh(self.residues * self.poles * s, size)
            s.mul_(torch.exp(size * self.log_poles).to(s.dtype)).add_(powers.gather(piece))
        return z


def stepwise(y: Tensor) -> bool:
    """Whether single steps are the faster way through y [B, N, C].

    They are for a few positions, since a chunk forms powers first. On a CPU they also are once channels fill a step's
    vectors: measured at B C = 2,048 they take a quarter of the time of chunks, at 128 twice it. A GPU wants kernels
    large and few.
    """
    return y.shape[1] <= STEPS or (y.device.type == "cpu" and y.shape[0] * y.shape[2] >= FULL)
