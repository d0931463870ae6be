"""The decode step of order-N Hyena blocks on a CPU, over numpy.

A one-token pass reads every weight once and does little else. numpy's matrix-vector product streams weights about
1.7 times faster than torch's on the machine measured, and its elementwise calls cost half as much to launch; so the
step runs on numpy views of the tensors' own memory, all of them made once per state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from flash_inference.ops.memory import roomy_zeros

Array = np.ndarray
gelu_ = torch._C._nn.gelu_  # type: ignore[attr-defined]


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


PACKED_BYTES = 64 << 20
"""Weights up to this size are copied side by side: the last-level cache may hold them between two steps."""


def pack(weights: list[Tensor]) -> list[Tensor]:
    """The same matrices one after another in one block of huge pages, each on a cache line; large ones as they are."""
    lines = [-(-w.nbytes // 64) * 64 for w in weights]
    if sum(lines) > PACKED_BYTES:
        return weights
    room, at, packed = roomy_zeros(weights[0].new_empty(0), sum(lines) // weights[0].itemsize), 0, []
    for w in weights:
        packed.append(room[at : at + w.numel()].view(w.shape).copy_(w))
        at += -(-w.nbytes // 64) * 64 // w.itemsize
    return packed


class HyenaStep:
    """One position through all blocks of order N. `bind` makes it ready for a state.

    Cost: one pass over the weights, about 25 small calls a layer. float32 and float64.
    """

    def __init__(self, layers: list[LayerWeights], order: int, eps: float, diagonal: Tensor) -> None:
        self.order, self.eps = order, eps
        self.width = layers[0].out_proj[0].shape[0]
        self.inner = layers[0].fc1[0].shape[0]
        self.dtype = layers[0].fc1[0].dtype
        self.norms = [(layer.norm1, layer.norm2) for layer in layers]
        pairs = [[layer.in_proj, layer.out_proj, layer.fc1, layer.fc2] for layer in layers]
        # Numbers of the same input side by side: BLAS multiplies 2 to 8 rows two to four times as fast so.
        packed = iter(pack([w.T for four in pairs for w, _ in four]))
        self.matrices = [[(next(packed).numpy(), b.numpy()) for _, b in four] for four in pairs]
        self.short_weight = np.stack([layer.short[0].numpy().T for layer in layers])
        self.short_bias = np.stack([layer.short[1].numpy() for layer in layers])[:, None]
        self.diagonal = diagonal.numpy()

    def bind(self, inputs: Tensor, partial: Tensor, short: Tensor) -> BoundStep:
        """The step over one state, whose tensors are read and written in place.

        `inputs`, `partial` [block, B, M D] are the staged rows.
        `short` [layers, taps - 1, B, (N + 1) D] holds what past inputs of the short convolutions owe the next
        positions, bias included.
        """
        return BoundStep(self, inputs.numpy(), partial.numpy(), short.numpy())


@cache
def alike(batch: int, width: int, dtype: str) -> int:
    """Rows of a product, `batch` or a few more, in which a row's bits do not depend on its place: found by trying.

    BLAS takes rows in groups, and may sum differently in each. Where no number up to the next multiple of eight will
    do, it is `batch`: so for float32 above eight rows with OpenBLAS's Haswell kernels.
    """
    random = np.random.default_rng(0)
    row, matrix = (random.standard_normal((n, min(width, 256))).astype(dtype) for n in (1, min(width, 256)))
    for rows in range(batch, -(-batch // 8) * 8 + 1):
        made = np.dot(np.repeat(row, rows, axis=0), matrix)
        if (made == made[0]).all():
            return rows
    return batch


class BoundStep:
    """A HyenaStep over the memory of one state, with scratch of its own. Fill `x` [B, D], call, read `x`.

    What is multiplied has `alike` rows, as the tensor of that name; those behind the batch are nobody's.
    """

    def __init__(self, step: HyenaStep, inputs: Array, partial: Array, short: Array) -> None:
        D, N, batch, layers = step.width, step.order, inputs.shape[1], len(step.norms)
        lead, some = ((), ...) if batch == 1 else ((batch,), slice(batch))
        padded = () if batch == 1 else (alike(batch, D, inputs.dtype.name),)
        with torch.inference_mode(False):
            self.flat = torch.zeros(*padded, D, dtype=step.dtype)
            self.hidden = torch.zeros(*padded, step.inner, dtype=step.dtype)
            self.alike = self.flat.view(-1, D)
            self.x = self.alike[:batch]
        self.step, self.rows_of_x = step, self.x.numpy()
        self.g, self.t_made = self.hidden.numpy(), np.zeros_like(self.flat.numpy())
        self.residual, self.t = self.flat.numpy()[some], self.t_made[some]
        self.u_made = np.zeros((layers, *padded, (N + 1) * D), self.g.dtype)
        self.u_all = self.u_made.reshape(layers, -1, (N + 1) * D)[:, :batch]
        self.u = [u[some] for u in self.u_made]
        self.s = np.empty_like(self.u[0])
        self.o_made = np.zeros_like(self.t_made)
        self.o = self.o_made[some]
        self.gates = [self.s[..., i * D : (i + 1) * D] for i in range(N + 1)]
        M = layers * (N - 1)
        cuts = [slice(m * D, (m + 1) * D) for m in range(M)]
        shaped = [a.reshape(len(a), *lead, M * D) for a in (inputs, partial)]
        self.rows = [[(y[..., c], z[..., c], step.diagonal[c]) for c in cuts] for y, z in zip(*shaped, strict=True)]
        self.short, self.shorts = short, [short[:, k] for k in range(short.shape[1])]
        first = self.shorts[0] if self.shorts else np.broadcast_to(step.short_bias, self.u_all.shape)
        self.pending = list(first.reshape(self.u_all.shape)) if batch > 1 else [row[0] for row in first]
        weights = step.short_weight
        self.newest = [weight[-1] for weight in weights]
        self.older = [weights[:, -2 - k][:, None] for k in range(len(self.shorts))]
        self.spare = np.empty_like(self.u_all)

    def __call__(self, row: int) -> None:
        """Runs x through the blocks at the staged position `row`, and moves the short convolutions on."""
        step = self.step
        D, N, eps = step.width, step.order, step.eps
        flat, x, hidden, g, s, o, t = self.flat, self.residual, self.hidden, self.g, self.s, self.o, self.t
        mixed, turned = self.o_made, self.t_made
        gates, rows = self.gates, iter(self.rows[row])
        layer_norm, dot, multiply, add = torch.layer_norm, np.dot, np.multiply, np.add
        for made, u, newest, pending, ((gamma1, beta1), (gamma2, beta2)), matrices in zip(
            self.u_made, self.u, self.newest, self.pending, step.norms, step.matrices, strict=True
        ):
            (w_in, b_in), (w_out, b_out), (w1, b1), (w2, b2) = matrices
            dot(layer_norm(flat, (D,), gamma1, beta1, eps).numpy(), w_in, made)
            add(u, b_in, u)
            multiply(u, newest, s)
            add(s, pending, s)
            v = gates[N]
            for i in range(N - 1, 0, -1):
                y, partial, diagonal = next(rows)
                multiply(gates[i], v, y)
                multiply(y, diagonal, o)
                v = add(o, partial, o)
            multiply(gates[0], v, o)
            dot(mixed, w_out, turned)
            add(t, b_out, t)
            add(x, t, x)
            dot(layer_norm(flat, (D,), gamma2, beta2, eps).numpy(), w1, g)
            add(g, b1, g)
            gelu_(hidden, approximate="tanh")
            dot(g, w2, turned)
            add(t, b2, t)
            add(x, t, x)
        for k, short in enumerate(self.shorts):
            older = self.shorts[k + 1] if k + 1 < len(self.shorts) else step.short_bias
            multiply(self.u_all, self.older[k], self.spare)
            add(self.spare, older, short)
