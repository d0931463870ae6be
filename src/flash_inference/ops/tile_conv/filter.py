"""A filter made ready for tiles: its taps, and its spectra within a memory budget."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from flash_inference.errors import FilterError, ShapeError
from flash_inference.ops.memory import roomy_zeros

NEAR = 256


class PreparedFilter:
    """Taps rho [C, n], lag 0 first, with what the tile operations derive from them, each once.

    `spectra_bytes` bounds the memory that stored spectra may take (None: as many bytes as the taps themselves take, at
    least 64 MiB); beyond it a spectrum is computed when a tile needs it. Taps past the end count as zero. float16 and
    bfloat16 taps are kept as float32: sums are accumulated in float32 at least. With `own` the tensor itself is kept,
    and may be changed here; otherwise it is copied. `stride` s says that taps are zero at lags that s does not divide
    (FilterError if not): the others alone are kept, and `rho`, `near`, `taps`, `backwards` and `spectrum` count them,
    so tap k is lag s k. A tile then falls apart into s tiles of every s-th source and target (`parts`), of half the
    pairs in all for s = 2. Raises FilterError for an empty or non-finite filter.
    """

    def __init__(self, rho: Tensor, spectra_bytes: int | None = None, *, own: bool = False, stride: int = 1) -> None:
        if rho.ndim != 2:
            raise ShapeError(f"rho has shape {tuple(rho.shape)}; expected [channels, taps], lag 0 first.")
        if rho.shape[0] < 1 or rho.shape[1] < 1:
            raise FilterError(f"the filter is empty: shape {tuple(rho.shape)}; expected at least 1 channel and 1 tap.")
        self.length, self.stride = rho.shape[1], stride
        with torch.inference_mode(False), torch.no_grad():
            rho = rho.detach() if stride == 1 else every(stride, rho.detach())
            wide = rho.to(rho.dtype if rho.dtype == torch.float64 else torch.float32).contiguous()
            self.rho = wide.clone() if wide is rho and not own else wide
            check_finite(self.rho)
            # Windows decay into subnormal numbers, which are far below any sum's rounding and slow on many processors.
            for row in self.rho:
                row[row.abs() < torch.finfo(row.dtype).tiny] = 0
            # Rows of a long filter start far apart, often in one set of the cache: small tiles read copies.
            self.near = self.rho[:, :NEAR].T.contiguous()
            self.near_rows = self.rho[:, :NEAR].contiguous()
        self.spectra_bytes = max(self.rho.nbytes, 64 << 20) if spectra_bytes is None else spectra_bytes
        self.spectra_used = 0
        self._spectra: dict[tuple[int, int, bool], tuple[Tensor, list[bool]]] = {}
        self._backwards: list[Tensor] = []

    def passing(self) -> PreparedFilter:
        """The same filter for tiles whose shape will not come again: it uses what is stored and stores nothing."""
        other = copy.copy(self)
        other.spectra_bytes = 0
        return other

    @property
    def channels(self) -> int:
        """Filter channels C."""
        return self.rho.shape[0]

    def parts(self, y: Tensor, out: Tensor, first: int) -> Iterator[tuple[Tensor, int, Tensor]]:
        """A tile of lags as (y, first, out) tiles of the kept taps: sources and targets apart by multiples of stride.

        `first` is the lag from the newest of the sources y [S, ..] to the oldest of the targets out [T, ..].
        """
        if self.stride == 1:
            yield y, first, out
            return
        oldest = first + y.shape[0] - 1
        for target in range(min(self.stride, out.shape[0])):
            source = (oldest + target) % self.stride
            some = y[source :: self.stride]
            lag = (oldest + target - source) // self.stride - (some.shape[0] - 1)
            if some.shape[0] and lag < self.rho.shape[1]:
                yield some, lag, out[target :: self.stride]

    def taps(self, first: int, n: int, channels: slice = slice(None)) -> Tensor:
        """Taps first .. first + n - 1 of some channels as [C, n]; zeros past the end. A view where possible."""
        held = (self.near_rows if first + n <= NEAR else self.rho)[channels, first : first + n]
        if held.shape[1] < n:
            held = torch.nn.functional.pad(held, (0, n - held.shape[1]))
        return held

    def backwards(self, first: int, n: int, channels: slice = slice(None)) -> Tensor:
        """Taps first + n - 1 down to first as contiguous rows [C, n], for tiles with one target. Doubles the memory."""
        if not self._backwards:
            with torch.inference_mode(False):
                self._backwards.append(self.rho.flip(1).contiguous())
        last, kept = first + n, self.rho.shape[1]
        if last > kept:
            raise FilterError(
                f"lags {first} .. {last - 1} reach past the filter's {kept} taps; clip the tile's sources first."
            )
        return self._backwards[0][channels, kept - last : kept - first]

    def spectrum(self, first: int, n: int, channels: slice = slice(None), *, whole: bool = False) -> Tensor:
        """rfft of taps first .. first + n - 1 as [C, n / 2 + 1]: stored after its first use while the budget lasts.

        `whole` gives all n points as [C, n], for complex sequences.
        """
        start, stop, _ = channels.indices(self.channels)
        transform, points = (torch.fft.fft, n) if whole else (torch.fft.rfft, n // 2 + 1)
        key = (first, n, whole)
        if key not in self._spectra:
            size = self.channels * points * 2 * self.rho.itemsize
            if self.spectra_used + size > self.spectra_bytes:
                return transform(self.taps(first, n, channels), n=n)
            self.spectra_used += size
            with torch.inference_mode(False):
                complex_dtype = torch.complex128 if self.rho.dtype == torch.float64 else torch.complex64
                like = torch.empty(0, dtype=complex_dtype, device=self.rho.device)
                table = roomy_zeros(like, self.channels, points)
            self._spectra[key] = (table, [False] * self.channels)
        table, known = self._spectra[key]
        if not all(known[start:stop]):
            table[start:stop] = transform(self.taps(first, n, channels), n=n)
            known[start:stop] = [True] * (stop - start)
        return table[start:stop]


def every(stride: int, rho: Tensor) -> Tensor:
    """Taps at lags 0, stride, .. of rho [C, n]. Raises FilterError if a tap in between is not zero."""
    if stride < 1:
        raise FilterError(f"stride is {stride}; expected 1 or more.")
    for offset in range(1, stride):
        wrong = (rho[:, offset::stride] != 0).nonzero()
        if len(wrong):
            channel, lag = int(wrong[0, 0]), offset + stride * int(wrong[0, 1])
            raise FilterError(
                f"stride {stride} needs zero taps at lags that it does not divide; channel {channel} lag {lag} is "
                f"{float(rho[channel, lag])}. Prepare the filter without a stride."
            )
    return rho[:, ::stride]


def check_finite(rho: Tensor) -> None:
    """Raises FilterError naming the first tap that is NaN or infinite."""
    for channel, row in enumerate(rho):
        good = torch.isfinite(row)
        if not good.all():
            lag = int((~good).nonzero()[0])
            raise FilterError(
                f"the filter is not finite: {int((~torch.isfinite(rho)).sum())} of {rho.numel()} taps, first channel "
                f"{channel} lag {lag} = {float(row[lag])}. Check the weights or the window that make it."
            )
