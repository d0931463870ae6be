"""Which device is used, and what is said when it is not the GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from flash_inference.engine.decode import best_device, decoder_for
from flash_inference.models.decoder import Decoder
from flash_inference.testing import random_model


def test_without_a_gpu_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_device() == ("cpu", None)


def test_without_triton_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delitem(sys.modules, "flash_inference.models.gpu", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.endswith((".triton", ".fft_rows", ".triton_circle"))]:
        monkeypatch.delitem(sys.modules, name)
    device, reason = best_device()
    assert device == "cpu"
    assert reason is not None
    assert "pip install triton" in reason
    assert "\n" not in reason


def test_a_model_on_a_cpu_gets_the_cpus_decoder() -> None:
    model = random_model(2, layers=1, width=8, vocab_size=11, length=64)
    assert isinstance(decoder_for(model, 32), Decoder)


def test_kernels_refuse_float64() -> None:
    pytest.importorskip("triton")
    from flash_inference.models.gpu import unusable

    assert "float64" in str(unusable(torch.zeros(1, dtype=torch.float64)))
    assert "not on a GPU" in str(unusable(torch.zeros(1)))
