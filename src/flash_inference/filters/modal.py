"""Filters that are short sums of exponentials: what they convolve with can run as a recurrence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flash_inference.errors import FilterError
from flash_inference.filters.filter import check_choice
from flash_inference.filters.powers import Powers


class Modal(nn.Module):
    """h[c, t] = Re sum over s of R[c, s] p[c, s]^t: S modes a channel, each a pole p and a residue R.

    Subclasses differ in what they store; `modes` gives the poles' logarithms and the residues of all of them. A pole
    outside the unit circle is allowed while the taps stay finite up to the length that is asked for.
    """

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.channels, self.length = channels, length

    def modes(self) -> tuple[Tensor, Tensor]:
        """log p and R, [channels, S] each: complex128, or float64 if all poles and residues are real and positive."""
        raise NotImplementedError

    def taps(self, n: int, start: int = 0, channels: slice = slice(None)) -> Tensor:
        """Taps start .. start + n - 1 of some channels as [channels, n], in the parameters' dtype but at least float32.

        Computed in float64. Cost O(n S) multiply-adds and O(sqrt(n) S) exponentials per channel. Raises FilterError if
        they would not be finite.
        """
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        log_poles, residues = (mode[channels] for mode in self.modes())
        check_growth(log_poles, residues, start + n, dtype)
        if start:
            residues = residues * torch.exp(start * log_poles)
        return Powers(log_poles, n, residues.dtype).weigh(residues, n).to(dtype)


class ModalFilter(Modal):
    """h_t = Re sum_s R_s p_s^t with complex poles and residues, each stored as a pair (real, imaginary).

    `poles` and `residues` are [channels, S, 1, 2], as the checkpoints of StripedHyena 1 have them. Powers are formed in
    float64 from the stored numbers. Source: Massaroli et al., Laughing Hyena Distillery (2023), arXiv 2310.18780,
    section 3.
    """

    def __init__(self, channels: int, length: int, *, modes: int = 8) -> None:
        super().__init__(channels, length)
        radius, angle = torch.exp(-1 / timescales(channels, modes, length)), math.pi * torch.rand(channels, modes)
        poles = torch.view_as_real(torch.polar(radius, angle))
        self.poles = nn.Parameter(poles[:, :, None])
        self.residues = nn.Parameter(torch.randn(channels, modes, 1, 2) / modes)

    def modes(self) -> tuple[Tensor, Tensor]:
        """log p and R, [channels, S] complex128."""
        poles, residues = (paired(pair[:, :, 0]) for pair in (self.poles, self.residues))
        return log_poles(poles), residues


class RealModalFilter(Modal):
    """h_t = sum_s R_s exp(t log_p_s): real residues, real positive poles stored by their logarithms.

    `log_poles` [channels, S, 1] and `residues` [channels, S], as StripedHyena 2's long filters have them.
    """

    def __init__(self, channels: int, length: int, *, modes: int = 16) -> None:
        super().__init__(channels, length)
        self.log_poles = nn.Parameter(-1 / timescales(channels, modes, length)[..., None])
        self.residues = nn.Parameter(torch.randn(channels, modes) / modes)

    def modes(self) -> tuple[Tensor, Tensor]:
        """log p and R, [channels, S] float64."""
        return self.log_poles[..., 0].double(), self.residues.double()


class S4DFilter(Modal):
    """h_t = 2 Re sum_s C_s (exp(dt A_s) - 1) / A_s exp(dt A_s t): a diagonal state space, held at zero order.

    A = -exp(log_w_real) + i w_imag, dt = exp(log_dt). `log_dt` [channels], `C` [channels, S, 2] (real, imaginary),
    `log_w_real` and `w_imag` [copies, S]: channel c has A number c modulo copies (0: one each). So p = exp(dt A) and
    R = 2 C (p - 1) / A. These are formed in float64 at use: a pole rounded to float32 would put tap t off by t 2^-24.
    Source: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models (2022), arXiv
    2206.11893.
    """

    def __init__(self, channels: int, length: int, *, modes: int = 32, copies: int = 0) -> None:
        super().__init__(channels, length)
        copies = check_copies(copies, channels)
        self.log_dt = nn.Parameter(torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)))
        self.C = nn.Parameter(torch.randn(channels, modes, 2) / 2**0.5)
        self.log_w_real = nn.Parameter(torch.full((copies, modes), math.log(0.5)))
        self.w_imag = nn.Parameter(math.pi * torch.arange(modes).float().repeat(copies, 1))

    def modes(self) -> tuple[Tensor, Tensor]:
        """log p and R, [channels, S] complex128."""
        A = torch.complex(-self.log_w_real.double().exp(), self.w_imag.double())
        A = A.repeat(self.channels // len(A), 1)
        log_poles = self.log_dt.double().exp()[:, None] * A
        return log_poles, 2 * paired(self.C) * torch.expm1(log_poles) / A


def paired(pairs: Tensor) -> Tensor:
    """Pairs (real, imaginary) [.., 2] as complex128 [..].

    A copy: complex numbers must lie on 16 bytes, and what a file was mapped to may not.
    """
    return torch.complex(*pairs.double().unbind(-1))


class DiagonalFilter(Modal):
    """h_t = 2 Re sum_s C_s B_s g_s p_s^t: a diagonal state space with inputs B, sampled in one of two ways.

    A = -exp(log_A_real) + i A_imag, a = exp(log_dt) A. `discretization` "bilinear": p = (1 + a / 2) / (1 - a / 2), g =
    dt / (1 - a / 2); "zoh": p = exp(a), g = (p - 1) / A. `log_dt` [channels], `C` [channels, S, 2] (real, imaginary),
    `B` [copies, S, 2], `log_A_real` and `A_imag` [copies, S]: channel c has number c modulo copies (0: one each).
    Published by H3 as `kernel.kernel.{log_dt, C, B, inv_A_real, A_imag}`.
    Source: Fu et al., Hungry Hungry Hippos (2022), arXiv 2212.14052; Gu et al. (2022), arXiv 2206.11893, section 3.1.
    """

    def __init__(
        self, channels: int, length: int, *, modes: int = 32, copies: int = 0, discretization: str = "bilinear"
    ) -> None:
        super().__init__(channels, length)
        check_choice("discretization", discretization, ("bilinear", "zoh"))
        copies = check_copies(copies, channels)
        self.discretization = discretization
        self.log_dt = nn.Parameter(torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)))
        self.C = nn.Parameter(torch.randn(channels, modes, 2) / 2**0.5)
        self.B = nn.Parameter(torch.ones(copies, modes, 1) * torch.tensor([1.0, 0.0]))
        self.log_A_real = nn.Parameter(torch.full((copies, modes), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(modes).float().repeat(copies, 1))

    def modes(self) -> tuple[Tensor, Tensor]:
        """log p and R, [channels, S] complex128."""
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        A, B = (x.repeat(self.channels // len(A), 1) for x in (A, paired(self.B)))
        dt = self.log_dt.double().exp()[:, None]
        weights = 2 * paired(self.C) * B
        if self.discretization == "zoh":
            return dt * A, weights * torch.expm1(dt * A) / A
        half = dt * A / 2
        return log_poles((1 + half) / (1 - half)), weights * dt / (1 - half)


def log_poles(poles: Tensor) -> Tensor:
    """log p. 0^0 is 1, but 0 log 0 is NaN: the smallest normal number takes the place of a pole at 0."""
    tiny = torch.full_like(poles, torch.finfo(torch.float64).tiny)
    return torch.log(torch.where(poles == 0, tiny, poles))


def check_copies(copies: int, channels: int) -> int:
    """The number of state spaces that channels take turns in, `channels` for 0. Raises FilterError for no divisor."""
    copies = copies or channels
    if copies < 1 or channels % copies:
        raise FilterError(
            f"copies is {copies}; expected a divisor of {channels}, the channels that take turns in them."
        )
    return copies


def timescales(channels: int, modes: int, length: int) -> Tensor:
    """[channels, modes] decay times in positions, spread evenly in their logarithm from 2 to `length` or beyond."""
    return torch.logspace(math.log10(2), math.log10(max(length, 4)), modes).repeat(channels, 1)


def check_growth(log_poles: Tensor, residues: Tensor, length: int, dtype: torch.dtype) -> None:
    """Raises FilterError unless sum over s of |R_s| |p_s|^t, which bounds tap t, is finite in dtype for t < length."""
    with torch.no_grad():
        ends = log_poles.real[..., None] * torch.tensor([0, max(length - 1, 0)], device=log_poles.device)
        largest = (residues.abs()[..., None] * torch.exp(ends)).sum(1).amax(1)
        bad = ~(largest <= torch.finfo(dtype).max)
        if bad.any():
            c = int(bad.nonzero()[0, 0])
            raise FilterError(
                f"modes of channel {c} reach {float(largest[c]):.3g} within {length} positions (largest |pole| "
                f"{float(log_poles[c].real.exp().amax()):.6g}); expected finite {dtype} taps. Ask for fewer positions, "
                "or check poles and residues."
            )
