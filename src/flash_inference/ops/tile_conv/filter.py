"""A filter made ready for tiles: its taps, and its spectra within a memory budget."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from flash_inference.errors import FilterError, ShapeError
from flash_inference.ops.memory import roomy_zeros

NEAR = 256


class PreparedFilter:
    """Taps rho [C, n], lag 0 first, with what the tile operations derive from them, each once.

    `spectra_bytes` bounds the memory that stored spectra may take (None: as many bytes as the taps themselves take,
    at least 64 MiB); beyond it a spectrum is computed when a tile needs it. Taps past the end count as zero.
    float16 and bfloat16 taps are kept as float32: sums are accumulated in float32 at least.
    With `own` the tensor itself is kept, and may be changed here; otherwise it is copied.
    Raises FilterError for an empty or non-finite filter.
    """

    def __init__(self, rho: Tensor, spectra_bytes: int | None = None, *, own: bool = False) -> None:
        if rho.ndim != 2:
            raise ShapeError(f"rho has shape {tuple(rho.shape)}; expected [channels, taps], lag 0 first.")
        if rho.shape[0] < 1 or rho.shape[1] < 1:
            raise FilterError(f"the filter is empty: shape {tuple(rho.shape)}; expected at least 1 channel and 1 tap.")
        with torch.inference_mode(False), torch.no_grad():
            rho = rho.detach()
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
        self._spectra: dict[tuple[int, int], tuple[Tensor, list[bool]]] = {}
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

    @property
    def length(self) -> int:
        """Number of taps n."""
        return self.rho.shape[1]

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
        last = first + n
        if last > self.length:
            raise FilterError(
                f"lags {first} .. {last - 1} reach past the filter's {self.length} taps; clip the tile's sources first."
            )
        return self._backwards[0][channels, self.length - last : self.length - first]

    def spectrum(self, first: int, n: int, channels: slice = slice(None)) -> Tensor:
        """rfft of taps first .. first + n - 1 as [C, n / 2 + 1]: stored after its first use while the budget lasts."""
        start, stop, _ = channels.indices(self.channels)
        key = (first, n)
        if key not in self._spectra:
            size = self.channels * (n // 2 + 1) * 2 * self.rho.itemsize
            if self.spectra_used + size > self.spectra_bytes:
                return torch.fft.rfft(self.taps(first, n, channels), n=n)
            self.spectra_used += size
            with torch.inference_mode(False):
                complex_dtype = torch.complex128 if self.rho.dtype == torch.float64 else torch.complex64
                like = torch.empty(0, dtype=complex_dtype, device=self.rho.device)
                table = roomy_zeros(like, self.channels, n // 2 + 1)
            self._spectra[key] = (table, [False] * self.channels)
        table, known = self._spectra[key]
        if not all(known[start:stop]):
            table[start:stop] = torch.fft.rfft(self.taps(first, n, channels), n=n)
            known[start:stop] = [True] * (stop - start)
        return table[start:stop]


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
