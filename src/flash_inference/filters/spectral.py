"""Filters made of the Hankel matrix's leading eigenvectors: the spectral transform unit's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_inference.errors import FilterError, ShapeError
from flash_inference.filters.filter import check_choice, check_span, wide

HANKELS = ("Z", "L")


def hankel_matrix(length: int, hankel: str = "Z") -> Tensor:
    """Z [length, length] in float64 for i, j = 1 .. length: 2 / ((i + j)^3 - (i + j)).

    "L": 8 (1 + (-1)^(i + j)) / ((i + j + 3) (i + j - 1) (i + j + 1)).
    """
    check_choice("hankel", hankel, HANKELS)
    i = torch.arange(1, length + 1, dtype=torch.float64)
    s = i[:, None] + i
    if hankel == "Z":
        return 2 / (s**3 - s)
    return 8 * (1 + (-1) ** s) / ((s + 3) * (s - 1) * (s + 1))


def spectral_basis(length: int, count: int, hankel: str = "Z") -> Tensor:
    """phi [length, count] in float64: the last `count` eigenvectors, eigenvalues ascending, times eigenvalue^(1/4).

    Signs of eigenvectors are arbitrary and phi depends on the length: weights trained with one phi need that phi.
    O(length^3) time and length^2 numbers. Raises FilterError where an eigenvalue is lost in rounding.
    Source: Agarwal et al., Spectral State Space Models (2023), arXiv 2312.06837.
    """
    if not 1 <= count <= length:
        raise FilterError(f"{count} eigenvectors of a {length} x {length} matrix; expected 1 .. {length}.")
    sigma, phi = torch.linalg.eigh(hankel_matrix(length, hankel))
    sigma, phi = sigma[-count:], phi[:, -count:]
    lost = int((sigma <= 0).sum())
    if lost:
        raise FilterError(
            f"{lost} of the {count} leading eigenvalues are lost in rounding, the least is {float(sigma[0]):.1e}; "
            f"expected positive ones. Ask for {count - lost} at most, or pass the phi of the checkpoint."
        )
    return phi * sigma**0.25


class SpectralFilter(nn.Module):
    """rho[c, k] = 2 (phi M)[k, c] on even lags and 0 on odd ones: both branches of an approximate STU as one filter.

    Its two branches convolve u with (phi M) and, signs alternating, with (-1)^k (phi M); their sum is this filter.
    `stride` is 2: tiles pay pairs of equal parity only. With hankel "L" there is one branch, rho = (phi M), stride 1.
    `phi` [length, count] is stored beside the weights `mixture` [count, channels] (default: computed).

    Published: `phi` (seq_len, num_eigh), one buffer for all layers; `stu.M_filters` (num_eigh, d) is `mixture`. The
    projection before the convolution, `stu.M_inputs` (d, d), applied as x @ M_inputs, belongs to the layer.
    `use_hankel_L` is hankel "L".
    Source: Liu et al., Flash STU: Fast Spectral Transform Units (2024), arXiv 2409.10489.
    """

    def __init__(
        self, channels: int, length: int, *, count: int = 24, hankel: str = "Z", phi: Tensor | None = None
    ) -> None:
        super().__init__()
        check_choice("hankel", hankel, HANKELS)
        self.channels, self.length, self.stride = channels, length, 2 if hankel == "Z" else 1
        self.phi = nn.Parameter(stored_basis(length, count, hankel, phi), requires_grad=False)
        self.mixture = nn.Parameter(torch.randn(count, channels) / count**0.5)

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n]. O(n count / stride) per channel."""
        check_span(n, start, self.length)
        mixture = wide(self.mixture[:, channels])
        first = start % self.stride
        lags = slice(start + first, start + n, self.stride)
        with torch.autocast(mixture.device.type, enabled=False):
            rho = mixture.T @ wide(self.phi[lags]).to(mixture.dtype).T
        if self.stride == 1:
            return rho
        both = rho.new_zeros(rho.shape[0], n)
        both[:, first :: self.stride] = self.stride * rho
        return both


class SpectralBank(nn.Module):
    """The 2 count scalar filters of an exact STU: rho[k] = phi[:, k] and rho[count + k] = (-1)^lag phi[:, k].

    An exact STU convolves every input channel with each of them and sums y = sum over k of (rho_k * u) M+_k +
    (rho_{count + k} * u) M-_k. With hankel "L" there are the first `count` only. `channels` is their number, times
    `width`: each filter stands there for `width` channels in a row, laid out (filter, channel).

    Published: `phi` (seq_len, num_eigh); the layer's `stu.M_phi_plus`, `stu.M_phi_minus` (num_eigh, d_in, d_out) are
    M+, M-.
    Source: Liu et al., Flash STU: Fast Spectral Transform Units (2024), arXiv 2409.10489.
    """

    def __init__(
        self, length: int, *, count: int = 24, hankel: str = "Z", phi: Tensor | None = None, width: int = 1
    ) -> None:
        super().__init__()
        check_choice("hankel", hankel, HANKELS)
        self.length, self.hankel, self.width = length, hankel, width
        self.channels = (count if hankel == "L" else 2 * count) * width
        self.phi = nn.Parameter(stored_basis(length, count, hankel, phi), requires_grad=False)

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some of the filters as [channels, n]. O(n) per filter."""
        check_span(n, start, self.length)
        phi = wide(self.phi[start : start + n]).T
        if self.hankel == "Z":
            signs = 1 - 2 * (torch.arange(start, start + n, device=phi.device) % 2).to(phi.dtype)
            phi = torch.cat([phi, signs * phi])
        return phi[torch.arange(self.channels, device=phi.device)[channels] // self.width]


def stored_basis(length: int, count: int, hankel: str, phi: Tensor | None) -> Tensor:
    """A copy of the phi given, checked, or the computed one in the default dtype (on the meta device its shape)."""
    if phi is None and torch.get_default_device().type == "meta":
        return torch.empty(length, count)
    if phi is None:
        return spectral_basis(length, count, hankel).to(torch.get_default_dtype())
    if tuple(phi.shape) != (length, count):
        raise ShapeError(f"phi has shape {tuple(phi.shape)}; expected [{length}, {count}]: positions x eigenvectors.")
    return phi.detach().clone()
