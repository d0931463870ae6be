"""Where rho comes from: explicit taps, or a sine MLP under a window. A filter gives `taps(n) -> [channels, n]`."""

from __future__ import annotations

from flash_inference.filters.explicit import ExplicitFilter
from flash_inference.filters.implicit import ImplicitFilter

FILTERS = {"implicit": ImplicitFilter, "explicit": ExplicitFilter}

__all__ = ["FILTERS", "ExplicitFilter", "ImplicitFilter"]
