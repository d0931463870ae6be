"""A few positions at once through order-N Hyena blocks on a CPU, over numpy.

The work is that of as many steps, but each weight is read once: matrices times matrices. What OpenBLAS likes, measured:
W x^T, with the columns innermost in the product (x W^T takes twice as long for 32 of them); eights of columns (32 take
three quarters of the time of 31); and weights that lie in the cache, since it reads them in an order that no prefetcher
follows: so a piece of W is first touched, a number a cache line (8 columns take 1.5 ms in all instead of 2.1).
Elementwise work runs along the channels, whose rows are long enough for numpy. Arrays are kept from call to call:
fresh pages cost as much as all else but the products.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from flash_inference.ops.decode_step.numpy import Array, HyenaStep, gelu_

FEW, EIGHT = 4, 8
LINE, PIECE_BYTES = 64, 256 << 10

Mix = Callable[[int, Array], Array]
"""`mix(m, y)`: long convolution m of its inputs y [n, B, D] at the next n positions, skip term included: [n, B, D]."""

Piece = tuple[Array, Array, slice]
"""Some rows of a matrix, one number of each cache line of theirs, and which rows they are."""


class HyenaChunk:
    """Several positions through all blocks of a HyenaStep, with scratch of its own: one call at a time.

    Cost: one pass over the weights a call. float32 and float64.
    """

    def __init__(self, step: HyenaStep) -> None:
        self.step, self.rows = step, 0
        self.matrices = [[_pieces(np.ascontiguousarray(w.T)) for w, _ in layer] for layer in step.matrices]

    def __call__(self, x: Array, short: Array, mix: Mix) -> tuple[Array, Array]:
        """What the blocks make of the next positions x [n, B, D], and what enters the short convolutions on the way.

        `short` [layers, taps - 1, B, W], as `HyenaStep.bind` has it, is read only: `advance` moves it on. The outputs
        [n, B, D] are valid until the next call; the inputs of the short convolutions [layers, n, B, W] for good.
        """
        step, (n, B, D), N = self.step, x.shape, self.step.order
        self._make_room(n * B)
        flat, m = self.x[: n * B], 0
        entered = np.empty((len(step.norms), n, B, (N + 1) * D), x.dtype)
        s, spare = (a[: n * B].reshape(n, B, -1) for a in (self.s, self.spare))
        y = self.y[: n * B].reshape(n, B, D)
        flat[...] = x.reshape(n * B, D)
        for layer, u in enumerate(entered):
            (norm1, norm2), (w_in, w_out, w1, w2) = step.norms[layer], self.matrices[layer]
            b_in, b_out, b1, b2 = (b for _, b in step.matrices[layer])
            self._product(w_in, self._norm(*norm1), self.u)
            np.add(self.u.T[: n * B], b_in, u.reshape(n * B, -1))
            self._convolve(layer, u, short[layer], s, spare)
            v = s[..., N * D :]
            for i in range(N - 1, 0, -1):
                v, m = mix(m, np.multiply(s[..., i * D : (i + 1) * D], v, y)), m + 1
            np.multiply(s[..., :D], v, y)
            flat += self._product(w_out, self.y.T, self.t).T[: n * B]
            flat += b_out
            self._product(w1, self._norm(*norm2), self.g)
            self.g += b1[:, None]
            gelu_(torch.from_numpy(self.g), approximate="tanh")
            flat += self._product(w2, self.g, self.t).T[: n * B]
            flat += b2
        return flat.reshape(n, B, D), entered

    def advance(self, short: Array, entered: Array, n: int) -> None:
        """Moves `short` on by the first n of the positions entered, as so many steps do."""
        edge, step = short.shape[1], self.step
        for t in range(max(n - edge, 0), n):
            for k in range(edge):
                older = short[:, k + 1] if k + 1 < edge else step.short_bias
                np.add(entered[:, t] * step.short_weight[:, -2 - k, None], older, short[:, k])

    def _make_room(self, rows: int) -> None:
        """Scratch for so many rows, rounded up to eights; the rows behind them hold numbers that nobody reads."""
        rows = rows if rows <= FEW else -(-rows // EIGHT) * EIGHT
        if rows != self.rows:
            step, D = self.step, self.step.width
            dtype, wide = step.diagonal.dtype, (step.order + 1) * D
            self.x, self.y = (np.zeros((rows, D), dtype) for _ in range(2))
            self.s, self.spare = (np.empty((rows, wide), dtype) for _ in range(2))
            self.u, self.t, self.g = (np.empty((width, rows), dtype) for width in (wide, D, step.inner))
            self.rows = rows

    def _product(self, pieces: list[Piece], x: Array, out: Array) -> Array:
        """W x for x [in, rows], as out [out, rows]; each piece of W is fetched before it is multiplied."""
        several = self.rows > 1
        for w, lines, rows in pieces:
            if several:
                np.maximum.reduce(lines)
            np.dot(w, x, out[rows])
        return out

    def _norm(self, gamma: torch.Tensor, beta: torch.Tensor) -> Array:
        """The residual stream, normed, [D, rows]."""
        return torch.layer_norm(torch.from_numpy(self.x), gamma.shape, gamma, beta, self.step.eps).numpy().T

    def _convolve(self, layer: int, u: Array, short: Array, s: Array, spare: Array) -> None:
        """s [n, B, W]: short convolution `layer` of u, behind what is pending in `short` [taps - 1, B, W]."""
        weight, n = self.step.short_weight[layer], len(u)
        np.multiply(u, weight[-1], s)
        for k in range(1, min(len(weight), n)):
            s[k:] += np.multiply(u[:-k], weight[-1 - k], spare[k:])
        s[: len(short)] += short[:n]
        s[len(short) :] += self.step.short_bias[layer]


def _pieces(w: Array) -> list[Piece]:
    """A matrix [out, in] in pieces that a core's own cache holds."""
    rows = max(1, PIECE_BYTES // w[0].nbytes)
    cuts = [slice(r, r + rows) for r in range(0, len(w), rows)]
    return [(w[cut], w[cut].reshape(-1)[:: LINE // w.itemsize], cut) for cut in cuts]
