"""A filter that the sequence itself makes, tap by tap: python examples/changing_filter.py

Tap k is a function of output k - 1, so nobody can know it before. Parallelograms of sources and lags pay each pair once
both of its ends are known.
"""

import torch
from torch import Tensor

from flash_inference.mixers import AdaptiveConv
from flash_inference.tiling import TwiceRelaxed, cost

LENGTH, WIDTH = 500, 8


def next_inputs(z: Tensor, noise: Tensor) -> Tensor:
    """The next input and the next tap [B, 1, 2 D] from the last output and some noise of this position."""
    y, tap = noise.chunk(2, dim=2)
    return torch.cat([torch.tanh(y + z), torch.sin(tap - z) / LENGTH**0.5], dim=2)


def direct(z: Tensor, noise: Tensor) -> Tensor:
    """The same recursion, with a sum over the whole past at every step: O(L^2)."""
    inputs, outputs = noise[:, :0], []
    for t in range(LENGTH):
        inputs = torch.cat([inputs, next_inputs(z, noise[:, t : t + 1])], dim=1)
        y, taps = inputs.chunk(2, dim=2)
        outputs.append(z := (y * taps.flip(1)).sum(1, keepdim=True))
    return torch.cat(outputs, dim=1)


def main() -> None:
    """Runs the recursion both ways."""
    torch.manual_seed(0)
    noise = torch.randn(2, LENGTH, 2 * WIDTH, dtype=torch.float64)
    first = z = torch.zeros(2, 1, WIDTH, dtype=torch.float64)
    conv, outputs = AdaptiveConv(), []
    past = conv.init(2, tiling := TwiceRelaxed(LENGTH), width=WIDTH, like=noise)
    for t in range(LENGTH):
        outputs.append(z := conv.extend(past, next_inputs(z, noise[:, t : t + 1])))
    difference = (torch.cat(outputs, dim=1) - direct(first, noise)).abs().max()
    print(f"largest difference to the direct sum after {LENGTH} steps: {difference:.1e}")
    print(f"{cost(tiling, lambda tile: 1).total:.0f} tiles instead of {LENGTH * (LENGTH - 1) // 2} pairs")


if __name__ == "__main__":
    main()
