"""MultiHyena language models as savanna trains them (`use_slow_heads`).

Layer i of the model is place i + 2 of a pipeline; its tensors are read from one state dict, "sequential.N.". What no
file states: projections are laid out (head, query | key | value) by `num_attention_heads`, while heads of filters are
`num_heads`; every layer has norms, and an operator a short filter, that nothing uses: these are passed over.
Sources: github.com/Zymrael/savanna (model/hyena.py, model/transformer.py, model/gpt2_model.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from flash_inference.models.hyena import FilterConfig
from flash_inference.models.multi_hyena import MultiHyenaConfig
from flash_inference.models.published.layout import Layout, Rename, axes, swapped
from flash_inference.models.published.safari import pair
from flash_inference.models.published.settings import Settings
from flash_inference.models.tokens import TOKENIZER

OPERATOR = "this library computes the heads of MultiHyena as savanna's `use_slow_heads` has them"
BLOCK = "this library computes savanna's blocks with a norm before the operator"
TRAINING = (
    "pipe_parallel_size", "make_vocab_size_divisible_by", "max_position_embeddings", "log_attn_norms", "init_method",
    "output_layer_init_method", "output_layer_parallelism", "optimizer", "min_lr", "zero_optimization", "precision",
    "bf16", "fp16", "hidden_dropout", "attention_dropout", "weight_decay", "gradient_clipping", "bias_dropout_fusion",
    "scaled_upper_triang_masked_softmax_fusion", "hyena_filter_wd", "hyena_filter_w", "hyena_filter_omega_0",
    "hyena_filter_fast_decay", "hyena_filter_slow_decay", "checkpoint_activations", "checkpoint_num_layers",
    "train_iters", "use_long_conv1d", "vocab_size", "tokenizer_type", "save", "load",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------- the rename table


def _renames(config: MultiHyenaConfig, names: Collection[str]) -> list[Rename]:
    heads = swapped(config.projections, 3)
    table = [Rename("embedding.weight", ("sequential.0.word_embeddings.weight",))]
    if not config.tied:
        table.append(Rename("head.weight", (f"sequential.{config.layers + 4}.final_linear.weight",)))
    table += _norm(config.norm, "norm", f"sequential.{config.layers + 3}.norm")
    for i in range(config.layers):
        layer, ours = f"sequential.{i + 2}.", f"blocks.{i}."
        mixer, inner = f"{layer}attention.", f"{ours}mixer."
        table += _norm(config.norm, f"{ours}norm1", f"{layer}input_layernorm")
        for name, published in (("in_proj", "query_key_value"), ("short", "hyena_proj_conv")):
            for part in ("weight", "bias"):
                table.append(Rename(f"{inner}{name}.{part}", (f"{mixer}{published}.{part}",), view=heads))
        table += pair(f"{inner}out_proj", f"{mixer}dense")
        table += _filter(config, f"{inner}filter.", f"{mixer}mixer.filter.")
        table.append(Rename(f"{inner}skip", (f"{mixer}mixer.long_conv_bias",), float32=True))
        if config.feed != "none":
            table += _norm(config.mlp_norm, f"{ours}norm2", f"{layer}pre_mlp_layernorm")
            table += _mlp(config, f"{ours}mlp.", f"{layer}mlp.")
    return table


def _norm(kind: str, ours: str, published: str) -> list[Rename]:
    if kind == "none":
        return []
    return pair(ours, published) if kind == "layer" else [Rename(f"{ours}.weight", (f"{published}.scale",))]


def _mlp(config: MultiHyenaConfig, ours: str, published: str) -> list[Rename]:
    if config.feed == "gelu-tanh":
        return pair(f"{ours}fc1", f"{published}dense_h_to_4h") + pair(f"{ours}fc2", f"{published}dense_4h_to_h")
    parts = (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    return [Rename(f"{ours}{name}.weight", (f"{published}{theirs}.weight",)) for name, theirs in parts]


def _filter(config: MultiHyenaConfig, ours: str, published: str) -> list[Rename]:
    inner, network = config.filter.inner, f"{published}implicit_filter."
    copies = (f"{published}act.freq", *(f"{network}{2 * n + 1}.freq" for n in range(1, inner + 1)))
    table = [
        Rename(f"{ours}linears.{n}.{part}", (f"{network}{2 * n}.{part}",), float32=True)
        for n in range(inner + 1)
        for part in ("weight", "bias")
    ]
    return [
        *table,
        Rename(f"{ours}freq", (f"{network}1.freq",), copies, axes(1), float32=True),
        Rename(f"{ours}out.weight", (f"{published}final_filter.weight",), float32=True),
        Rename(f"{ours}z", (f"{published}pos_emb.z",), view=axes(1), float32=True),
        Rename(f"{ours}t", (f"{published}pos_emb.t",), view=axes(1, 1), float32=True),
        Rename(f"{ours}deltas", (f"{published}modulation.weight",), view=axes(2), float32=True),
    ]


# -------------------------------------------------------------------------------------------------------- the settings


def _multi_hyena(settings: Settings, tensors: Mapping[str, Tensor]) -> MultiHyenaConfig:
    settings.ignore(*TRAINING)
    settings.only("pieces of several devices are not joined here", model_parallel_size=1)
    settings.only(
        OPERATOR, use_slow_heads=True, use_fast_heads=False, use_hyena_filter=True, hyena_filter_cls="implicit"
    )
    settings.only(OPERATOR, normalize_hyena_filters=False, hyena_pos_emb="fourier_fixed", proj_groups=1)
    settings.only(OPERATOR, gating_act="identity", use_mup=False)
    settings.only(BLOCK, prenorm=True, postnorm=False, outer_mlp_norm=False, gpt_j_residual=False, safe=False)
    layers, width = settings.integer("num_layers"), settings.integer("hidden_size")
    settings.only("all layers are Hyena operators here", attention_config=[[["hyena"], layers]], pos_emb="none")
    norm = {"layernorm": "layer", "rmsnorm": "rms"}[settings.choice("norm", ("layernorm", "rmsnorm"), "layernorm")]
    eps = "layernorm_epsilon" if norm == "layer" else "rms_norm_epsilon"
    default = 1e-5 if norm == "layer" else 1e-8
    feed, inner = _feed(settings, width)
    normed = settings.flag("pre_mlp_norm", False)
    config = MultiHyenaConfig(
        vocab_size=settings.integer("padded_vocab_size"),
        width=width,
        layers=layers,
        length=settings.integer("seq_length"),
        heads=settings.divisor("num_heads", width, 8),
        projections=settings.divisor("num_attention_heads", width),
        inner=inner,
        short_taps=settings.integer("short_conv_L"),
        filter=FilterConfig(
            width=settings.integer("hyena_filter_order", 16),
            features=settings.odd("hyena_filter_emb_dim", 33),
            inner=settings.integer("hyena_filter_num_inner_mlps", 2),
            positions="stored",
        ),
        feed=feed,
        norm=norm,
        mlp_norm=norm if normed and feed != "none" else "none",
        norm_eps=settings.number(eps, default, f"{eps} is not given; the published default {default} was used"),
        tied=not settings.flag("no_weight_tying", False),
        tokens=TOKENIZER,
    )
    settings.ignore("layernorm_epsilon", "rms_norm_epsilon")
    return config


def _feed(settings: Settings, width: int) -> tuple[str, int]:
    """What follows an operator, and how wide it is."""
    if settings.flag("identity_mlp", False):
        settings.ignore("mlp_type", "activation", "bias_gelu_fusion")
        return "none", 0
    if settings.choice("mlp_type", ("regular", "llama"), "regular") == "regular":
        settings.only("an MLP's gelu is the fused one here, in its tanh form", activation="gelu", bias_gelu_fusion=True)
        return "gelu-tanh", 4 * width
    settings.ignore("bias_gelu_fusion")
    return f"gated-{settings.choice('activation', ('gelu', 'silu'), 'gelu')}", -(-int(8 * width / 3) // 256) * 256


# --------------------------------------------------------------------------------------------------------- the layouts

UNUSED = r".*(\._extra_state|\.(post_attention|outer_mlp)_layernorm\.(weight|bias|scale)|\.mixer\.short_conv_weight)"
BARE = UNUSED.replace("outer_mlp", "outer_mlp|pre_mlp")


def _is_multi_hyena(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return bool(config.get("use_slow_heads")) and any(".mixer.filter.implicit_filter." in name for name in names)


def _is_normed(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return _is_multi_hyena(config, names) and bool(config.get("pre_mlp_norm")) and not config.get("identity_mlp")


def _is_bare(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return _is_multi_hyena(config, names) and not _is_normed(config, names)


LAYOUTS = (
    Layout("savanna-multi-hyena", "savanna's MultiHyena, a norm before each MLP", _is_normed, _multi_hyena, _renames,
           ignored=re.compile(UNUSED)),
    Layout("savanna-multi-hyena-bare", "savanna's MultiHyena, no norm before MLPs", _is_bare, _multi_hyena, _renames,
           ignored=re.compile(BARE)),
)  # fmt: skip
