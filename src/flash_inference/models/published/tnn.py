"""Toeplitz neural networks as fairseq saves their language models.

fairseq keeps its settings in the checkpoint; here they are expected as config.json, an object with the names of its
arguments, and `vocab_size`, the size of its dictionary. The embedding is scaled by the root of the width unless
`no_scale_embedding` is set. Sources: github.com/OpenNLPLab/Tnn, github.com/Doraemonzzz/tnn-pytorch, fairseq.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from flash_inference.filters.rpe import ACTIVATIONS
from flash_inference.models.hyena import FilterConfig
from flash_inference.models.published.layout import Layout, Rename, View
from flash_inference.models.published.safari import pair
from flash_inference.models.published.settings import Settings
from flash_inference.models.tnn import NORMS, TNNConfig
from flash_inference.models.tokens import TOKENIZER

EMBEDDING, HEAD, LAST_NORM = "decoder.embed_tokens.weight", "decoder.output_projection.weight", "decoder.layer_norm"
TRAINING = (
    "arch", "task", "data", "dropout", "attention_dropout", "activation_dropout", "relu_dropout", "glu_dropout",
    "decoder_layerdrop", "quant_noise_pq", "quant_noise_pq_block_size", "tokens_per_sample", "activation_fn",
    "decoder_ffn_embed_dim", "model_type", "architectures", "torch_dtype",
)  # fmt: skip
ABSENT = "this library computes the model without it"
LENGTH = "taps then depend on the length of the input, so that no step could keep its past"


def _renames(config: TNNConfig, names: Collection[str]) -> list[Rename]:
    layer, ours = "decoder.layers.{i}.", "blocks.{i}."
    unit, rpe = f"{layer}self_attn.", f"{layer}self_attn.toep.rpe."
    options = config.filter.options
    table = [Rename("embedding.weight", (EMBEDDING,), (HEAD,) if config.tied else ())]
    table += [] if config.tied else [Rename("head.weight", (HEAD,))]
    for name, published in (("value", "v_proj"), ("gate", "u_proj"), ("out", "o")):
        table += pair(f"{ours}mixer.{name}", f"{unit}{published}")
    for name, published in (("gate", "l1"), ("up", "l2"), ("down", "l3")):
        table += pair(f"{ours}mlp.{name}", f"{layer}glu.{published}")
    table += pair(f"{ours}mixer.filter.embed", f"{rpe}pos_proj") + pair(f"{ours}mixer.filter.out", f"{rpe}out.2")
    for n in range(options["layers"]):
        table += pair(f"{ours}mixer.filter.linears.{n}", f"{rpe}layers.{n}.2")
    if options["decay"] != "none":
        gamma = View(lambda t: t.flatten(), lambda t: t.reshape(config.heads, 1, -1))
        table.append(Rename(f"{ours}mixer.filter.gamma", (f"{unit}toep.gamma",), view=gamma))
    if config.norm == "layernorm":
        table += pair(f"{ours}norm1", f"{layer}self_attn_layer_norm") + pair(f"{ours}norm2", f"{layer}final_layer_norm")
        places = [f"layers.{n}.0" for n in range(options["layers"])] + ["out.0"]
        for n, place in enumerate(places):
            table += pair(f"{ours}mixer.filter.norms.{n}", f"{rpe}{place}")
    return table + (pair("norm", LAST_NORM) if config.last_norm == "layernorm" else [])


def _tnn(settings: Settings, tensors: Mapping[str, Tensor]) -> TNNConfig:
    settings.ignore(*TRAINING)
    width = settings.integer("decoder_embed_dim")
    settings.only("it is the width of the model", decoder_input_dim=width, decoder_output_dim=width)
    settings.only(ABSENT, adaptive_input=False, character_embeddings=False, adaptive_softmax_cutoff=None)
    settings.only(ABSENT, tie_adaptive_weights=False, no_token_positional_embeddings=True, layernorm_embedding=False)
    settings.only(ABSENT, decoder_normalize_before=True, no_decoder_final_norm=False, bias=True, fina_act="None")
    settings.only(ABSENT, use_norm=False, resi_param=False)
    settings.only("this library generates from causal convolutions", causal=True)
    settings.only(LENGTH, par_type=1)
    settings.only("it divides by a convolution of ones, which may vanish", normalize=False)
    norm = settings.word("norm_type", {name: name for name in NORMS}, None)
    heads = settings.integer("decoder_attention_heads", 1)
    scaled = not settings.flag("no_scale_embedding", False)
    tied = settings.flag("share_decoder_input_output_embed", True)
    if tied and HEAD not in tensors:
        settings.notes.append("the head is not stored; it is the embedding, as in the published code")
    config = TNNConfig(
        vocab_size=settings.integer("vocab_size"),
        width=width,
        layers=settings.integer("decoder_layers"),
        length=settings.integer("max_target_positions"),
        heads=heads,
        expanded=_expanded(settings, width, heads),
        inner=_inner(settings, width),
        activation=settings.word("act_fun", {name: name for name in ACTIVATIONS}, "silu"),
        mlp_activation=settings.word("glu_act", {name: name for name in ACTIVATIONS}, "silu"),
        norm=norm,
        # fairseq's own decoder ends in a LayerNorm; TNN's may end in the norm of its layers.
        last_norm="layernorm" if f"{LAST_NORM}.weight" in tensors else norm,
        filter=FilterConfig("relative", options=_filter(settings, norm)),
        embedding_scale=0.0 if scaled else 1.0,
        tied=tied,
        tokens=TOKENIZER,
    )
    settings.notes.append("filters are defined at every lag; the model runs as many positions as max_target_positions")
    return config


def _expanded(settings: Settings, width: int, heads: int) -> int:
    """The width of the convolutions, rounded down to whole heads."""
    ratio = settings.number("expand_ratio", 3.0, "expand_ratio is not given; the published default 3 was used")
    expanded = int(ratio * width) // heads * heads
    if expanded == 0:
        raise settings.error("expand_ratio", ratio, f"so much that {heads} heads have a channel each")
    return expanded


def _inner(settings: Settings, width: int) -> int:
    """The MLP's width: -1 stands for the model's."""
    value = settings.integer("glu_dim", width, least=-1)
    if value == 0:
        raise settings.error("glu_dim", value, "a width, or -1 for the model's")
    return width if value == -1 else value


def _filter(settings: Settings, norm: str) -> dict[str, Any]:
    fixed, learned = settings.flag("use_decay", False), settings.flag("use_multi_decay", False)
    if fixed and learned:
        raise settings.error("use_multi_decay", learned, "false beside use_decay: a decay is constant or learned")
    return {
        "width": settings.integer("rpe_embedding", 64),
        "layers": settings.integer("rpe_layers", 6),
        "activation": settings.word("rpe_act", {name: name for name in ACTIVATIONS}, "relu"),
        "norm": norm,
        "connection": "residual" if settings.flag("residual", False) else "plain",
        "decay": "fixed" if fixed else "learned" if learned else "none",
        "gamma": settings.number("gamma", 0.99, ""),
        "final": settings.word("act_type", {name: name for name in ACTIVATIONS}, "none"),
    }


def _is_tnn(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return "decoder_embed_dim" in config and any(".toep.rpe." in name for name in names)


LAYOUTS = (
    Layout("tnn", "a fairseq language model of Toeplitz networks", _is_tnn, _tnn, _renames,
           ignored=re.compile(r"decoder\.version|.*\._extra_state|decoder\.embed_positions\._float_tensor")),
)  # fmt: skip
