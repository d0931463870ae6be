"""Published Hyena models written out: random weights under their names, and the logits that their definition gives.

Float64 numpy, direct sums, no code of the library. `Case` says how a family spells its names and what it assumes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

D, F, INNER, EMB, LAYERS = 8, 6, 20, 5, 2


@dataclass(frozen=True)
class Case:
    """One way of publishing: the layout's name, its config, and how names are spelled."""

    id: str
    layout: str
    backbone: str = "backbone."
    norm: str = "ln_f"
    wrap: str = ""
    head: str | None = "lm_head.weight"
    order: int = 2
    order_major: bool = True
    shift: float = 0.05
    modulate: bool = True
    stored: bool = True
    tied: bool = True
    taps: int = 3
    vocab: int = 16
    flat: bool = False
    config: dict[str, Any] = field(default_factory=dict)


def _original(vocab: int, length: str = "l_max", **layer: Any) -> dict[str, Any]:
    settings = {"_name_": "hyena", "emb_dim": EMB, "filter_order": F, "l_max": None, "modulate": True, "w": 10,
                "lr": 6e-4, "wd": 0.0, "lr_pos_emb": 0.0}  # fmt: skip
    return {
        "d_model": D, "n_layer": LAYERS, "d_inner": INNER, "vocab_size": vocab, "resid_dropout": 0.0,
        "embed_dropout": 0.1, "fused_mlp": False, "residual_in_fp32": True, "pad_vocab_size_multiple": 8,
        "layer": settings | layer,
    }  # fmt: skip


HF = {
    "d_model": D, "n_layer": LAYERS, "d_inner": INNER, "vocab_size": 12, "max_seq_len": None, "emb_dim": EMB,
    "filter_order": F, "hyena_order": 2, "short_filter_order": 3, "num_inner_mlps": 2, "activation_freq": 10,
    "train_freq": True, "use_bias": True, "embed_dropout": 0.1, "hyena_dropout": 0.0, "hyena_filter_dropout": 0.0,
    "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "pad_vocab_size_multiple": 8, "model_type": "hyenadna",
    "architectures": ["HyenaDNAForCausalLM"], "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.35.0", "auto_map": {"AutoConfig": "configuration_hyena.HyenaConfig"},
}  # fmt: skip
MULTIMOLECULE = {
    "vocab_size": 11, "hidden_size": D, "num_hidden_layers": LAYERS, "intermediate_size": INNER,
    "embedding_dropout": 0.1, "hidden_dropout": 0.0, "max_position_embeddings": None, "initializer_range": 0.02,
    "layer_norm_eps": 1e-5, "hyena_order": 2, "filter_order": F, "short_filter_order": 4, "filter_emb_dim": EMB,
    "num_inner_mlps": 2, "activation_freq": 10, "filter_dropout": 0.0, "use_bias": True, "train_freq": True,
    "pad_vocab_size_multiple": 8, "head": None, "model_type": "hyenadna", "tie_word_embeddings": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 3, "mask_token_id": 4,
    "null_token_id": 5, "architectures": ["HyenaDnaForCausalLM"],
}  # fmt: skip
SAFARI = {"vocab": 32, "shift": 0.0}
SAFARI_CONFIG = _original(30, short_filter_order=3, num_inner_mlps=2)

CASES = (
    Case("hyenadna", "hyenadna", head=None, config=_original(12)),
    Case("hyenadna-lightning", "hyenadna", "model.backbone.", head="model.lm_head.weight", config=_original(12)),
    Case("hyenadna-checkpointed", "hyenadna", "model.backbone.", wrap=".layer", head="model.lm_head.weight",
         config=_original(12, local_order=3) | {"checkpoint_mixer": True, "checkpoint_mlp": True}),
    Case("hyenadna-shifted", "hyenadna", head=None, shift=0.3, config=_original(12, shift=0.3)),
    Case("hyenadna-hf", "hyenadna-hf", "hyena.backbone.", tied=False, flat=True, config=HF),
    Case("hyenadna-hf-tied", "hyenadna-hf", "hyena.backbone.", head=None, flat=True,
         config=HF | {"tie_word_embeddings": True}),
    Case("multimolecule", "hyenadna-multimolecule", "model.", "final_layer_norm", stored=False, taps=4, flat=True,
         config=MULTIMOLECULE),
    Case("safari", "safari-hyena", config=SAFARI_CONFIG, **SAFARI),
    Case("safari-plain-window", "safari-hyena", modulate=False, taps=5, **SAFARI,
         config=_original(30, modulate=False, short_filter_order=5)),
    Case("safari-order-3", "safari-hyena", order=3, order_major=False, **SAFARI,
         config=_original(30, order=3) | {"layout": "safari-hyena"}),
    Case("safari-order-4-standalone", "safari-hyena-standalone", order=4, **SAFARI,
         config=_original(30, order=4) | {"layout": "safari-hyena-standalone"}),
)  # fmt: skip


def config_of(case: Case, length: int) -> dict[str, Any]:
    """The config.json of a model of some length."""
    if case.flat:
        name = "max_seq_len" if "max_seq_len" in case.config else "max_position_embeddings"
        return case.config | {name: length}
    return case.config | {"layer": case.config["layer"] | {"l_max": length}}


def positions(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features z, times t, and decay rates as a fresh model has them."""
    k = np.arange(length)[:, None]
    bands = np.linspace(1e-4, (EMB - 1) // 2 - 1, (EMB - 1) // 2)[None]
    t = k / (length - 1)
    phase = bands * 2 * math.pi * k / length
    return (
        np.concatenate([t, np.cos(phase), -np.sin(phase)], 1),
        t,
        np.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, D),
    )


def random_weights(case: Case, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float64 tensors under published names. Sine networks have small weights: unit ones amplify float32 error."""
    rng, w = np.random.default_rng(seed), {}

    def put(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> None:
        w[name] = shift + scale * rng.standard_normal(shape)

    def linear(name: str, out: int, inside: int, scale: float = 1.5, bias: bool = True) -> None:
        put(f"{name}.weight", out, inside, scale=scale * inside**-0.5)
        if bias:
            put(f"{name}.bias", out, scale=0.2)

    def norm(name: str) -> None:
        put(f"{name}.weight", D, scale=0.2, shift=1.0)
        put(f"{name}.bias", D, scale=0.2)

    N, P = case.order, case.backbone
    put(f"{P}embeddings.word_embeddings.weight", case.vocab, D)
    for i in range(LAYERS):
        layer = f"{P}layers.{i}."
        mixer, mlp = f"{layer}mixer{case.wrap}.", f"{layer}mlp{case.wrap}."
        filter_fn = f"{mixer}filter_fn."
        linear(f"{mixer}in_proj", (N + 1) * D, D)
        linear(f"{mixer}out_proj", D, D)
        put(f"{mixer}short_filter.weight", (N + 1) * D, 1, case.taps, scale=case.taps**-0.5)
        put(f"{mixer}short_filter.bias", (N + 1) * D, scale=0.5)
        put(f"{filter_fn}bias", (N - 1) * D, scale=0.5)
        linear(f"{filter_fn}implicit_filter.0", F, EMB, 0.2)
        linear(f"{filter_fn}implicit_filter.2", F, F, 0.2)
        linear(f"{filter_fn}implicit_filter.4", F, F, 0.2)
        linear(f"{filter_fn}implicit_filter.6", (N - 1) * D, F, 0.3, bias=False)
        put(f"{filter_fn}implicit_filter.1.freq", 1, F, scale=0.5, shift=10.0)
        for copy in () if case.id == "hyenadna-hf" else (3, 5):
            w[f"{filter_fn}implicit_filter.{copy}.freq"] = w[f"{filter_fn}implicit_filter.1.freq"].copy()
        if case.stored:
            z, t, _ = positions(length)
            w[f"{filter_fn}pos_emb.z"] = z[None] + 0.01 * rng.standard_normal((1, *z.shape))
            w[f"{filter_fn}pos_emb.t"] = t[None]
            put(f"{filter_fn}modulation.deltas", 1, 1, (N - 1) * D, scale=2.0, shift=6.0)
        norm(f"{layer}norm1")
        norm(f"{layer}norm2")
        linear(f"{mlp}fc1", INNER, D)
        linear(f"{mlp}fc2", D, INNER)
    norm(f"{P}{case.norm}")
    if case.head:
        if case.tied:
            w[case.head] = w[f"{P}embeddings.word_embeddings.weight"].copy()
        else:
            put(case.head, case.vocab, D)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in w.items()}


def logits(case: Case, weights: dict[str, torch.Tensor], length: int, ids: list[int]) -> np.ndarray:
    """Logits [L, V] of the published definition: every sum is formed directly."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    N, P, L = case.order, case.backbone, len(ids)
    embedding = w[f"{P}embeddings.word_embeddings.weight"]
    x = embedding[ids]
    for i in range(LAYERS):
        layer = f"{P}layers.{i}."
        mixer, mlp = f"{layer}mixer{case.wrap}.", f"{layer}mlp{case.wrap}."
        x = x + _hyena(case, w, mixer, _norm(x, w, f"{layer}norm1"), length, N, L)
        h = _linear(_norm(x, w, f"{layer}norm2"), w, f"{mlp}fc1")
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + _linear(h, w, f"{mlp}fc2")
    head = embedding if case.head is None or case.tied else w[case.head]
    return _norm(x, w, f"{P}{case.norm}") @ head.T


def _hyena(case: Case, w: dict, mixer: str, x: np.ndarray, length: int, N: int, L: int) -> np.ndarray:
    u = _linear(x, w, f"{mixer}in_proj")
    kernel, bias = w[f"{mixer}short_filter.weight"][:, 0], w[f"{mixer}short_filter.bias"]
    taps = kernel.shape[1]
    padded = np.concatenate([np.zeros((taps - 1, u.shape[1])), u])
    s = bias + sum(padded[j : j + L] * kernel[:, j] for j in range(taps))
    *gates, v = np.split(s, N + 1, axis=1)
    h, skip = _filter(case, w, f"{mixer}filter_fn.", length)[:L], w[f"{mixer}filter_fn.bias"]
    if case.order_major:
        h, skip = h.reshape(L, N - 1, D), skip.reshape(N - 1, D)
    else:
        h, skip = h.reshape(L, D, N - 1).transpose(0, 2, 1), skip.reshape(D, N - 1).T
    for o in range(N - 1):
        v = gates[N - 1 - o] * v
        conv = np.stack([np.convolve(v[:, c], h[:, o, c])[:L] for c in range(D)], 1)
        v = conv + skip[o] * v
    return _linear(gates[0] * v, w, f"{mixer}out_proj")


def _filter(case: Case, w: dict, filter_fn: str, length: int) -> np.ndarray:
    z, t, deltas = positions(length)
    if case.stored:
        z, t = w[f"{filter_fn}pos_emb.z"][0], w[f"{filter_fn}pos_emb.t"][0]
        deltas = w[f"{filter_fn}modulation.deltas"][0, 0]
    h = z
    for n in (0, 2, 4):
        h = np.sin(w[f"{filter_fn}implicit_filter.1.freq"] * _linear(h, w, f"{filter_fn}implicit_filter.{n}"))
    h = h @ w[f"{filter_fn}implicit_filter.6.weight"].T
    return h * (np.exp(-t * np.abs(deltas)) + case.shift) if case.modulate else h


def _linear(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]
