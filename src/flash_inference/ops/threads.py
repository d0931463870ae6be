"""How many threads an operation on a CPU is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

ALONE_POINTS = 1 << 17


@contextmanager
def threads_for(points: int) -> Iterator[None]:
    """One thread for small transforms, all that torch has for large ones; the caller's setting comes back afterwards.

    Waking a second thread costs more than a small transform saves, and milliseconds when other work holds that core.
    """
    with one_thread() if points <= ALONE_POINTS else nullcontext():
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operations on one thread; the caller's setting comes back afterwards.

    For steps whose products run through numpy: its BLAS has threads of its own. PyTorch's stay busy for a while after
    an operation, waiting for the next, and hold the core that BLAS wants: on two cores that cost a step of 32 rows 110
    of 116 milliseconds.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
