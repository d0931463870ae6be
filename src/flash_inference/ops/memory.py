"""Memory for large tensors that are touched all over: pages of 2 MiB where the system has them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def roomy_zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of `like`'s dtype and device.

    On a CPU they come from numpy, which asks the kernel for huge pages for arrays of 4 MiB and more; torch does not. A
    step that touches a few columns of every channel, or streams many weights, then needs hundreds of times fewer
    entries of the translation buffer.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    count = int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(np.zeros(count * like.itemsize, np.uint8)).view(like.dtype).view(shape)
