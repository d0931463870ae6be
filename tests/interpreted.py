"""Imported before what imports Triton: a GPU's kernels run through its interpreter then, or the module skips itself."""

from __future__ import annotations

import os

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels run on the GPU here: tests/gpu", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")
if type(triton.language.sigmoid).__name__ != "InterpretedFunction":
    pytest.skip("triton was imported without TRITON_INTERPRET=1", allow_module_level=True)
