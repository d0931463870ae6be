"""What a block of sources owes a block of later targets: out[j] += sum over i of y[i] rho[lag of (i, j)]."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import cache

from torch import Tensor

from flash_inference.errors import ShapeError
from flash_inference.ops.tile_conv.choice import Choice, Measurement, table_path
from flash_inference.ops.tile_conv.direct import tile_conv_direct
from flash_inference.ops.tile_conv.fft import tile_conv_fft
from flash_inference.ops.tile_conv.filter import NEAR, PreparedFilter
from flash_inference.ops.tile_conv.paired import pairs_up, tile_conv_paired
from flash_inference.ops.tile_conv.reference import tile_conv_reference
from flash_inference.ops.tile_conv.triangle import triangle_conv


class Impl(StrEnum):
    """How a tile is computed. MEASURED asks the table that `flash-inference tune` wrote."""

    MEASURED = "measured"
    REFERENCE = "reference"
    DIRECT = "direct"
    FFT = "fft"


TILE_CONV_IMPLS: dict[str, Callable[[Tensor, PreparedFilter, int, Tensor, slice], None]] = {
    Impl.REFERENCE: tile_conv_reference,
    Impl.DIRECT: tile_conv_direct,
    Impl.FFT: tile_conv_fft,
}


@cache
def measured() -> Choice:
    """The table in force: read once from disk."""
    return Choice.load()


def tile_conv(
    y: Tensor,
    filter: PreparedFilter,
    first: int,
    *,
    out: Tensor,
    channels: slice = slice(None),
    impl: str = Impl.MEASURED,
) -> None:
    """Adds into out [T, B, C] what sources y [S, B, C] owe it: out[j] += sum_i y[i] rho[first + (S - 1) + j - i].

    `first` is the lag from the newest source to the oldest target, so that the tile spans lags first .. first+S+T-2;
    taps past the filter's end are zero. `channels` are the filter channels that y and out hold. Any strides: rows
    whose time axis is contiguous are read without a copy. y and out must not overlap.
    Cost O(S T) per channel direct, O((S + T) log(S + T)) by FFT. Raises ShapeError.
    """
    if y.ndim != 3 or out.ndim != 3 or y.shape[1:] != out.shape[1:]:
        raise ShapeError(
            f"y {tuple(y.shape)} and out {tuple(out.shape)} must be [S, B, C] and [T, B, C] with equal B, C."
        )
    start, stop, _ = channels.indices(filter.channels)
    if stop - start != y.shape[2]:
        raise ShapeError(f"y has {y.shape[2]} channels; the filter slice {start}:{stop} has {stop - start}.")
    if first < 0:
        raise ShapeError(f"first lag is {first}; expected 0 or more: a tile pays later positions only.")
    if 0 in y.shape or 0 in out.shape or first >= filter.length:
        return
    if impl == Impl.MEASURED:
        impl = measured().pick(y.shape[0], out.shape[0], y.shape[1], y.shape[2], filter.rho)
    if impl == Impl.FFT and pairs_up(y, filter, first, out):
        tile_conv_paired(y, filter, first, out, channels)
        return
    for sources, lag, targets in filter.parts(y, out, first):
        TILE_CONV_IMPLS[impl](sources, filter, lag, targets, channels)


__all__ = [
    "NEAR",
    "TILE_CONV_IMPLS",
    "Choice",
    "Impl",
    "Measurement",
    "PreparedFilter",
    "measured",
    "table_path",
    "tile_conv",
    "triangle_conv",
]
