"""Attention another way: numpy float64, one query at a time, with an error that is carried along."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from flash_inference.mixers import AttentionConfig

Array = np.ndarray


def attention_oracle(
    x: Tensor, weights: Mapping[str, Tensor], config: AttentionConfig, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Causal self-attention of x [B, L, D] as (exact, bound), float64: its value, and how far precision eps may err.

    `weights` are named as in Attention's state dict. The bound follows the data: a sum of n products errs by at most
    n eps of its magnitudes, a rotation by 3 eps of its; an error of e in all scores changes a softmax by exp(2 e) - 1
    relatively; tanh and exp are taken as good to 4 eps.
    """
    w = {name: tensor.detach().cpu().double().numpy() for name, tensor in weights.items()}
    inputs, H, G, d = x.detach().cpu().double().numpy(), config.heads, config.kv_heads, config.head_width
    B, L, _ = inputs.shape
    u, du = _linear(inputs, np.zeros_like(inputs), w["qkv.weight"], w.get("qkv.bias"), eps)
    u, du = (a.reshape(B, L, H + 2 * G, d) for a in (u, du))
    out, dout = np.zeros((B, L, H, d)), np.zeros((B, L, H, d))
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            q, k = (_turned(u[b, :, i], du[b, :, i], config, eps) for i in (h, H + g))
            v = (u[b, :, H + G + g], du[b, :, H + G + g])
            slope = 0.0 if config.alibi is None else config.alibi[h]
            for t in range(L):
                oldest = 0 if config.window is None else max(0, t - config.window + 1)
                seen = slice(oldest, t + 1)
                s, ds = _scores((q[0][t], q[1][t]), (k[0][seen], k[1][seen]), config, eps)
                fall = slope * np.arange(t - oldest, -1, -1)
                s, ds = s - fall, ds + eps * (2 * fall + np.abs(s))
                largest = s.max()
                e = np.exp(s - largest)
                weight = e / e.sum()
                off = math.expm1(2 * (ds + eps * (np.abs(s) + abs(largest))).max()) + (len(s) + 8) * eps
                out[b, t, h] = weight @ v[0][seen]
                dout[b, t, h] = (1 + off) * (weight @ v[1][seen]) + (off + len(s) * eps) * (weight @ np.abs(v[0][seen]))
    y, dy = _linear(out.reshape(B, L, H * d), dout.reshape(B, L, H * d), w["out.weight"], w.get("out.bias"), eps)
    return torch.from_numpy(y), torch.from_numpy(dy)


def _linear(x: Array, dx: Array, weight: Array, bias: Array | None, eps: float) -> tuple[Array, Array]:
    bias = np.zeros(len(weight)) if bias is None else bias
    magnitude = (np.abs(x) + dx) @ np.abs(weight).T + np.abs(bias)
    return x @ weight.T + bias, dx @ np.abs(weight).T + (weight.shape[1] + 1) * eps * magnitude


def _turned(x: Array, dx: Array, config: AttentionConfig, eps: float) -> tuple[Array, Array]:
    """x [L, d] with the halves of each pair rotated, position by position."""
    if config.rotary is None:
        return x, dx
    y, dy, half = x.copy(), dx.copy(), (config.rotary.width or x.shape[1]) // 2
    for t in range(len(x)):
        for i in range(half):
            angle = t / config.rotary.interpolation * config.rotary.base ** (-i / half)
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            pair = [i, i + half]
            y[t, pair] = turn @ x[t, pair]
            dy[t, pair] = np.abs(turn) @ (dx[t, pair] + 3 * eps * np.abs(x[t, pair]))
    return y, dy


def _scores(q: tuple[Array, Array], k: tuple[Array, Array], config: AttentionConfig, eps: float) -> tuple[Array, Array]:
    """Scores of one query over keys [S, d], capped."""
    scale = config.head_width**-0.5
    s = scale * (k[0] @ q[0])
    ds = scale * (np.abs(k[0]) @ q[1] + k[1] @ np.abs(q[0]) + k[1] @ q[1])
    ds = ds + scale * (config.head_width + 3) * eps * (np.abs(k[0]) @ np.abs(q[0]))
    if config.softcap is None:
        return s, ds
    return config.softcap * np.tanh(s / config.softcap), ds + 4 * eps * np.abs(s)
