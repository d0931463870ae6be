"""A few short pieces, each interpolated to twice the length of the one before: SGConv's filter."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flash_inference.errors import FilterError
from flash_inference.filters.filter import check_choice, wide


class MultiscaleFilter(nn.Module):
    """rho[c, k] = 1 / norm_c * sum over pieces i of multiplier_c^(S - 1 - i) interpolated piece_i[c] at k - offset_i

    S pieces of `points` numbers; piece i is stretched by scale_i. "cat": pieces follow one another, scale_0 = 2^first
    and scale_i = 2^(first + i - 1) after it. "sum": all begin at lag 0, scale_i = 2^(first + i). Either way the filter
    reaches points * 2^(first + S - 1) lags and is zero beyond. Tap j of a stretched piece lies at x = max((j + 1/2) /
    scale - 1/2, 0) between its points ("linear"; past the last point that point), or takes point j // scale
    ("nearest"). `norm` is stored, not recomputed: the published module sets it once, to the 2-norm of all taps at its
    first forward (`renormalise` does the same).

    Published as GConv: `kernel_list.i` (c, H, kernel_dim), here `pieces.i` [c * H, points]; `multiplier` (1, H, 1),
    here [c * H], by default between `decay_min` and `decay_max`; `kernel_norm` (c, H, 1), meaningless unless
    `kernel_norm_initialized`; `init_scale` is `first`; the words of `mode` are `arrangement` ("cat", "sum") and
    `interpolation` ("nearest", otherwise linear). A `mode` with "learnable" has no counterpart here. The skip term `D`
    (c, H) belongs to the mixer.
    Source: Li et al., What Makes Convolutional Models Great on Long Sequence Modeling? (2022), arXiv 2210.09298.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        points: int = 64,
        first: int = 0,
        pieces: int | None = None,
        arrangement: str = "cat",
        interpolation: str = "linear",
        decay: tuple[float, float] = (2.0, 2.0),
    ) -> None:
        super().__init__()
        check_choice("arrangement", arrangement, ("cat", "sum"), "They say whether pieces are concatenated or added.")
        check_choice("interpolation", interpolation, ("linear", "nearest"))
        for name, number in (("points", points), ("pieces", pieces)):
            if number is not None and number < 1:
                raise FilterError(f"filter setting {name} is {number}; expected 1 or more.")
        count = max(1 + math.ceil(math.log2(length / points)) - first, 1) if pieces is None else pieces
        self.channels, self.length, self.first = channels, length, first
        self.arrangement, self.interpolation = arrangement, interpolation
        self.points = points
        self.pieces = nn.ParameterList(torch.randn(channels, points) for _ in range(count))
        self.multiplier = nn.Parameter(torch.linspace(*decay, channels), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.renormalise()

    @property
    def reach(self) -> int:
        """Lags up to which the pieces reach: later taps are zero."""
        return self.points << (self.first + len(self.pieces) - 1)

    @torch.no_grad()
    def renormalise(self) -> None:
        """Sets `norm` to the 2-norm of all taps that the pieces make, channel by channel."""
        self.norm.fill_(1)
        self.norm.copy_(self.taps(self.reach).norm(dim=1))

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n]. O(n) per channel, O(S n) for a sum."""
        multiplier, norm = wide(self.multiplier[channels])[:, None], wide(self.norm[channels])[:, None]
        total = norm.new_zeros(len(norm), n)
        for i, piece in enumerate(self.pieces):
            scale, offset = self._place(i)
            begin, end = max(offset, start), min(offset + self.points * scale, start + n)
            if begin < end:
                power = multiplier ** (len(self.pieces) - 1 - i)
                part = power * self._stretched(wide(piece[channels]), begin - offset, end - begin, scale)
                total[:, begin - start : end - start] += part
        return total / norm

    def _place(self, i: int) -> tuple[int, int]:
        """(scale, offset) of piece i."""
        if self.arrangement == "sum":
            return 1 << (self.first + i), 0
        scale = 1 << (self.first + max(i - 1, 0))
        return scale, scale * self.points if i else 0

    def _stretched(self, piece: Tensor, start: int, n: int, scale: int) -> Tensor:
        """Places start .. start + n - 1 of a piece [width, points] stretched by a power of two, as [width, n]."""
        j = torch.arange(start, start + n, device=piece.device)
        if self.interpolation == "nearest":
            return piece[:, j // scale]
        # Scales are powers of two, so that places between points are exact numbers.
        x = ((j.double() + 0.5) / scale - 0.5).clamp(min=0)
        left = x.long()
        right = (left + 1).clamp(max=piece.shape[1] - 1)
        return torch.lerp(piece[:, left], piece[:, right], (x - left).to(piece.dtype))
