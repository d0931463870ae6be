"""The same numbers, another way: numpy float64, direct sums, plain loops over positions, no code of the library.

Each oracle is a transcription of the definition. Costs are quadratic in the length: for tests and small checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flash_inference.models.backbone import LanguageModel

Array = np.ndarray


def tile_conv_oracle(y: Tensor, rho: Tensor, first: int, targets: int) -> Tensor:
    """What sources y [S, B, C] owe `targets` later positions under taps rho [C, n]: [T, B, C] float64.

    out[j] = sum over i of y[i] rho[first + (S - 1) + j - i], where `first` is the lag from the newest source to the
    oldest target; taps past the end are zero.
    """
    sources, taps = _array(y), _array(rho)
    S, B, C = sources.shape
    out = np.zeros((targets, B, C))
    for j in range(targets):
        for i in range(S):
            lag = first + (S - 1) + j - i
            if lag < taps.shape[1]:
                out[j] += sources[i] * taps[:, lag]
    return torch.from_numpy(out)


def causal_conv_oracle(y: Tensor, rho: Tensor) -> Tensor:
    """z[.., t, c] = sum over i <= t of y[.., i, c] rho[c, t - i] for y [.., L, C], rho [C, n]: [.., L, C] float64."""
    return torch.from_numpy(_causal(_array(y), _array(rho)))


def short_conv_oracle(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """s[t, c] = bias[c] + sum over k of weight[c, taps - 1 - k] u[t - k, c] for u [.., L, C], weight [C, taps]."""
    return torch.from_numpy(_short(_array(u), _array(weight), _array(bias)))


def implicit_filter_oracle(weights: Mapping[str, Tensor], config: Any, n: int) -> Tensor:
    """Taps [C, n] of a sine-MLP filter under an exponential window, tap by tap.

    `weights` are named as in ImplicitFilter's state dict (linears.i.weight, linears.i.bias, freq, out.weight, deltas);
    `config` has length, filter.features, filter.modulate, filter.shift. For tap k: z = [k / (length - 1),
    cos(f_b w), -sin(f_b w)] with w = 2 pi k / length, f = linspace(1e-4, bands - 1, bands), bands = (features - 1) / 2;
    h = sin(freq (W h + b)) for each linear; tap = out h, times exp(-|delta| k / (length - 1)) + shift.
    """
    w = {name: _array(tensor) for name, tensor in weights.items()}
    length, bands = config.length, (config.filter.features - 1) // 2
    if bands > 1:
        frequencies = [1e-4 + b * (bands - 1 - 1e-4) / (bands - 1) for b in range(bands)]
    else:
        frequencies = [1e-4] * bands
    linears = sum(name.startswith("linears.") and name.endswith(".weight") for name in w)
    taps = np.zeros((w["out.weight"].shape[0], n))
    for k in range(n):
        s, angle = k / max(length - 1, 1), 2 * math.pi * k / length
        h = np.array([s] + [math.cos(f * angle) for f in frequencies] + [-math.sin(f * angle) for f in frequencies])
        for i in range(linears):
            h = np.sin(w["freq"] * (w[f"linears.{i}.weight"] @ h + w[f"linears.{i}.bias"]))
        tap = w["out.weight"] @ h
        if config.filter.modulate:
            tap = tap * (np.exp(-s * np.abs(w["deltas"])) + config.filter.shift)
        taps[:, k] = tap
    return torch.from_numpy(taps)


def hyena_oracle(x: Tensor, weights: Mapping[str, Tensor], rho: Tensor, order: int) -> Tensor:
    """The Hyena operator of order N on x [B, L, D] with filters rho [(N - 1) D, n]: [B, L, D] float64.

    u = x W_in^T + b_in; a depthwise short convolution with bias, its last weight on the current token; split into
    x0, .., x_{N-1}, v; for i = N - 1 down to 1, filter o = 0, 1, ..: v <- x_i v, then v <- k_o * v + skip_o v;
    y = (x0 v) W_out^T + b_out. `weights` are named as in Hyena's state dict.
    """
    w = {name: _array(tensor) for name, tensor in weights.items()}
    return torch.from_numpy(_hyena(_array(x), w, _array(rho), order))


def model_oracle(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits [B, L, V] in float64 of a Hyena LanguageModel, from its config and its state dict alone."""
    head = model.state_dict()["embedding.weight" if model.config.tied else "head.weight"]
    return hidden_oracle(model, tokens)[-1] @ torch.from_numpy(_array(head)).T


def hidden_oracle(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    """States [B, L, D] in float64 of a Hyena LanguageModel: its embedding, each block's output, the final norm."""
    config = model.config
    state = dict(model.state_dict())
    w = {name: _array(tensor) for name, tensor in state.items()}
    ids = np.asarray(tokens.cpu())
    x = w["embedding.weight"][ids]
    states = [x]
    for layer in range(config.layers):
        prefix = f"blocks.{layer}."
        block = {name.removeprefix(prefix): array for name, array in w.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): array for name, array in block.items() if name.startswith("mixer.")}
        if config.filter.kind == "explicit":
            rho = mixer["filter.rho"]
        else:
            filter_prefix = prefix + "mixer.filter."
            filter_state = {k.removeprefix(filter_prefix): t for k, t in state.items() if k.startswith(filter_prefix)}
            rho = _array(implicit_filter_oracle(filter_state, config, ids.shape[1]))
        normed = _layer_norm(x, block["norm1.weight"], block["norm1.bias"], config.norm_eps)
        x = x + _hyena(normed, mixer, rho, config.order)
        normed = _layer_norm(x, block["norm2.weight"], block["norm2.bias"], config.norm_eps)
        hidden = _gelu(normed @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
        x = x + hidden @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]
        states.append(x)
    states.append(_layer_norm(x, w["norm.weight"], w["norm.bias"], config.norm_eps))
    return [torch.from_numpy(x) for x in states]


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().to(torch.float64).numpy()


def _causal(y: Array, rho: Array) -> Array:
    z = np.zeros(y.shape)
    taps = rho.T
    for t in range(y.shape[-2]):
        oldest = max(0, t - taps.shape[0] + 1)
        z[..., t, :] = (y[..., oldest : t + 1, :] * taps[: t - oldest + 1][::-1]).sum(-2)
    return z


def _short(u: Array, weight: Array, bias: Array) -> Array:
    taps = weight.shape[-1]
    s = np.zeros(u.shape)
    for t in range(u.shape[-2]):
        s[..., t, :] = bias
        for k in range(min(taps, t + 1)):
            s[..., t, :] += weight[:, taps - 1 - k] * u[..., t - k, :]
    return s


def _hyena(x: Array, w: Mapping[str, Array], rho: Array, order: int) -> Array:
    D = x.shape[-1]
    u = x @ w["in_proj.weight"].T + w["in_proj.bias"]
    s = _short(u, w["short.weight"][:, 0], w["short.bias"])
    gates = [s[..., i * D : (i + 1) * D] for i in range(order)]
    v = s[..., order * D :]
    for o, i in enumerate(range(order - 1, 0, -1)):
        channels = slice(o * D, (o + 1) * D)
        v = gates[i] * v
        v = _causal(v, rho[channels]) + w["skip"][channels] * v
    return (gates[0] * v) @ w["out_proj.weight"].T + w["out_proj.bias"]


def _layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
