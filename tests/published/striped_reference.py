"""Published StripedHyena models written out: random weights under their names, and the logits of their definition.

Float64 numpy, plain sums over positions and modes, no code of the library. The projections keep the published order
of their rows here, and are taken apart after the convolution behind them, as the definition says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

D, HEADS, INNER, MODES, GROUPS = 8, 2, 12, 3, 4
SHORT, MEDIUM = 7, 128


@dataclass(frozen=True)
class Case:
    """One way of publishing: the layout's name, the prefix of its names, its file, and the changes to its config."""

    id: str
    layout: str
    prefix: str = ""
    file: str = "model.safetensors"
    config: dict[str, Any] = field(default_factory=dict)
    head: str | None = None
    frequencies: bool = True


FIRST = {
    "vocab_size": 512, "hidden_size": D, "num_filters": D, "inner_mlp_size": INNER, "attn_layer_idxs": [1],
    "hyena_layer_idxs": [0, 2], "num_layers": 3, "tie_embeddings": True, "short_filter_length": 3,
    "num_attention_heads": HEADS, "proj_groups": 1, "hyena_filter_groups": 1, "split_k0": True,
    "column_split_hyena": True, "column_split": False, "model_parallel_size": 1, "pipe_parallel_size": 1,
    "short_filter_bias": True, "mha_out_proj_bias": True, "qkv_proj_bias": True, "final_norm": True,
    "use_cache": True, "use_flash_attention_2": True, "use_flash_rmsnorm": False, "use_flash_depthwise": False,
    "use_flashfft": False, "inference_mode": False, "prefill_style": "fft", "max_seqlen": 600, "eps": 1e-6,
    "state_size": MODES, "rotary_emb_base": 10000, "smeared_gqa": False, "make_vocab_size_divisible_by": 8,
    "log_intermediate_values": False, "mlp_activation": "gelu", "model_type": "stripedhyena",
    "architectures": ["StripedHyenaModelForCausalLM"], "torch_dtype": "bfloat16", "transformers_version": "4.36.2",
    "use_interpolated_rotary_pos_emb": True, "rotary_emb_scaling_factor": 16,
}  # fmt: skip
SH7B = FIRST | {
    "vocab_size": 40, "attn_layer_idxs": [1, 3], "hyena_layer_idxs": [0, 2, 4], "num_layers": 4, "proj_groups": 2,
    "tie_embeddings": False, "mha_out_proj_bias": False, "qkv_proj_bias": False, "eps": 1e-5, "rotary_emb_base": 500000,
    "mlp_activation": "silu", "use_interpolated_rotary_pos_emb": False, "use_flash_rmsnorm": True, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SECOND = {
    "model_name": "shc-evo2-7b-8k-2T-v2", "vocab_size": 512, "hidden_size": D, "num_filters": D,
    "hcl_layer_idxs": [2], "hcm_layer_idxs": [1], "hcs_layer_idxs": [0, 4], "attn_layer_idxs": [3],
    "hcm_filter_length": MEDIUM, "hcl_filter_groups": D, "hcm_filter_groups": GROUPS, "hcs_filter_groups": GROUPS,
    "hcs_filter_length": SHORT, "num_layers": 5, "short_filter_length": 3, "num_attention_heads": HEADS,
    "short_filter_bias": False, "mlp_init_method": "torch.nn.init.zeros_",
    "mlp_output_init_method": "torch.nn.init.zeros_", "eps": 1e-6, "state_size": MODES, "rotary_emb_base": 10000,
    "rotary_emb_scaling_factor": 128, "use_interpolated_rotary_pos_emb": True, "make_vocab_size_divisible_by": 8,
    "inner_size_multiple_of": 16, "inner_mlp_size": INNER, "log_intermediate_values": False, "proj_groups": 1,
    "hyena_filter_groups": 1, "column_split_hyena": False, "column_split": True, "interleave": True,
    "evo2_style_activations": True, "model_parallel_size": 1, "pipe_parallel_size": 1, "tie_embeddings": True,
    "mha_out_proj_bias": True, "hyena_out_proj_bias": True, "hyena_flip_x1x2": False, "qkv_proj_bias": False,
    "use_fp8_input_projections": True, "max_seqlen": 600, "max_batch_size": 1, "final_norm": True,
    "use_flash_attn": True, "use_flash_rmsnorm": False, "use_flash_depthwise": False, "use_flashfft": False,
    "use_laughing_hyena": False, "inference_mode": True, "tokenizer_type": "CharLevelTokenizer",
    "prefill_style": "fft", "mlp_activation": "gelu", "print_activations": False,
}  # fmt: skip

CASES = (
    Case("evo", "stripedhyena", "backbone.", "model.safetensors.index.json", FIRST),
    Case("evo-thirds", "stripedhyena", "backbone.",
         config={k: v for k, v in FIRST.items() if k not in ("max_seqlen", "inner_mlp_size")}
         | {"column_split_hyena": False, "max_sequence_len": 600, "inner_size_multiple_of": 16, "inner_mlp_size": None},
         frequencies=False),
    Case("sh-7b", "stripedhyena", "", "pytorch-model.bin", SH7B, head="unembed.weight"),
    Case("evo2", "stripedhyena2", "", "evo2_7b.pt", SECOND),
    Case("evo2-flipped-by-head", "stripedhyena2", "", "evo2.pt", frequencies=False, head="unembed.weight",
         config=SECOND | {"hyena_flip_x1x2": True, "column_split_hyena": True, "column_split": False,
                          "qkv_proj_bias": True, "short_filter_bias": True, "hyena_out_proj_bias": False,
                          "evo2_style_activations": False, "tie_embeddings": False}),
    Case("evo2-all-rows", "stripedhyena2", "backbone.",
         config=SECOND | {"hyena_flip_x1x2": True, "column_split_hyena": True, "qkv_proj_bias": True}),
)  # fmt: skip


def operator(config: dict[str, Any], i: int) -> str:
    """What layer i is, by the list that names it."""
    lists = ("attn", "hyena", "hcl", "hcm", "hcs")
    return next(name for name in lists if i in config.get(f"{name}_layer_idxs", ()))


def frequencies(config: dict[str, Any]) -> np.ndarray:
    """Rotary frequencies of half a head."""
    d = config["hidden_size"] // config["num_attention_heads"]
    return 1.0 / config["rotary_emb_base"] ** (np.arange(0, d, 2) / d)


def random_weights(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float64 tensors under published names. Filters reach hundreds of positions; biases are not zero."""
    rng, w, config, P = np.random.default_rng(seed), {}, case.config, case.prefix
    inner = config["inner_mlp_size"] or -(-int(2 * D * 4 / 3) // 16) * 16
    second = "hcl_layer_idxs" in config

    def put(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> None:
        w[P + name] = shift + scale * rng.standard_normal(shape)

    def linear(name: str, out: int, inside: int, bias: bool, scale: float = 1.5) -> None:
        put(f"{name}.weight", out, inside, scale=scale * inside**-0.5)
        if bias:
            put(f"{name}.bias", out, scale=0.3)

    put("embedding_layer.weight", config["vocab_size"], D)
    for i in range(config["num_layers"]):
        layer, kind = f"blocks.{i}.", operator(config, i)
        put(f"{layer}pre_norm.scale", D, scale=0.2, shift=1.0)
        put(f"{layer}post_norm.scale", D, scale=0.2, shift=1.0)
        for n, (out, inside) in enumerate([(inner, D), (inner, D), (D, inner)], 1):
            linear(f"{layer}mlp.l{n}", out, inside, bias=False, scale=1.0)
        if kind == "attn":
            mha, shared = f"{layer}inner_mha_cls.", D // config["proj_groups"]
            linear(f"{mha}Wqkv", D + 2 * shared, D, config["qkv_proj_bias"], scale=2.0)
            linear(f"{mha}out_proj", D, D, config["mha_out_proj_bias"])
            continue
        linear(f"{layer}projections", 3 * D, D, config["qkv_proj_bias"] if second else True)
        linear(f"{layer}out_filter_dense", D, D, config["hyena_out_proj_bias"] if second else True)
        put(f"{layer}filter.short_filter_weight", 3 * D, 1, 3, scale=3**-0.5)
        if config["short_filter_bias"]:
            put(f"{layer}filter.short_filter_bias", 3 * D, scale=0.5)
        if kind != "hcs":
            put(f"{layer}filter.D", D, scale=0.5)
        if kind in ("hcs", "hcm"):
            taps = SHORT if kind == "hcs" else MEDIUM
            put(f"{layer}filter.h", GROUPS, 1, taps, scale=taps**-0.5)
        times = np.exp(rng.uniform(math.log(2), math.log(400), (D, MODES)))
        if kind == "hcl":
            w[f"{P}{layer}filter.log_poles"] = -1 / times[..., None]
            put(f"{layer}filter.residues", D, MODES, scale=0.3)
        if kind == "hyena":
            angle = rng.uniform(0, math.pi, (D, MODES))
            poles = np.exp(-1 / times + 1j * angle)
            w[f"{P}{layer}filter.poles"] = np.stack([poles.real, poles.imag], -1)[:, :, None]
            put(f"{layer}filter.residues", D, MODES, 1, 2, scale=0.3)
    put("norm.scale", D, scale=0.2, shift=1.0)
    if case.head:
        put(case.head, config["vocab_size"], D)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in w.items()}


def stored_frequencies(case: Case) -> dict[str, torch.Tensor]:
    """The buffers of attention layers, in float32 as their module forms them."""
    if not case.frequencies:
        return {}
    values = torch.from_numpy(frequencies(case.config)).float()
    layers = case.config["attn_layer_idxs"]
    return {f"{case.prefix}blocks.{i}.inner_mha_cls.rotary_emb.inv_freq": values.clone() for i in layers}


def logits(case: Case, weights: dict[str, torch.Tensor], ids: list[int]) -> np.ndarray:
    """Logits [L, V] of the published definition."""
    P, config = case.prefix, case.config
    w = {name.removeprefix(P): tensor.double().numpy() for name, tensor in weights.items()}
    x = w["embedding_layer.weight"][ids]
    for i in range(config["num_layers"]):
        layer, kind = f"blocks.{i}.", operator(config, i)
        h = _norm(config, x, w[f"{layer}pre_norm.scale"])
        x = x + (_attention(config, w, layer, h) if kind == "attn" else _hyena(config, w, layer, kind, h))
        h = _norm(config, x, w[f"{layer}post_norm.scale"])
        gate, up = h @ w[f"{layer}mlp.l1.weight"].T, h @ w[f"{layer}mlp.l2.weight"].T
        if not (config.get("evo2_style_activations") and i > 0):
            gate = _gelu(gate) if config["mlp_activation"] == "gelu" else gate / (1 + np.exp(-gate))
        x = x + (gate * up) @ w[f"{layer}mlp.l3.weight"].T
    head = w["unembed.weight" if case.head else "embedding_layer.weight"]
    return _norm(config, x, w["norm.scale"]) @ head.T


def _norm(config: dict[str, Any], x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    eps, length = config["eps"], np.sqrt((x**2).sum(-1, keepdims=True))
    if config["use_flash_rmsnorm"]:
        return scale * x / np.sqrt(length**2 / x.shape[-1] + eps)
    return scale * x / (length * x.shape[-1] ** -0.5 + eps)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _linear(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def _hyena(config: dict[str, Any], w: dict, layer: str, kind: str, x: np.ndarray) -> np.ndarray:
    L = len(x)
    u = _linear(x, w, f"{layer}projections")
    kernel = w[f"{layer}filter.short_filter_weight"][:, 0]
    z = np.zeros_like(u)
    for t in range(L):
        for k in range(min(3, t + 1)):
            z[t] += kernel[:, 2 - k] * u[t - k]
    z += w.get(f"{layer}filter.short_filter_bias", 0.0)
    if config.get("interleave"):
        z = np.concatenate([z[:, 0::3], z[:, 1::3], z[:, 2::3]], 1)
    if config["column_split_hyena"]:
        d = D // HEADS
        heads = [z[:, 3 * d * h : 3 * d * (h + 1)] for h in range(HEADS)]
        x2, x1, v = (np.concatenate([head[:, n * d : (n + 1) * d] for head in heads], 1) for n in range(3))
    else:
        x2, x1, v = z[:, :D], z[:, D : 2 * D], z[:, 2 * D :]
    if config.get("hyena_flip_x1x2"):
        x1, x2 = x2, x1
    y = x1 * v
    h = _taps(w, layer, kind, L)
    out = np.zeros_like(y)
    for t in range(L):
        for k in range(min(t + 1, len(h))):
            out[t] += h[k] * y[t - k]
    if kind != "hcs":
        out += w[f"{layer}filter.D"] * y
    return _linear(x2 * out, w, f"{layer}out_filter_dense")


def _taps(w: dict, layer: str, kind: str, L: int) -> np.ndarray:
    """Taps [n, D]: lag first."""
    F = f"{layer}filter."
    if kind in ("hcs", "hcm"):
        h = np.repeat(w[f"{F}h"][:, 0], D // GROUPS, axis=0).T
        return h[::-1] if kind == "hcs" else h
    t = np.arange(L)[:, None, None]
    if kind == "hcl":
        return (w[f"{F}residues"] * np.exp(w[f"{F}log_poles"][..., 0] * t)).sum(-1)
    poles, residues = (w[F + name][:, :, 0, 0] + 1j * w[F + name][:, :, 0, 1] for name in ("poles", "residues"))
    return (residues * poles**t).real.sum(-1)


def _attention(config: dict[str, Any], w: dict, layer: str, x: np.ndarray) -> np.ndarray:
    L, d, kv_heads = len(x), D // HEADS, HEADS // config["proj_groups"]
    qkv = _linear(x, w, f"{layer}inner_mha_cls.Wqkv")
    if "hcl_layer_idxs" in config and config["column_split"]:
        q, k, v = (qkv.reshape(L, HEADS, 3, d)[:, :, n] for n in range(3))
    else:
        q, k, v = (part.reshape(L, -1, d) for part in np.split(qkv, [HEADS * d, (HEADS + kv_heads) * d], axis=1))
    factor = config["rotary_emb_scaling_factor"] if config["use_interpolated_rotary_pos_emb"] else 1
    angle = np.arange(L)[:, None] / factor * frequencies(config)
    q, k = _turn(q, angle), _turn(k, angle)
    out = np.zeros((L, HEADS, d))
    for t in range(L):
        for h in range(HEADS):
            g = h // (HEADS // kv_heads)
            scores = k[: t + 1, g] @ q[t, h] / math.sqrt(d)
            chances = np.exp(scores - scores.max())
            out[t, h] = chances @ v[: t + 1, g] / chances.sum()
    return _linear(out.reshape(L, -1), w, f"{layer}inner_mha_cls.out_proj")


def _turn(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
