"""safari's LongConv and SGConv's GConv written out: random weights under their names, logits by direct float64 sums."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from published_laws import Arrays, Publication

D, INNER, LAYERS, VOCAB = 8, 20, 2, 32


def config(layer: dict[str, Any], length: int) -> dict[str, Any]:
    """A config.json with the operator's settings."""
    return {
        "d_model": D, "n_layer": LAYERS, "d_inner": INNER, "vocab_size": 30, "resid_dropout": 0.0,
        "embed_dropout": 0.1, "fused_mlp": False, "residual_in_fp32": True, "pad_vocab_size_multiple": 8,
        "layer": layer | {"l_max": length},
    }  # fmt: skip


LONG = {"_name_": "long-conv", "lam": 0.02, "causal": True, "kernel_dropout": 0.2, "bidirectional": False,
        "activation": "gelu", "postact": "glu", "initializer": None, "weight_norm": False, "verbose": True}  # fmt: skip
GCONV = {"_name_": "gconv", "d_state": 64, "kernel_dim": 4, "bidirectional": False, "mode": "cat_randn",
         "decay_min": 2, "decay_max": 2, "lr": 0.001, "dropout": 0.0, "transposed": False}  # fmt: skip


def scales(layer: dict[str, Any], length: int) -> int:
    """How many pieces a GConv filter has."""
    given = 1 + math.ceil(math.log2(length / layer["kernel_dim"])) - layer.get("init_scale", 0)
    return layer.get("n_scales") or given


def weights(layer: dict[str, Any], head: bool, length: int) -> Arrays:
    """Float64 arrays under published names, biases not zero, filters that reach far."""
    rng, w, c = np.random.default_rng(0), {}, layer.get("channels", 1)

    def put(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> None:
        w[name] = shift + scale * rng.standard_normal(shape)

    def linear(name: str, out: int, inside: int, gain: float = 4.0) -> None:
        put(f"{name}.weight", out, inside, scale=gain * inside**-0.5)
        put(f"{name}.bias", out, scale=0.2)

    def norm(name: str) -> None:
        put(f"{name}.weight", D, scale=0.2, shift=1.0)
        put(f"{name}.bias", D, scale=0.2)

    put("backbone.embeddings.word_embeddings.weight", VOCAB, D)
    if head:
        w["lm_head.weight"] = w["backbone.embeddings.word_embeddings.weight"].copy()
    for i in range(LAYERS):
        block, mixer = f"backbone.layers.{i}.", f"backbone.layers.{i}.mixer."
        norm(f"{block}norm1")
        norm(f"{block}norm2")
        linear(f"{block}mlp.fc1", INNER, D)
        linear(f"{block}mlp.fc2", D, INNER)
        put(f"{mixer}D", c, D, scale=0.5)
        act = layer.get("postact")
        linear(f"{mixer}output_linear" + (".0" if act else ""), 2 * D if act == "glu" else D, c * D)
        if layer["_name_"] == "long-conv":
            put(f"{mixer}kernel.kernel", c, D, length, scale=2 * length**-0.5)
            continue
        for n in range(scales(layer, length)):
            put(f"{mixer}kernel_list.{n}", c, D, layer["kernel_dim"])
        w[f"{mixer}multiplier"] = np.linspace(layer["decay_min"], layer["decay_max"], D).reshape(1, D, 1)
        put(f"{mixer}kernel_norm", c, D, 1, scale=0.3, shift=3.0)
        w[f"{mixer}kernel_norm_initialized"] = np.array(True)
    norm("backbone.ln_f")
    return w


def logits(layer: dict[str, Any], w: Arrays, ids: list[int]) -> np.ndarray:
    """Logits [L, V] of the definition."""
    x = w["backbone.embeddings.word_embeddings.weight"][ids]
    for i in range(LAYERS):
        block = f"backbone.layers.{i}."
        x = x + _mixer(layer, w, f"{block}mixer.", _norm(x, w, f"{block}norm1"))
        h = _linear(_norm(x, w, f"{block}norm2"), w, f"{block}mlp.fc1")
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + _linear(h, w, f"{block}mlp.fc2")
    return _norm(x, w, "backbone.ln_f") @ w["backbone.embeddings.word_embeddings.weight"].T


def _mixer(layer: dict[str, Any], w: Arrays, mixer: str, u: np.ndarray) -> np.ndarray:
    L, c = len(u), layer.get("channels", 1)
    k = _kernel(layer, w, mixer) if layer["_name_"] == "long-conv" else _pieces(layer, w, mixer, L)
    y = np.stack(
        [np.convolve(u[:, h], k[a, h, :L])[:L] + w[f"{mixer}D"][a, h] * u[:, h] for a in range(c) for h in range(D)], 1
    )
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    y = _linear(y, w, f"{mixer}output_linear" + (".0" if layer.get("postact") else ""))
    return y[:, :D] * 0.5 * (1 + np.tanh(y[:, D:] / 2)) if layer.get("postact") == "glu" else y


def _kernel(layer: dict[str, Any], w: Arrays, mixer: str) -> np.ndarray:
    """Averaged over a window, zeros beyond the ends, then squashed."""
    k = w[f"{mixer}kernel.kernel"]
    if layer.get("use_ma_smoothing"):
        half = layer["ma_window_len"] // 2
        padded = np.pad(k, ((0, 0), (0, 0), (half, half)))
        k = sum(padded[..., s : s + k.shape[2]] for s in range(2 * half + 1)) / (2 * half + 1)
    return np.sign(k) * np.maximum(np.abs(k) - layer["lam"], 0)


def _pieces(layer: dict[str, Any], w: Arrays, mixer: str, L: int) -> np.ndarray:
    """Pieces stretched tap by tap, laid one behind the other or over each other, zeros behind."""
    c, P, first = layer.get("channels", 1), layer["kernel_dim"], layer.get("init_scale", 0)
    S = sum(name.startswith(f"{mixer}kernel_list.") for name in w)
    k, at = np.zeros((c, D, max(L, P << (first + S)))), 0
    for n in range(S):
        scale = 2 ** (first + (n if "sum" in layer["mode"] else max(n - 1, 0)))
        piece = w[f"{mixer}kernel_list.{n}"] * w[f"{mixer}multiplier"] ** (S - 1 - n)
        for j in range(P * scale):
            if "nearest" in layer["mode"]:
                tap = piece[..., j // scale]
            else:
                place = max((j + 0.5) / scale - 0.5, 0.0)
                left = min(int(place), P - 1)
                right = min(left + 1, P - 1)
                tap = piece[..., left] + (place - left) * (piece[..., right] - piece[..., left])
            k[..., at + j] += tap
        at += P * scale if "cat" in layer["mode"] else 0
    return k[..., :L] / w[f"{mixer}kernel_norm"]


def _linear(x: np.ndarray, w: Arrays, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(x: np.ndarray, w: Arrays, name: str) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def case(id: str, layout: str, layer: dict[str, Any], head: bool = True) -> Publication:
    """A model whose operator has these settings."""
    return Publication(
        id, layout, VOCAB, ("tiles",) * LAYERS, partial(config, layer), partial(weights, layer, head),
        partial(logits, layer), "pytorch_model.bin", () if head else ("lm_head.weight",),
    )  # fmt: skip


CASES = (
    case("long-conv", "safari-long-conv", LONG),
    case("long-conv-2-heads-smoothed", "safari-long-conv",
         LONG | {"channels": 2, "use_ma_smoothing": True, "ma_window_len": 5, "lam": 0.01}, head=False),
    case("long-conv-linear", "safari-long-conv", LONG | {"postact": "id", "channels": 3}),
    case("sgconv", "sgconv", GCONV),
    case("sgconv-sum-2-heads-glu", "sgconv",
         GCONV | {"mode": "sum_randn", "channels": 2, "postact": "glu", "decay_max": 3, "decay_min": 1.5}),
    case("sgconv-nearest-short", "sgconv",
         GCONV | {"mode": "cat_cos_nearest", "init_scale": 1, "n_scales": 3, "postact": "id", "channels": 3}, False),
)  # fmt: skip
