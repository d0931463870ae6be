"""Where rho comes from: explicit taps, a sine MLP under a window, sums of modes. `taps(n) -> [channels, n]`."""

from __future__ import annotations

from flash_inference.filters.explicit import ExplicitFilter
from flash_inference.filters.implicit import ImplicitFilter
from flash_inference.filters.modal import Modal, ModalFilter, RealModalFilter, S4DFilter

FILTERS = {
    "implicit": ImplicitFilter,
    "explicit": ExplicitFilter,
    "modal": ModalFilter,
    "real-modal": RealModalFilter,
    "s4d": S4DFilter,
}

__all__ = [
    "FILTERS",
    "ExplicitFilter",
    "ImplicitFilter",
    "Modal",
    "ModalFilter",
    "RealModalFilter",
    "S4DFilter",
]
