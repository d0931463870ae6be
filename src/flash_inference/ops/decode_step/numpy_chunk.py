"""A few positions at once through order-N Hyena blocks on a CPU, over numpy.

The work is that of as many steps, but each weight is read once: matrices times matrices. OpenBLAS multiplies a matrix by
few columns fastest when the product comes out with the columns innermost, so what is as wide as a matrix stands channel
by channel here, [channels, n B], and only norms and convolutions see position after position.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from flash_inference.ops.decode_step.numpy import Array, HyenaStep, gelu_

Mix = Callable[[int, Array], Array]
"""`mix(m, y)`: long convolution m of its inputs y [n, B, D] at the next n positions, skip term included: [n, B, D]."""


class HyenaChunk:
    """Positions that follow a state, which stays as it is: `short` [layers, taps - 1, B, W] is copied.

    Called with x [n, B, D] it gives what the blocks make of it, and moves its own copy on, so that calls follow upon
    each other. `entered` has what each call put into the short convolutions, [layers, W, n B].
    Cost: one pass over the weights a call, in 2 n B flops for each.
    """

    def __init__(self, step: HyenaStep, short: Array) -> None:
        self.step, self.short = step, short.copy()
        self.entered: list[Array] = []

    def __call__(self, x: Array, mix: Mix) -> Array:
        """The next positions x [n, B, D] -> [n, B, D]."""
        step, (n, B, D) = self.step, x.shape
        N, x = step.order, x.reshape(n * B, D)
        entered, m = np.empty((len(step.norms), (N + 1) * D, n * B), x.dtype), 0
        for layer, (u, norms, matrices) in enumerate(zip(entered, step.norms, step.matrices, strict=True)):
            (w_in, b_in), (w_out, b_out), (w1, b1), (w2, b2) = matrices
            np.dot(w_in.T, self._norm(x, *norms[0]).T, u)
            u += b_in[:, None]
            gates = self._convolved(layer, u, B).reshape(N + 1, D, n * B)
            v = gates[N]
            for i in range(N - 1, 0, -1):
                y = np.multiply(gates[i], v).T.reshape(n, B, D)
                v, m = mix(m, y).reshape(n * B, D).T, m + 1
            t = np.dot(w_out.T, gates[0] * v)
            t += b_out[:, None]
            x = x + t.T
            g = np.dot(w1.T, self._norm(x, *norms[1]).T)
            g += b1[:, None]
            gelu_(torch.from_numpy(g), approximate="tanh")
            t = np.dot(w2.T, g)
            t += b2[:, None]
            x = x + t.T
        self.entered.append(entered)
        self._advance(self.short, entered, n)
        return x.reshape(n, B, D)

    def commit(self, short: Array, n: int) -> None:
        """Moves the state's `short` on by the first n positions, as so many steps do."""
        if n:
            whole = self.entered[0] if len(self.entered) == 1 else np.concatenate(self.entered, axis=2)
            self._advance(short, whole, n)

    def _advance(self, short: Array, entered: Array, n: int) -> None:
        """What the first n of the positions entered leave pending: the last taps - 1 of them have a say in it."""
        edge, B = short.shape[1:3]
        for t in range(max(n - edge, 0), n):
            u = entered[:, :, t * B : (t + 1) * B].transpose(0, 2, 1)
            for k in range(edge):
                older = short[:, k + 1] if k + 1 < edge else self.step.short_bias
                np.add(u * self.step.short_weight[:, -2 - k, None], older, short[:, k])

    def _norm(self, x: Array, gamma: torch.Tensor, beta: torch.Tensor) -> Array:
        return torch.layer_norm(torch.from_numpy(x), gamma.shape, gamma, beta, self.step.eps).numpy()

    def _convolved(self, layer: int, u: Array, B: int) -> Array:
        """Short convolution `layer` of u [W, n B], behind what is pending."""
        weight = self.step.short_weight[layer]
        s = u * weight[-1][:, None]
        for k in range(1, min(len(weight), u.shape[1] // B)):
            s[:, k * B :] += u[:, : -k * B] * weight[-1 - k][:, None]
        pending = self.short[layer, : u.shape[1] // B]
        edge = len(pending) * B
        s[:, :edge] += pending.reshape(edge, -1).T
        s[:, edge:] += self.step.short_bias[layer].T
        return s
