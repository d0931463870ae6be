"""A free kernel, smoothed and squashed towards zero: safari's LongConv."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_inference.errors import FilterError
from flash_inference.filters.filter import check_span, wide


class SquashedFilter(nn.Module):
    """rho[c, k] = sign(m[c, k]) max(|m[c, k]| - threshold, 0), m the kernel's moving average over `window` taps.

    m[c, k] = 1 / window * sum over |s| <= window // 2 of kernel[c, k + s], with zeros beyond both ends; window 1
    leaves the kernel as it is. Taps past the stored ones raise LengthError.

    Published as LongConv: `kernel.kernel` (safari's `LongConvKernel`) or `kernel` (its standalone file), (c, H, L),
    here [c * H, L] in that order; `lam` is the threshold, `ma_window_len` the window where `use_ma_smoothing` is set.
    The skip term `D` (c, H) belongs to the mixer. `smooth_freq` has no counterpart here. The standalone file's kernel
    is twice as long as its input and wraps around: columns past the first half weigh the future, so that such a kernel
    is causal in its first half only.
    Source: Fu et al., Simple Hardware-Efficient Long Convolutions (2023), arXiv 2302.06646, section 3.
    """

    def __init__(self, channels: int, length: int, *, threshold: float = 0.1, window: int = 1) -> None:
        super().__init__()
        if threshold < 0:
            raise FilterError(f"threshold is {threshold}; expected 0 or more: it is taken off the taps' magnitudes.")
        if window < 1 or window % 2 == 0:
            raise FilterError(f"window is {window}; expected an odd number of taps: an average is centred on its tap.")
        self.channels, self.length, self.threshold, self.window = channels, length, threshold, window
        # Numbers smaller than the threshold would all be squashed to zero, and learn nothing.
        self.kernel = nn.Parameter(torch.randn(channels, length) * (2 * threshold + length**-0.5))

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n]. O(n window) per channel."""
        check_span(n, start, self.length)
        half = self.window // 2 if n else 0
        first, last = max(start - half, 0), min(start + n + half, self.length)
        m = wide(self.kernel[channels, first:last])
        if half:
            m = nn.functional.pad(m, (first - (start - half), start + n + half - last))
            m = m.unfold(1, self.window, 1).mean(2)
        return nn.functional.softshrink(m, self.threshold)
