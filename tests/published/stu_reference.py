"""Flash STU written out: random weights under its names, logits by direct sums in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from published_laws import Arrays, Publication

D, VOCAB = 8, 32

BASE: dict[str, Any] = {
    "model_type": "FlashSTU", "bsz": 1, "n_embd": D, "n_heads": 2, "n_layers": 4, "window_size": 20,
    "vocab_size": VOCAB, "mlp_scale": 3, "bias": False, "dropout": 0.0, "num_eigh": 5, "use_hankel_L": False,
    "use_flash_fft": True, "use_approx": True, "use_attn": True, "softcap": 50.0, "torch_dtype": "bfloat16",
    "hidden_size": D, "intermediate_size": 3 * D, "hidden_act": "swish", "tie_word_embeddings": True,
    "stu_enable_mlp_sandwich": False, "stu_mlp_hidden_size": None, "architectures": ["FlashSTU"],
    "transformers_version": "4.46.0",
}  # fmt: skip


def config(settings: dict[str, Any], length: int) -> dict[str, Any]:
    """The config.json of a model of some length."""
    return BASE | settings | {"seq_len": length}


def attends(c: dict[str, Any], layer: int) -> bool:
    """Whether a layer is attention."""
    return c["use_attn"] and layer % 2 == 1


def weights(settings: dict[str, Any], length: int) -> Arrays:
    """Float64 arrays under published names."""
    c, rng, w = BASE | settings, np.random.default_rng(0), {}
    K, H, inner = c["num_eigh"], c["stu_mlp_hidden_size"] if c["stu_enable_mlp_sandwich"] else D, c["mlp_scale"] * D

    def put(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> None:
        w[name] = shift + scale * rng.standard_normal(shape)

    put("tok_emb.weight", VOCAB, D)
    w["phi"] = rng.standard_normal((length, K)) * (1 + np.arange(length)[:, None]) ** -0.5
    for i in range(c["n_layers"]):
        layer = f"layers.{i}."
        put(f"{layer}mlp_norm.weight", D, scale=0.2, shift=1.0)
        put(f"{layer}mlp.gate_proj.weight", inner, D, scale=2 * D**-0.5)
        put(f"{layer}mlp.up_proj.weight", inner, D, scale=2 * D**-0.5)
        put(f"{layer}mlp.down_proj.weight", D, inner, scale=2 * inner**-0.5)
        if attends(c, i):
            put(f"{layer}attn_norm.weight", D, scale=0.2, shift=1.0)
            put(f"{layer}attn.c_attn.weight", 3 * D, D, scale=3 * D**-0.5)
            put(f"{layer}attn.c_proj.weight", D, D, scale=3 * D**-0.5)
            continue
        put(f"{layer}stu_norm.weight", D, scale=0.2, shift=1.0)
        if c["stu_enable_mlp_sandwich"]:
            put(f"{layer}stu_mlp_in_proj.weight", H, D, scale=2 * D**-0.5)
            put(f"{layer}stu_mlp_out_proj.weight", D, H, scale=2 * H**-0.5)
        if c["use_approx"]:
            put(f"{layer}stu.M_inputs", H, H, scale=H**-0.5)
            put(f"{layer}stu.M_filters", K, H, scale=K**-0.5)
        else:
            put(f"{layer}stu.M_phi_plus", K, H, H, scale=(K * H) ** -0.5)
            if not c["use_hankel_L"]:
                put(f"{layer}stu.M_phi_minus", K, H, H, scale=(K * H) ** -0.5)
    put("norm.weight", D, scale=0.2, shift=1.0)
    return w


def logits(settings: dict[str, Any], w: Arrays, ids: list[int]) -> np.ndarray:
    """Logits [L, V] of the definition."""
    c = BASE | settings
    x = w["tok_emb.weight"][ids]
    for i in range(c["n_layers"]):
        layer = f"layers.{i}."
        if attends(c, i):
            x = x + _attention(c, w, f"{layer}attn.", _norm(x, w[f"{layer}attn_norm.weight"]))
        else:
            h = _norm(x, w[f"{layer}stu_norm.weight"])
            if c["stu_enable_mlp_sandwich"]:
                h = h @ w[f"{layer}stu_mlp_in_proj.weight"].T
                h = _unit(c, w, f"{layer}stu.", h / (1 + np.exp(-h)))
                x = x + h @ w[f"{layer}stu_mlp_out_proj.weight"].T
            else:
                x = x + _unit(c, w, f"{layer}stu.", h)
        h = _norm(x, w[f"{layer}mlp_norm.weight"])
        gate, up = (h @ w[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        if c.get("mlp_activation") == "silu":
            gate = 0.5 * gate * (1 + np.tanh(gate / 2))
        else:
            gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        x = x + (gate * up) @ w[f"{layer}mlp.down_proj.weight"].T
    return _norm(x, w["norm.weight"]) @ w["tok_emb.weight"].T


def _unit(c: dict[str, Any], w: Arrays, stu: str, u: np.ndarray) -> np.ndarray:
    """Both branches, each by its own sums: the minus branch alternates the signs of inputs and of outputs."""
    L, phi, K = len(u), w["phi"], c["num_eigh"]
    sign = np.where(np.arange(L) % 2, -1.0, 1.0)[:, None]
    if c["use_approx"]:
        x, k = u @ w[f"{stu}M_inputs"], phi @ w[f"{stu}M_filters"]
        plus, minus = _depthwise(x, k), sign * _depthwise(sign * x, k)
        return plus if c["use_hankel_L"] else plus + minus
    y = np.zeros_like(u)
    for n in range(K):
        k = np.repeat(phi[:, n : n + 1], u.shape[1], 1)
        y += _depthwise(u, k) @ w[f"{stu}M_phi_plus"][n]
        if not c["use_hankel_L"]:
            y += (sign * _depthwise(sign * u, k)) @ w[f"{stu}M_phi_minus"][n]
    return y


def _depthwise(x: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.stack([np.convolve(x[:, d], k[: len(x), d])[: len(x)] for d in range(x.shape[1])], 1)


def _attention(c: dict[str, Any], w: Arrays, attn: str, x: np.ndarray) -> np.ndarray:
    """Head by head: scores capped, lowered by a quarter of ALiBi's slopes, over `window_size` earlier positions."""
    L, heads = len(x), c["n_heads"]
    q, k, v = np.split(x @ w[f"{attn}c_attn.weight"].T, 3, axis=1)
    distance = np.arange(L)[:, None] - np.arange(L)
    seen, width, outputs = (distance >= 0) & (distance <= c["window_size"]), D // heads, []
    for head, slope in enumerate(SLOPES[heads]):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        scores = c["softcap"] * np.tanh(scores / c["softcap"]) - 0.25 * slope * distance
        chances = np.exp(np.where(seen, scores, -np.inf))
        outputs.append(chances / chances.sum(1, keepdims=True) @ v[:, part])
    return np.concatenate(outputs, 1) @ w[f"{attn}c_proj.weight"].T


SLOPES = {2: (2**-4, 2**-8), 4: (2**-2, 2**-4, 2**-6, 2**-8), 1: (2**-8,)}


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def case(id: str, **settings: Any) -> Publication:
    """A model with some settings changed."""
    c = BASE | settings
    decodes = tuple("KV cache" if attends(c, i) else "tiles" for i in range(c["n_layers"]))
    return Publication(
        id, "flash-stu", VOCAB, decodes, partial(config, settings), partial(weights, settings),
        partial(logits, settings), shared=("lm_head.weight",),
    )  # fmt: skip


CASES = (
    case("stu"),
    case("stu-units-alone", use_attn=False, mlp_activation="silu", n_layers=3, num_eigh=7),
    case("stu-hankel-l", use_hankel_L=True, n_layers=2, n_heads=4, window_size=400, softcap=3.0),
    case("stu-exact", use_approx=False, n_layers=3, num_eigh=3),
    case("stu-exact-hankel-l", use_approx=False, use_hankel_L=True, n_layers=2, num_eigh=3, n_heads=1),
    case("stu-sandwich", stu_enable_mlp_sandwich=True, stu_mlp_hidden_size=11, n_layers=3),
)
