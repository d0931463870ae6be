"""The decode step of order-N Hyena blocks on a CPU, over numpy.

A one-token pass reads every weight once and does little else. numpy's matrix-vector product streams weights about
1.7 times faster than torch's on the machine measured, and its elementwise calls cost half as much to launch; so the
step runs on numpy views of the tensors' own memory, into scratch that belongs to the state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
gelu_ = torch._C._nn.gelu_


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The tensors of one Hyena block, each as (weight, bias): matrices [out, in], short filter [W, taps]."""

    norm1: tuple[Tensor, Tensor]
    in_proj: tuple[Tensor, Tensor]
    short: tuple[Tensor, Tensor]
    out_proj: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]


class Scratch:
    """Intermediate rows of one state's steps: numpy arrays and the torch views of those that torch computes on."""

    def __init__(self, batch: int, width: int, order: int, inner: int, layers: int, dtype: torch.dtype) -> None:
        lead = () if batch == 1 else (batch,)
        with torch.inference_mode(False):
            self.x = torch.empty(*lead, width, dtype=dtype)
            self.g = torch.empty(*lead, inner, dtype=dtype)
            self.u = torch.empty(layers, batch, (order + 1) * width, dtype=dtype)
        self.xn, self.gn = self.x.numpy(), self.g.numpy()
        self.un = self.u.numpy().reshape(layers, *lead, (order + 1) * width)
        self.s = np.empty_like(self.un[0])
        self.o, self.t = np.empty_like(self.xn), np.empty_like(self.xn)


class HyenaStep:
    """One position through all blocks: x [B, D] in scratch -> x, with the mixers' rows read and written in place.

    Cost: one pass over the weights, about 30 small calls a layer. float32 and float64.
    """

    def __init__(self, layers: list[LayerWeights], order: int, eps: float, diagonal: Tensor) -> None:
        self.order, self.eps = order, eps
        self.width = layers[0].out_proj[0].shape[0]
        self.inner = layers[0].fc1[0].shape[0]
        self.norms = [(layer.norm1, layer.norm2) for layer in layers]
        self.matrices = [
            tuple((w.numpy().T, b.numpy()) for w, b in (layer.in_proj, layer.out_proj, layer.fc1, layer.fc2))
            for layer in layers
        ]
        self.short_weight = np.stack([layer.short[0].numpy().T for layer in layers])[:, :, None]
        self.short_bias = np.stack([layer.short[1].numpy() for layer in layers])[:, None]
        self.diagonal = diagonal.numpy()

    def scratch(self, batch: int) -> Scratch:
        """Fresh intermediate rows for a batch."""
        dtype = self.norms[0][0][0].dtype
        return Scratch(batch, self.width, self.order, self.inner, len(self.norms), dtype)

    def __call__(self, scratch: Scratch, partial: Array, inputs: Array, short: Array) -> None:
        """Runs scratch.x through the blocks. partial, inputs [B, M D]: this position's rows; short: pending sums.

        `short` [layers, taps - 1, B, (N + 1) D] holds what past inputs owe the next positions, bias included.
        """
        D, N, eps = self.width, self.order, self.eps
        x, xn, g, gn, s, o, t = scratch.x, scratch.xn, scratch.g, scratch.gn, scratch.s, scratch.o, scratch.t
        if xn.ndim == 1:
            partial, inputs, short = partial[0], inputs[0], short[:, :, 0]
        newest = self.short_weight[:, -1, 0]
        layer_norm, dot, multiply, add = torch.layer_norm, np.dot, np.multiply, np.add
        pending = len(short[0])
        m = 0
        for layer, ((gamma1, beta1), (gamma2, beta2)) in enumerate(self.norms):
            (w_in, b_in), (w_out, b_out), (w1, b1), (w2, b2) = self.matrices[layer]
            u = scratch.un[layer]
            dot(layer_norm(x, (D,), gamma1, beta1, eps).numpy(), w_in, out=u)
            add(u, b_in, out=u)
            multiply(u, newest[layer], out=s)
            add(s, short[layer, 0] if pending else self.short_bias[layer, 0], out=s)
            v = s[..., N * D :]
            for i in range(N - 1, 0, -1):
                y = inputs[..., m * D : (m + 1) * D]
                multiply(s[..., i * D : (i + 1) * D], v, out=y)
                multiply(y, self.diagonal[m * D : (m + 1) * D], out=o)
                v = add(o, partial[..., m * D : (m + 1) * D], out=o)
                m += 1
            multiply(s[..., :D], v, out=o)
            dot(o, w_out, out=t)
            add(xn, t, out=xn)
            add(xn, b_out, out=xn)
            dot(layer_norm(x, (D,), gamma2, beta2, eps).numpy(), w1, out=gn)
            add(gn, b1, out=gn)
            gelu_(g, approximate="tanh")
            dot(gn, w2, out=t)
            add(xn, t, out=xn)
            add(xn, b2, out=xn)

    def advance(self, scratch: Scratch, short: Array) -> None:
        """Moves the short convolutions of all layers on by the inputs that the step left in scratch."""
        pending = short.shape[1]
        u = scratch.un.reshape(short.shape[0], *short.shape[2:])
        for k in range(pending):
            weight = self.short_weight[:, pending - 1 - k]
            older = short[:, k + 1] if k + 1 < pending else self.short_bias
            np.multiply(u, weight, out=short[:, k])
            short[:, k] += older
