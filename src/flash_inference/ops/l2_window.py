"""What a GPU's L2 cache does with memory that kernels not our own write: a hint that holds for a stream."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGEST, WINDOW, STREAMING = 109, 1, 1
"""The driver's numbers: of the attribute that tells the largest window, of a stream's window, of what leaves first."""


class _Window(ctypes.Structure):
    """CUaccessPolicyWindow."""

    _fields_ = (
        ("start", ctypes.c_void_p), ("size", ctypes.c_size_t), ("share", ctypes.c_float), ("inside", ctypes.c_int),
        ("outside", ctypes.c_int),
    )  # fmt: skip


class _Value(ctypes.Union):
    """CUstreamAttrValue, of which a window takes a part."""

    _fields_ = (("room", ctypes.c_char * 64), ("window", _Window))


@cache
def _driver() -> Any:
    """The library of the driver that PyTorch has loaded; None if there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def leaves_first(stream: torch.cuda.Stream, memory: Tensor) -> bool:
    """Lets what kernels on `stream` read and write in `memory` leave the L2 cache before all else: as `evict_first`.

    It holds for all kernels that are launched there from now on, those of libraries too, until the next call; memory
    behind the device's largest window (128 MiB on an H100) keeps the usual policy. Nothing but speed depends on it.
    Returns whether the driver took it: not where there is none, below compute capability 8.0, or under MIG.
    """
    driver, most = _driver(), ctypes.c_int()
    if driver is None or driver.cuDeviceGetAttribute(ctypes.byref(most), LARGEST, memory.device.index or 0):
        return False
    if not most.value:
        return False
    value = _Value()
    value.window = _Window(memory.data_ptr(), min(memory.nbytes, most.value), 1.0, STREAMING, 0)
    with torch.cuda.device(memory.device):
        refused = driver.cuStreamSetAttribute(ctypes.c_void_p(stream.cuda_stream), WINDOW, ctypes.byref(value))
    return not refused
