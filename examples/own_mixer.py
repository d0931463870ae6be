"""A mixer of one's own that is no convolution, in near-linear time: python examples/own_mixer.py

Attention without queries: at target j, source i has the weight exp(k[i] + w[j - i]) of a learned key and a learned
distance, and the mean of the values is read through a gate. Tiles pay it since no weight depends on who reads.
"""

import torch
from torch import Tensor

from flash_inference.mixers import Contribution
from flash_inference.tiling import TILINGS, Relaxed, cost

LENGTH, WIDTH = 300, 8


class QueryFree(Contribution):
    """z[j] = gate[j] * sum over i <= j of exp(k[i] + w[j - i]) v[i] / (the same sum of weights); y is (gate, k, v)."""

    sum_shape = (2 * WIDTH,)

    def __init__(self, w: Tensor) -> None:
        self.w = w

    def cont(self, y: Tensor, sources: range, targets: range) -> Tensor:
        """What a block of sources gives each of a block of targets: here, one matrix product."""
        i, j = torch.tensor(list(sources)), torch.tensor(list(targets))
        _, key, value = y.chunk(3, dim=2)
        return self.w[j[:, None] - i].exp() @ torch.cat([key.exp(), key.exp() * value], dim=2)

    def read(self, sums: Tensor, y: Tensor) -> Tensor:
        """The weighted mean, through the reader's own gate."""
        total, weighted = sums.chunk(2, dim=2)
        return torch.sigmoid(y[..., :WIDTH]) * weighted / total


def direct(w: Tensor, y: Tensor) -> Tensor:
    """The definition, pair by pair."""
    gate, key, value = y.chunk(3, dim=2)
    z = torch.empty_like(gate)
    for j in range(y.shape[1]):
        weights = torch.exp(key[:, : j + 1] + w[: j + 1].flip(0)[:, None])
        z[:, j] = torch.sigmoid(gate[:, j]) * (weights * value[:, : j + 1]).sum(1) / weights.sum(1)
    return z


def main() -> None:
    """Steps through a sequence under every tiling of rectangles."""
    torch.manual_seed(0)
    w, y = torch.randn(LENGTH, dtype=torch.float64), torch.randn(2, LENGTH, 3 * WIDTH, dtype=torch.float64)
    mixer, expected = QueryFree(w), direct(w, y)
    for name in ("lazy", "relaxed", "blocked", "separated"):
        past = mixer.init(2, TILINGS[name](LENGTH), width=3 * WIDTH, like=y)
        z = torch.cat([mixer.extend(past, y[:, t : t + 1]) for t in range(LENGTH)], dim=1)
        print(f"{name}: largest difference to the direct sum {(z - expected).abs().max():.1e}")
    print(f"{cost(Relaxed(LENGTH), lambda tile: 1).total:.0f} tiles instead of {LENGTH * (LENGTH - 1) // 2} pairs")


if __name__ == "__main__":
    main()
