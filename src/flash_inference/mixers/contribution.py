"""Any mixer that sums contributions which ask nothing of the reader: near-linear from its own block routine."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flash_inference.errors import TilingError
from flash_inference.mixers.tiled import Item, Tiled, TiledPast, check_length
from flash_inference.tiling import Parallelogram, Rectangle, Share, Tiling


class Contribution(Tiled, ABC):
    """z[j] = read(cont(y, 0, j) + .. + cont(y, j, j), y[j]), where + is `agg`: any associative, commutative operation.

    A subclass gives `cont` for blocks, the routine A(sources, targets) of the paper: what a block of sources
    contributes to each of a block of later targets. It must look at the sources' inputs only (query-independent). Its
    cost over the tiles is the cost of decoding: a routine of cost O((S + T) log(S + T)) makes L positions cost
    O(L log^2 L). `sum_shape` is the shape of one contribution, `nothing` the value that `agg` leaves as it is.
    Every tiling of rectangles serves; a Share is some of a tile's sources here. Positions are absolute, so that
    contributions may depend on them.
    Source: Oncescu et al. (2024), arXiv 2410.12982, section 4.
    """

    sum_shape: tuple[int, ...]
    nothing: float = 0.0

    @abstractmethod
    def cont(self, y: Tensor, sources: range, targets: range) -> Tensor:
        """[B, T, *sum_shape]: what the inputs y [B, S, D] of `sources` contribute to each target, aggregated.

        Called with sources before targets, and with one position as both.
        """

    @abstractmethod
    def read(self, sums: Tensor, y: Tensor) -> Tensor:
        """Outputs [B, N, ..] of positions with these aggregates [B, N, *sum_shape] and inputs y [B, N, D]."""

    def agg(self, a: Tensor, b: Tensor) -> Tensor:
        """Both together; by default a + b."""
        return a + b

    def forward(self, y: Tensor) -> Tensor:
        """The whole sequence: y [B, L, D] -> [B, L, ..], in halves, at the cost of decoding."""
        return self.read(self._triangle(y, 0), y)

    def init(self, batch: int, tiling: Tiling, width: int, like: Tensor | None = None) -> TiledPast:
        """The state of an empty past of inputs [B, L, width], in the dtype and on the device of `like`.

        Memory: L times B times (width + the size of a sum). Raises TilingError for parallelograms.
        """
        length = check_length(tiling)
        if any(isinstance(item, Parallelogram) for t in range(min(4, length)) for item in tiling.after(t)):
            raise TilingError(f"{tiling!r} has parallelograms, for taps that become known; use one of rectangles.")
        like = torch.empty(0) if like is None else like
        sums = like.new_full((batch, length, *self.sum_shape), self.nothing)
        return TiledPast(tiling, like.new_zeros(batch, length, width), sums)

    def apply(self, past: TiledPast, item: Item) -> None:
        """Adds what an item's sources contribute to its targets."""
        if isinstance(item, Share):
            # A chunk may clip the targets of a tile whose first shares are paid, but never its sources.
            sources = item.tile.sources
            part = item.channels(len(sources))
            item = Rectangle(sources[part.start : part.stop], item.tile.targets)
        assert isinstance(item, Rectangle)
        s, t = item.sources, item.targets
        if s and t:
            held = past.sums[:, t.start : t.stop]
            held.copy_(self.agg(held, self.cont(past.inputs[:, s.start : s.stop], s, t)))

    def own(self, past: TiledPast, start: int, stop: int) -> Tensor:
        """Outputs of a chunk: its own pairs, then `read`."""
        y = past.inputs[:, start:stop]
        return self.read(self.agg(past.sums[:, start:stop], self._triangle(y, start)), y)

    def _triangle(self, y: Tensor, start: int) -> Tensor:
        """Aggregates [B, N, *sum_shape] of the pairs i <= j among the positions of y [B, N, D], by halves."""
        n = y.shape[1]
        if n <= 1:
            positions = range(start, start + n)
            return self.cont(y, positions, positions) if n else y.new_empty(len(y), 0, *self.sum_shape)
        half = n // 2
        first, second = range(start, start + half), range(start + half, start + n)
        far = self.cont(y[:, :half], first, second)
        near = self._triangle(y[:, half:], start + half)
        return torch.cat([self._triangle(y[:, :half], start), self.agg(far, near)], dim=1)
