"""fairseq's TNN language models written out: random weights under their names, logits by direct sums in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from published_laws import Arrays, Publication

D, F, VOCAB, LAYERS = 8, 6, 32, 2

BASE: dict[str, Any] = {
    "arch": "tnn_decay_99_pre", "task": "language_modeling", "vocab_size": VOCAB, "decoder_embed_dim": D,
    "decoder_input_dim": D, "decoder_output_dim": D, "decoder_ffn_embed_dim": 32, "decoder_layers": LAYERS,
    "decoder_attention_heads": 1, "decoder_normalize_before": True, "share_decoder_input_output_embed": True,
    "no_token_positional_embeddings": True, "dropout": 0.1, "act_fun": "silu", "causal": True, "expand_ratio": 3,
    "use_norm": False, "norm_type": "simplermsnorm", "use_decay": True, "gamma": 0.99, "rpe_embedding": F,
    "rpe_layers": 2, "residual": False, "glu_act": "silu", "glu_dim": 10,
}  # fmt: skip


def config(settings: dict[str, Any], length: int) -> dict[str, Any]:
    """The config.json of a model of some length."""
    return BASE | settings | {"max_target_positions": length}


def weights(settings: dict[str, Any], last_norm: bool, length: int) -> Arrays:
    """Float64 arrays under published names."""
    c, rng, w = BASE | settings, np.random.default_rng(0), {}
    heads, inner = c["decoder_attention_heads"], D if c["glu_dim"] == -1 else c["glu_dim"]
    E = int(c["expand_ratio"] * D) // heads * heads

    def put(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> None:
        w[name] = shift + scale * rng.standard_normal(shape)

    def linear(name: str, out: int, inside: int, gain: float = 2.0) -> None:
        put(f"{name}.weight", out, inside, scale=gain * inside**-0.5)
        put(f"{name}.bias", out, scale=0.2 * gain)

    def norm(name: str, width: int) -> None:
        put(f"{name}.weight", width, scale=0.2, shift=1.0)
        put(f"{name}.bias", width, scale=0.2)

    put("decoder.embed_tokens.weight", VOCAB, D)
    if c["share_decoder_input_output_embed"]:
        w["decoder.output_projection.weight"] = w["decoder.embed_tokens.weight"].copy()
    else:
        put("decoder.output_projection.weight", VOCAB, D)
    for i in range(LAYERS):
        layer = f"decoder.layers.{i}."
        rpe = f"{layer}self_attn.toep.rpe."
        for name in ("u_proj", "v_proj"):
            linear(f"{layer}self_attn.{name}", E, D)
        linear(f"{layer}self_attn.o", D, E, 3.0)
        for name in ("l1", "l2"):
            linear(f"{layer}glu.{name}", inner, D)
        linear(f"{layer}glu.l3", D, inner, 3.0)
        linear(f"{rpe}pos_proj", F, 1)
        for n in range(c["rpe_layers"]):
            linear(f"{rpe}layers.{n}.2", F, F)
        linear(f"{rpe}out.2", E, F, 0.3)
        if c.get("use_multi_decay"):
            put(f"{layer}self_attn.toep.gamma", heads, 1, E // heads)
        elif c["use_decay"]:
            w[f"{layer}self_attn.toep.gamma"] = np.full((heads, 1, E // heads), c["gamma"])
        if c["norm_type"] == "layernorm":
            norm(f"{layer}self_attn_layer_norm", D)
            norm(f"{layer}final_layer_norm", D)
            for place in (*(f"layers.{n}.0" for n in range(c["rpe_layers"])), "out.0"):
                norm(f"{rpe}{place}", F)
    if last_norm:
        norm("decoder.layer_norm", D)
    return w


def logits(settings: dict[str, Any], w: Arrays, ids: list[int]) -> np.ndarray:
    """Logits [L, V] of the definition."""
    c = BASE | settings
    scale = 1.0 if c.get("no_scale_embedding") else math.sqrt(D)
    x = scale * w["decoder.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        layer = f"decoder.layers.{i}."
        x = x + _unit(c, w, f"{layer}self_attn.", _norm(x, w, f"{layer}self_attn_layer_norm"))
        h = _norm(x, w, f"{layer}final_layer_norm")
        gate = _act(c["glu_act"], _linear(h, w, f"{layer}glu.l1"))
        x = x + _linear(gate * _linear(h, w, f"{layer}glu.l2"), w, f"{layer}glu.l3")
    return _norm(x, w, "decoder.layer_norm") @ w["decoder.output_projection.weight"].T


def _unit(c: dict[str, Any], w: Arrays, unit: str, x: np.ndarray) -> np.ndarray:
    L, E = len(x), w[f"{unit}u_proj.bias"].size
    u, v = (_act(c["act_fun"], _linear(x, w, f"{unit}{name}_proj")) for name in ("u", "v"))
    t = _position_network(c, w, f"{unit}toep.rpe.", np.arange(L)[:, None] * 1.0)
    if f"{unit}toep.gamma" in w:
        gamma = w[f"{unit}toep.gamma"].reshape(-1)
        if c.get("use_multi_decay"):
            gamma = c["gamma"] + (1 - c["gamma"]) / (1 + np.exp(-gamma))
        t = gamma ** np.arange(L)[:, None] * t
    t = _act(c.get("act_type", "none"), t)
    mixed = np.stack([np.convolve(v[:, e], t[:, e])[:L] for e in range(E)], 1)
    return _linear(u * mixed, w, f"{unit}o")


def _position_network(c: dict[str, Any], w: Arrays, rpe: str, k: np.ndarray) -> np.ndarray:
    x = _linear(k, w, f"{rpe}pos_proj")
    for n in range(c["rpe_layers"]):
        y = _linear(_act(c.get("rpe_act", "relu"), _norm(x, w, f"{rpe}layers.{n}.0")), w, f"{rpe}layers.{n}.2")
        x = x + y if c["residual"] else y
    return _linear(_act(c.get("rpe_act", "relu"), _norm(x, w, f"{rpe}out.0")), w, f"{rpe}out.2")


def _act(name: str, x: np.ndarray) -> np.ndarray:
    if name == "silu":
        return x * 0.5 * (1 + np.tanh(x / 2))
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return {"relu": lambda: np.maximum(x, 0), "none": lambda: x, "sigmoid": lambda: 0.5 * (1 + np.tanh(x / 2))}[name]()


def _linear(x: np.ndarray, w: Arrays, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(x: np.ndarray, w: Arrays, name: str) -> np.ndarray:
    """LayerNorm where it has weights, else the root mean square alone."""
    if f"{name}.weight" not in w:
        return x / (np.linalg.norm(x, axis=-1, keepdims=True) / math.sqrt(x.shape[-1]) + 1e-8)
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def case(id: str, last_norm: bool = True, **settings: Any) -> Publication:
    """A model with some settings changed, ending in a LayerNorm or in the norm of its layers."""
    return Publication(
        id, "tnn", VOCAB, ("tiles",) * LAYERS, partial(config, settings), partial(weights, settings, last_norm),
        partial(logits, settings), "checkpoint.pt", ("output_projection.weight",),
    )  # fmt: skip


CASES = (
    case("tnn"),
    case("tnn-plain-end", last_norm=False, no_scale_embedding=True, use_decay=False, rpe_layers=1, act_type="sigmoid"),
    case("tnn-layernorm-heads", norm_type="layernorm", decoder_attention_heads=3, rpe_act="silu", residual=True),
    case("tnn-learned-decay", use_decay=False, use_multi_decay=True, gamma=0.9, decoder_attention_heads=2,
         share_decoder_input_output_embed=False, expand_ratio=1.7, glu_dim=-1, glu_act="gelu"),
)  # fmt: skip
