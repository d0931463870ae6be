"""Tests that need a CUDA device. Without one, or under Triton's interpreter, each module skips itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn)


@pytest.fixture(autouse=True)
def _memory_goes_back() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
