"""Where rho comes from: stored taps, networks of the position, mixtures of given curves, sums of modes."""

from __future__ import annotations

from flash_inference.filters.explicit import ExplicitFilter
from flash_inference.filters.filter import Filter
from flash_inference.filters.implicit import ImplicitFilter
from flash_inference.filters.modal import DiagonalFilter, Modal, ModalFilter, RealModalFilter, S4DFilter
from flash_inference.filters.multiscale import MultiscaleFilter
from flash_inference.filters.rpe import RelativePositionFilter
from flash_inference.filters.shared import SharedFilter
from flash_inference.filters.shift import ShiftFilter
from flash_inference.filters.spectral import SpectralBank, SpectralFilter, hankel_matrix, spectral_basis
from flash_inference.filters.squashed import SquashedFilter

FILTERS = {
    "implicit": ImplicitFilter,
    "explicit": ExplicitFilter,
    "modal": ModalFilter,
    "real-modal": RealModalFilter,
    "s4d": S4DFilter,
    "diagonal": DiagonalFilter,
    "shift": ShiftFilter,
    "squashed": SquashedFilter,
    "multiscale": MultiscaleFilter,
    "relative": RelativePositionFilter,
    "spectral": SpectralFilter,
}

__all__ = [
    "FILTERS",
    "DiagonalFilter",
    "ExplicitFilter",
    "Filter",
    "ImplicitFilter",
    "Modal",
    "ModalFilter",
    "MultiscaleFilter",
    "RealModalFilter",
    "RelativePositionFilter",
    "S4DFilter",
    "SharedFilter",
    "ShiftFilter",
    "SpectralBank",
    "SpectralFilter",
    "SquashedFilter",
    "hankel_matrix",
    "spectral_basis",
]
