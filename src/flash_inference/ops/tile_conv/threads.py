"""How many threads an operation on a CPU is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ALONE_POINTS = 1 << 17


@contextmanager
def threads_for(points: int) -> Iterator[None]:
    """One thread for small transforms, all that torch has for large ones; the caller's setting comes back afterwards.

    Waking a second thread costs more than a small transform saves, and milliseconds when other work holds that core.
    """
    threads = torch.get_num_threads()
    if threads == 1 or points > ALONE_POINTS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
