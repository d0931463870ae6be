"""A convolution whose filter becomes known with the sequence: tap k at position k."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_inference.errors import ShapeError, TilingError
from flash_inference.mixers.tiled import Item, Tiled, TiledPast, check_length
from flash_inference.ops.causal_conv import causal_conv, good_size
from flash_inference.tiling import Parallelogram, Tiling
from flash_inference.tiling.tile import Clipped, intersect, targets_of

DIRECT = 16
"""Up to this many sources or lags a tile is summed directly."""


class AdaptiveConv(Tiled):
    """z[b, t, d] = sum over i <= t of y[b, i, d] rho[b, t - i, d], where rho[b, k] may depend on y[b, 0 .. k].

    Inputs and taps arrive together, one of each a position, as [B, N, 2 D]: y before rho. Needs a tiling of
    parallelograms (TwiceRelaxed), whose tiles read taps no newer than the clock: O(L log^2 L) per channel in all,
    about twice what a fixed filter costs. It has no parameters: what makes the taps is up to the model.
    Source: van der Hoeven, "Relax, but don't be too lazy" (2002); Oncescu et al. (2024), arXiv 2410.12982.

    >>> past = conv.init(1, TwiceRelaxed(1000), width=16)
    >>> z = conv.extend(past, torch.cat([y, rho], dim=2))     # [1, N, 32] -> [1, N, 16]
    """

    def forward(self, y: Tensor) -> Tensor:
        """The whole sequence: inputs and taps [B, L, 2 D] -> [B, L, D], by FFT, differentiable."""
        x, rho = y.transpose(1, 2).chunk(2, dim=1)
        return causal_conv(x, rho).transpose(1, 2)

    def init(self, batch: int, tiling: Tiling, width: int, like: Tensor | None = None) -> TiledPast:
        """The state of an empty past of D = `width` channels, in the dtype and on the device of `like`.

        Raises TilingError for rectangles, which read taps that are not known yet.
        """
        length = check_length(tiling)
        if not all(isinstance(item, Parallelogram) for t in range(min(4, length)) for item in tiling.after(t)):
            raise TilingError(f"{tiling!r} has rectangles, which read taps before they are known. Use TwiceRelaxed.")
        like = torch.empty(0) if like is None else like
        if like.dtype not in (torch.float32, torch.float64):
            raise ShapeError(f"like is {like.dtype}; expected float32 or float64, in which sums are kept.")
        return TiledPast(tiling, like.new_zeros(batch, length, 2 * width), like.new_zeros(batch, length, width))

    def apply(self, past: TiledPast, item: Item) -> None:
        """Adds what a run of sources under a run of lags owes, to the targets that count."""
        tile = item.tile if isinstance(item, Clipped) else item
        assert isinstance(tile, Parallelogram)
        targets = intersect(targets_of(item), range(past.sums.shape[1]))
        if not targets:
            return
        y, rho = past.inputs.chunk(2, dim=2)
        owed = convolve(y[:, tile.sources.start : tile.sources.stop], rho[:, tile.lags.start : tile.lags.stop])
        first = targets.start - (tile.sources.start + tile.lags.start)
        past.sums[:, targets.start : targets.stop] += owed[:, first : first + len(targets)]

    def own(self, past: TiledPast, start: int, stop: int) -> Tensor:
        """Outputs of a chunk: its own sources under lags 0 .. N - 1, which are known by then."""
        y, rho = past.inputs.chunk(2, dim=2)
        n = stop - start
        return past.sums[:, start:stop] + convolve(y[:, start:stop], rho[:, :n])[:, :n]


def convolve(y: Tensor, rho: Tensor) -> Tensor:
    """All of y [B, S, D] * rho [B, K, D]: [B, S + K - 1, D]. Direct where one is short, by FFT otherwise."""
    short, long = (y, rho) if y.shape[1] <= rho.shape[1] else (rho, y)
    S, K = short.shape[1], long.shape[1]
    if S > DIRECT:
        n = good_size(S + K - 1)
        spectrum = torch.fft.rfft(short.transpose(1, 2), n=n) * torch.fft.rfft(long.transpose(1, 2), n=n)
        return torch.fft.irfft(spectrum, n=n)[..., : S + K - 1].transpose(1, 2)
    out = long.new_zeros(len(long), max(S + K - 1, 0), long.shape[2])
    for i in range(S):
        out[:, i : i + K] += short[:, i : i + 1] * long
    return out
