"""The hint for a GPU's cache, against a driver that writes down what it is told."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from flash_inference.ops import l2_window


class Driver:
    """One device, whose largest window is `most` bytes; `refuses` is what it answers to a window."""

    def __init__(self, most: int, refuses: int = 0) -> None:
        self.most, self.refuses = most, refuses
        self.told: tuple[int | None, int, tuple[Any, ...]] | None = None

    def cuDeviceGetAttribute(self, into: Any, attribute: int, device: int) -> int:  # noqa: N802
        assert (attribute, device) == (109, 0)
        into._obj.value = self.most
        return 0

    def cuStreamSetAttribute(self, stream: ctypes.c_void_p, attribute: int, value: Any) -> int:  # noqa: N802
        found = value._obj
        assert ctypes.sizeof(found) == 64
        window = found.window
        self.told = (
            stream.value, attribute, (window.start, window.size, window.share, window.inside, window.outside)
        )  # fmt: skip
        return self.refuses


class Stream:
    """What is asked of a stream."""

    cuda_stream = 5


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


@pytest.mark.parametrize(("most", "size"), [(1 << 20, 4096), (1024, 1024)])
def test_the_driver_is_told_the_memory_up_to_its_largest_window(
    monkeypatch: pytest.MonkeyPatch, most: int, size: int
) -> None:
    driver, memory = Driver(most), torch.empty(4096, dtype=torch.uint8)
    monkeypatch.setattr(l2_window, "_driver", lambda: driver)
    assert l2_window.leaves_first(Stream(), memory)  # type: ignore[arg-type]
    assert driver.told == (5, 1, (memory.data_ptr(), size, 1.0, 1, 0))


@pytest.mark.parametrize(
    "driver", [None, Driver(0), Driver(1 << 20, refuses=801)], ids=["none", "no window", "refused"]
)
def test_a_driver_that_cannot_is_no_error(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> None:
    monkeypatch.setattr(l2_window, "_driver", lambda: driver)
    assert not l2_window.leaves_first(Stream(), torch.empty(16, dtype=torch.uint8))  # type: ignore[arg-type]
