"""Published H3, S4D and MultiHyena models written out: random weights under their names, and the logits they give.

Float64 numpy, direct sums, no code of the library. `Case` says what a layout's config is and which operators it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

D, INNER, VOCAB = 8, 20, 32
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One published model: its layout and config, its operators layer by layer, and what stands before all names."""

    id: str
    layout: str
    config: dict[str, Any]
    operators: tuple[str, ...]
    outer: str = ""
    head: int = 1
    fused: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def setting(self, name: str, default: Any) -> Any:
        return self.settings.get(name, default)


class Draw:
    """Random float64 weights, by name."""

    def __init__(self, seed: int) -> None:
        self.rng, self.w = np.random.default_rng(seed), Weights()

    def put(self, name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> None:
        self.w[name] = shift + scale * self.rng.standard_normal(shape)

    def linear(self, name: str, out: int, inside: int, scale: float = 1.5) -> None:
        self.put(f"{name}.weight", out, inside, scale=scale * inside**-0.5)
        self.put(f"{name}.bias", out, scale=0.2)

    def norm(self, name: str) -> None:
        self.put(f"{name}.weight", D, scale=0.2, shift=1.0)
        self.put(f"{name}.bias", D, scale=0.2)

    def uniform(self, name: str, low: float, high: float, *shape: int) -> None:
        self.w[name] = self.rng.uniform(low, high, shape)


# ------------------------------------------------------------------------------------------------------------- weights


def random_weights(case: Case, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float64 tensors under published names. State spaces forget within 10 to 500 positions."""
    draw = Draw(seed)
    (_draw_savanna if case.layout.startswith("savanna") else _draw_safari)(draw, case, length)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in draw.w.items()}


def _draw_safari(draw: Draw, case: Case, length: int) -> None:
    P = f"{case.outer}backbone."
    draw.put(f"{P}embeddings.word_embeddings.weight", VOCAB, D)
    draw.w[f"{case.outer}lm_head.weight"] = draw.w[f"{P}embeddings.word_embeddings.weight"].copy()
    for i, operator in enumerate(case.operators):
        layer = f"{P}layers.{i}."
        DRAWS[operator](draw, case, f"{layer}mixer.", length)
        draw.norm(f"{layer}norm1")
        draw.norm(f"{layer}norm2")
        draw.linear(f"{layer}mlp.fc1", INNER, D)
        draw.linear(f"{layer}mlp.fc2", D, INNER)
    draw.norm(f"{P}ln_f")


def _draw_savanna(draw: Draw, case: Case, length: int) -> None:
    """Sine networks have small weights: unit ones amplify float32 error."""
    layers, scale = len(case.operators), case.setting("norm", "bias")
    draw.put("sequential.0.word_embeddings.weight", VOCAB, D)
    for i in range(layers):
        layer = f"sequential.{i + 2}."
        _savanna_norm(draw, f"{layer}input_layernorm", scale)
        if case.setting("mlp_norm", True):
            _savanna_norm(draw, f"{layer}pre_mlp_layernorm", scale)
        mixer, filter = f"{layer}attention.", f"{layer}attention.mixer.filter."
        draw.linear(f"{mixer}query_key_value", 3 * D, D)
        draw.put(f"{mixer}hyena_proj_conv.weight", 3 * D, 1, 4, scale=0.5)
        draw.put(f"{mixer}hyena_proj_conv.bias", 3 * D, scale=0.5)
        draw.linear(f"{mixer}dense", D, D)
        draw.put(f"{mixer}mixer.long_conv_bias", D // case.head, scale=0.5)
        k = np.arange(length)[:, None] / length
        z = np.concatenate(
            [k * length / (length - 1), np.cos(2 * math.pi * k * [0, 1]), np.sin(2 * math.pi * k * [0, 1])], 1
        )
        draw.w[f"{filter}pos_emb.z"] = z[None] + 0.01 * draw.rng.standard_normal((1, *z.shape))
        draw.w[f"{filter}pos_emb.t"] = k[None] * length / (length - 1)
        for n, inside in ((0, 5), (2, 6), (4, 6)):
            draw.linear(f"{filter}implicit_filter.{n}", 6, inside, 0.2)
        draw.put(f"{filter}implicit_filter.1.freq", 1, 6, scale=0.5, shift=10.0)
        for copy in ("act.freq", "implicit_filter.3.freq", "implicit_filter.5.freq"):
            draw.w[filter + copy] = draw.w[f"{filter}implicit_filter.1.freq"].copy()
        draw.put(f"{filter}final_filter.weight", D // case.head, 6, scale=0.15)
        draw.put(f"{filter}modulation.weight", 1, 1, D // case.head, scale=1.0, shift=4.0)
        feed = case.setting("feed", "regular")
        if feed == "regular":
            draw.linear(f"{layer}mlp.dense_h_to_4h", 4 * D, D)
            draw.linear(f"{layer}mlp.dense_4h_to_h", D, 4 * D)
        elif feed == "llama":
            for name, out, inside in (("w1", 256, D), ("w3", 256, D), ("w2", D, 256)):
                draw.put(f"{layer}mlp.{name}.weight", out, inside, scale=inside**-0.5)
    _savanna_norm(draw, f"sequential.{layers + 3}.norm", scale)
    if not case.setting("tied", True):
        draw.put(f"sequential.{layers + 4}.final_linear.weight", VOCAB, D)


def _savanna_norm(draw: Draw, name: str, kind: str) -> None:
    if kind == "scale":
        draw.put(f"{name}.scale", D, scale=0.2, shift=1.0)
    else:
        draw.norm(name)


def _draw_h3(draw: Draw, case: Case, mixer: str, length: int) -> None:
    N, H = case.setting("d_state", 6), D // case.head
    copies = case.setting("n_ssm", H)
    for name in ("q_proj", "k_proj", "v_proj", "output_linear"):
        draw.linear(mixer + name, D, D)
    draw.put(f"{mixer}ssm_k_kernel.kernel.B", D, N, scale=0.5)
    draw.put(f"{mixer}ssm_k_kernel.kernel.C", 1, D, N, scale=0.5)
    draw.put(f"{mixer}ssm_k_D", D, scale=0.5)
    kernel = f"{mixer}kernel.kernel."
    draw.uniform(f"{kernel}log_dt", math.log(0.01), math.log(0.2), H)
    draw.put(f"{kernel}C", 1, H, N // 2, 2)
    draw.put(f"{kernel}B", copies, N // 2, 2)
    draw.put(f"{kernel}inv_A_real", copies, N // 2, scale=0.3, shift=math.log(0.4))
    draw.uniform(f"{kernel}A_imag", 0, 10, copies, N // 2)
    draw.put(f"{mixer}D", H, scale=0.5)


def _draw_h3_conv(draw: Draw, case: Case, mixer: str, length: int) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "output_linear"):
        draw.linear(mixer + name, D, D)
    for kernel, skip in (("k_kernel", "k_D"), ("kernel", "D")):
        draw.put(f"{mixer}{kernel}.kernel", 1, D, length, scale=0.2)
        draw.put(mixer + skip, D, scale=0.5)


def _draw_attention(draw: Draw, case: Case, mixer: str, length: int) -> None:
    draw.linear(f"{mixer}Wqkv", 3 * D, D)
    draw.linear(f"{mixer}out_proj", D, D)
    if width := case.setting("rotary", 0):
        draw.w[f"{mixer}rotary_emb.inv_freq"] = 10_000.0 ** (-np.arange(0, width, 2) / width)


def _draw_s4d(draw: Draw, case: Case, mixer: str, length: int) -> None:
    N, copies = case.setting("d_state", 6), case.setting("n_ssm", 1)
    kernel = f"{mixer}kernel.kernel."
    draw.uniform(f"{kernel}log_dt", math.log(0.01), math.log(0.2), D)
    draw.put(f"{kernel}C", 1, D, N // 2, 2)
    draw.put(f"{kernel}log_w_real", copies, N // 2, scale=0.3, shift=math.log(0.4))
    draw.uniform(f"{kernel}w_imag", 0, 10, copies, N // 2)
    draw.put(f"{mixer}D", 1, D, scale=0.5)
    gated = case.setting("postact", None) == "glu"
    draw.linear(f"{mixer}output_linear" + (".0" if gated else ""), 2 * D if gated else D, D)


DRAWS: dict[str, Callable[[Draw, Case, str, int], None]] = {
    "h3": _draw_h3, "h3-conv": _draw_h3_conv, "attention": _draw_attention, "s4d": _draw_s4d,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- definition


def logits(case: Case, weights: dict[str, torch.Tensor], ids: list[int]) -> np.ndarray:
    """Logits [L, V] of the published definition: every sum is formed directly."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    return (_savanna if case.layout.startswith("savanna") else _safari)(case, w, ids)


def _safari(case: Case, w: Weights, ids: list[int]) -> np.ndarray:
    P = f"{case.outer}backbone."
    x = w[f"{P}embeddings.word_embeddings.weight"][ids]
    for i, operator in enumerate(case.operators):
        layer = f"{P}layers.{i}."
        x = x + OPERATORS[operator](case, w, f"{layer}mixer.", _norm(x, w, f"{layer}norm1"))
        h = _linear(_norm(x, w, f"{layer}norm2"), w, f"{layer}mlp.fc1")
        x = x + _linear(_gelu_tanh(h), w, f"{layer}mlp.fc2")
    return _norm(x, w, f"{P}ln_f") @ w[f"{P}embeddings.word_embeddings.weight"].T


def _savanna(case: Case, w: Weights, ids: list[int]) -> np.ndarray:
    layers, feed = len(case.operators), case.setting("feed", "regular")
    x = w["sequential.0.word_embeddings.weight"][ids]
    for i in range(layers):
        layer = f"sequential.{i + 2}."
        x = x + _multi_hyena(case, w, f"{layer}attention.", _any_norm(case, x, w, f"{layer}input_layernorm"))
        h = _any_norm(case, x, w, f"{layer}pre_mlp_layernorm") if case.setting("mlp_norm", True) else x
        if feed == "regular":
            h = _gelu_tanh(_linear(h, w, f"{layer}mlp.dense_h_to_4h"))
            x = x + _linear(h, w, f"{layer}mlp.dense_4h_to_h")
        elif feed == "llama":
            gate = h @ w[f"{layer}mlp.w1.weight"].T
            up = h @ w[f"{layer}mlp.w3.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{layer}mlp.w2.weight"].T
    x = _any_norm(case, x, w, f"sequential.{layers + 3}.norm")
    head = f"sequential.{layers + 4}.final_linear.weight"
    return x @ w["sequential.0.word_embeddings.weight" if case.setting("tied", True) else head].T


def _multi_hyena(case: Case, w: Weights, mixer: str, x: np.ndarray) -> np.ndarray:
    L, d, np_heads = len(x), case.head, case.setting("projections", 4)
    u = _linear(x, w, f"{mixer}query_key_value")
    kernel = w[f"{mixer}hyena_proj_conv.weight"][:, 0]
    padded = np.concatenate([np.zeros((kernel.shape[1] - 1, 3 * D)), u])
    u = w[f"{mixer}hyena_proj_conv.bias"] + sum(padded[j : j + L] * kernel[:, j] for j in range(kernel.shape[1]))
    q, k, v = (u.reshape(L, np_heads, 3, D // np_heads)[:, :, part].reshape(L, D) for part in range(3))
    filter, z = f"{mixer}mixer.filter.", w[f"{mixer}mixer.filter.pos_emb.z"][0]
    for n in (0, 2, 4):
        z = np.sin(w[f"{filter}act.freq"] * _linear(z, w, f"{filter}implicit_filter.{n}"))
    decay = np.exp(-w[f"{filter}pos_emb.t"][0] * np.abs(w[f"{filter}modulation.weight"][0]))
    h = z @ w[f"{filter}final_filter.weight"].T * decay
    y = np.zeros((L, D))
    for c in range(D // d):
        for a in range(d):
            for b in range(d):
                kv = k[:, c * d + a] * v[:, c * d + b]
                long = np.convolve(kv, h[:, c])[:L] + w[f"{mixer}mixer.long_conv_bias"][c] * kv
                y[:, c * d + b] += q[:, c * d + a] * long
    return _linear(y, w, f"{mixer}dense")


def _any_norm(case: Case, x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    if case.setting("norm", "bias") == "bias":
        return _norm(x, w, name)
    return w[f"{name}.scale"] * x / (np.sqrt((x**2).sum(-1, keepdims=True)) / math.sqrt(D) + 1e-6)


def _gelu_tanh(h: np.ndarray) -> np.ndarray:
    return 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def _h3(case: Case, w: Weights, mixer: str, x: np.ndarray) -> np.ndarray:
    q, k, v = (_linear(x, w, mixer + name) for name in ("q_proj", "k_proj", "v_proj"))
    B, C = w[f"{mixer}ssm_k_kernel.kernel.B"], w[f"{mixer}ssm_k_kernel.kernel.C"][0]
    state, shifted = np.zeros_like(B), np.zeros_like(k)
    for t in range(len(x)):
        state = np.concatenate([np.zeros((D, 1)), state[:, :-1]], 1) + B * k[t][:, None]
        shifted[t] = (C * state).sum(1) + w[f"{mixer}ssm_k_D"] * k[t]
    kernel, d = _diagonal(case, w, f"{mixer}kernel.kernel.", len(x)), case.head
    y = np.zeros((len(x), D // d, d))
    for h in range(D // d):
        for a in range(d):
            for b in range(d):
                kv = shifted[:, h * d + a] * v[:, h * d + b]
                z = np.convolve(kv, kernel[h])[: len(x)] + w[f"{mixer}D"][h] * kv
                y[:, h, b] += q[:, h * d + a] * z
    y = y if case.fused else y.transpose(0, 2, 1)
    return _linear(y.reshape(len(x), D), w, f"{mixer}output_linear")


def _diagonal(case: Case, w: Weights, kernel: str, L: int) -> np.ndarray:
    """2 Re sum of C B g p^t [H, L], sampled as the case says."""
    C, B = _complex(w[f"{kernel}C"][0]), _complex(w[f"{kernel}B"])
    A = -np.exp(w[f"{kernel}inv_A_real"]) + 1j * w[f"{kernel}A_imag"]
    taps = np.zeros((len(C), L))
    for h in range(len(C)):
        dt, a, b = np.exp(w[f"{kernel}log_dt"][h]), A[h % len(A)], B[h % len(B)]
        if case.setting("disc", "bilinear") == "zoh":
            p, g = np.exp(dt * a), (np.exp(dt * a) - 1) / a
        else:
            p, g = (1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)
        taps[h] = [2 * (C[h] * b * g * p**t).sum().real for t in range(L)]
    return taps


def _h3_conv(case: Case, w: Weights, mixer: str, x: np.ndarray) -> np.ndarray:
    q, k, v = (_linear(x, w, mixer + name) for name in ("q_proj", "k_proj", "v_proj"))
    k = _convolved(k, _squashed(case, w[f"{mixer}k_kernel.kernel"][0])) + w[f"{mixer}k_D"] * k
    kv = k * v
    y = _convolved(kv, _squashed(case, w[f"{mixer}kernel.kernel"][0])) + w[f"{mixer}D"] * kv
    return _linear(q * y, w, f"{mixer}output_linear")


def _squashed(case: Case, kernel: np.ndarray) -> np.ndarray:
    if window := case.setting("ma_window_len", 0):
        padded = np.pad(kernel, ((0, 0), (window // 2, window // 2)))
        kernel = sum(padded[:, j : j + kernel.shape[1]] for j in range(window)) / window
    return np.sign(kernel) * np.maximum(np.abs(kernel) - case.setting("lam", 0.1), 0)


def _attention(case: Case, w: Weights, mixer: str, x: np.ndarray) -> np.ndarray:
    L, heads, width = len(x), case.setting("heads", 2), case.setting("rotary", 0)
    q, k, v = _linear(x, w, f"{mixer}Wqkv").reshape(L, 3, heads, D // heads).transpose(1, 2, 0, 3)
    angle = np.arange(L)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / max(width, 1))
    q, k = (_turned(y, angle) for y in (q, k))
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(D // heads)
    scores = np.where(np.tril(np.ones((L, L))) > 0, scores, -np.inf)
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    y = chances / chances.sum(-1, keepdims=True) @ v
    return _linear(y.transpose(1, 0, 2).reshape(L, D), w, f"{mixer}out_proj")


def _turned(y: np.ndarray, angle: np.ndarray) -> np.ndarray:
    half = angle.shape[1]
    a, b, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos, rest], -1)


def _s4d(case: Case, w: Weights, mixer: str, x: np.ndarray) -> np.ndarray:
    kernel, L = f"{mixer}kernel.kernel.", len(x)
    A, C = -np.exp(w[f"{kernel}log_w_real"]) + 1j * w[f"{kernel}w_imag"], _complex(w[f"{kernel}C"][0])
    taps = np.zeros((D, L))
    for h in range(D):
        a, dt = A[h % len(A)], np.exp(w[f"{kernel}log_dt"][h])
        taps[h] = [2 * (C[h] * (np.exp(dt * a) - 1) / a * np.exp(dt * a * t)).sum().real for t in range(L)]
    y = _convolved(x, taps) + w[f"{mixer}D"][0] * x
    y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    if case.setting("postact", None) != "glu":
        return _linear(y, w, f"{mixer}output_linear")
    value, gate = np.split(_linear(y, w, f"{mixer}output_linear.0"), 2, axis=1)
    return value / (1 + np.exp(-gate))


OPERATORS: dict[str, Callable[[Case, Weights, str, np.ndarray], np.ndarray]] = {
    "h3": _h3, "h3-conv": _h3_conv, "attention": _attention, "s4d": _s4d,
}  # fmt: skip


def _convolved(y: np.ndarray, taps: np.ndarray) -> np.ndarray:
    return np.stack([np.convolve(y[:, c], taps[c])[: len(y)] for c in range(y.shape[1])], 1)


def _complex(pairs: np.ndarray) -> np.ndarray:
    return pairs[..., 0] + 1j * pairs[..., 1]


def _linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


# --------------------------------------------------------------------------------------------------------------- cases


def _model(layers: int, section: str, **layer: Any) -> dict[str, Any]:
    return {
        "d_model": D, "n_layer": layers, "d_inner": INNER, "vocab_size": 30, "resid_dropout": 0.0,
        "embed_dropout": 0.1, "fused_mlp": False, "residual_in_fp32": True, "pad_vocab_size_multiple": 8,
        section: layer,
    }  # fmt: skip


HYBRID = {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2, "rotary_emb_dim": 2, "use_flash_attn": True}}
H3 = {"d_state": 6, "head_dim": 1, "mode": "diag", "measure": "diag-lin", "lr": 0.001}
SAVANNA = {
    "num_layers": 2, "hidden_size": D, "num_heads": 2, "num_attention_heads": 4, "seq_length": None, "short_conv_L": 4,
    "attention_config": [[["hyena"], 2]], "padded_vocab_size": VOCAB, "hyena_filter_order": 6,
    "hyena_filter_emb_dim": 5, "hyena_filter_w": 14, "use_hyena_filter": True, "use_fast_heads": False,
    "use_slow_heads": True, "norm": "layernorm", "prenorm": True, "postnorm": False, "identity_mlp": False,
    "pos_emb": "none", "bias_gelu_fusion": True, "precision": "bfloat16", "optimizer": {"type": "Adam"},
}  # fmt: skip
CASES = (
    Case("h3-hybrid", "h3", _model(3, "ssm_cfg", mode="diag", measure="diag-lin", d_state=6) | HYBRID,
         ("h3", "attention", "h3"), settings={"rotary": 2}),
    Case("safari-h3", "safari-h3", _model(2, "layer", _name_="h3", **H3), ("h3", "h3"), "model."),
    Case("safari-h3-heads-fused", "safari-h3",
         _model(2, "layer", _name_="h3", **H3 | {"head_dim": 2, "use_fast_fftconv": True}), ("h3", "h3"), head=2),
    Case("safari-h3-heads", "safari-h3",
         _model(2, "layer", _name_="h3", **H3 | {"head_dim": 4, "n_ssm": 1, "disc": "zoh", "l_max": 300}),
         ("h3", "h3"), head=4, fused=False, settings={"n_ssm": 1, "disc": "zoh"}),
    Case("safari-h3-conv", "safari-h3-conv", _model(2, "layer", _name_="h3-conv", lam=0.003, l_max=None),
         ("h3-conv", "h3-conv"), settings={"lam": 0.003}),
    Case("safari-h3-conv-hybrid", "safari-h3-conv",
         _model(2, "layer", _name_="h3-conv", use_ma_smoothing=True, ma_window_len=5, l_max=None)
         | {"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2}},
         ("attention", "h3-conv"), settings={"ma_window_len": 5}),
    Case("safari-s4d", "safari-s4d",
         _model(2, "layer", _name_="s4d", d_state=6, transposed=False, return_state=False), ("s4d", "s4d")),
    Case("safari-s4d-glu", "safari-s4d",
         _model(2, "layer", _name_="s4d", d_state=6, transposed=False, postact="glu", n_ssm=4), ("s4d", "s4d"),
         "model.", settings={"postact": "glu", "n_ssm": 4}),
    Case("multi-hyena", "savanna-multi-hyena", SAVANNA | {"pre_mlp_norm": True}, ("multi-hyena",) * 2, head=4),
    Case("multi-hyena-bare", "savanna-multi-hyena-bare",
         SAVANNA | {"identity_mlp": True, "num_heads": 4, "num_attention_heads": 8}, ("multi-hyena",) * 2, head=2,
         settings={"feed": "none", "mlp_norm": False, "projections": 8}),
    Case("multi-hyena-unnormed", "savanna-multi-hyena-bare", SAVANNA, ("multi-hyena",) * 2, head=4,
         settings={"mlp_norm": False}),
    Case("multi-hyena-llama", "savanna-multi-hyena",
         SAVANNA | {"pre_mlp_norm": True, "norm": "rmsnorm", "rms_norm_epsilon": 1e-6, "mlp_type": "llama",
                    "activation": "silu", "no_weight_tying": True, "bias_gelu_fusion": False},
         ("multi-hyena",) * 2, head=4, settings={"norm": "scale", "feed": "llama", "tied": False}),
)  # fmt: skip


def config_of(case: Case, length: int) -> dict[str, Any]:
    """The config.json of a model of some length."""
    if "seq_length" in case.config:
        return case.config | {"seq_length": length}
    layer = case.config.get("layer", {})
    return case.config | {"layer": layer | {"l_max": length}} if "l_max" in layer else case.config
