"""Published Hyena language models: HyenaDNA in its three forms, and safari's Hyena.

One operator, one filter: what differs is spelling, defaults, and what is stored. What no file states: the window's
shift is 0.05 in HyenaDNA's published code and 0.0 in safari's; above order 2 safari lays the filter's channels out as
(channel, order), its standalone file as (order, channel).
Sources: github.com/HazyResearch/safari, github.com/HazyResearch/hyena-dna, the model cards of LongSafari/hyenadna-*.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from flash_inference.models.hyena import FilterConfig, HyenaConfig
from flash_inference.models.published.layout import Layout, Rename, axes, swapped
from flash_inference.models.published.safari import (
    EPS,
    backbone,
    backbone_renames,
    padded,
    pair,
    prefix,
    tell_of_head,
    text,
    without_attention,
)
from flash_inference.models.published.settings import TRANSFORMERS, Settings

DNA_VOCABULARY, MULTIMOLECULE_VOCABULARY = 12, 11
CAUSAL = "this library generates from causal Hyena operators of one head and one block"


# ---------------------------------------------------------------------------------------------------- the rename table


def _renames(config: HyenaConfig, backbone: str, norm: str, mixer: str, mlp: str, head: str) -> list[Rename]:
    """Our names and published ones, for a backbone's prefix, its last norm, and what wraps mixers and MLPs."""
    layer, ours = f"{backbone}layers.{{i}}.", "blocks.{i}."
    filter_fn, last = f"{layer}{mixer}filter_fn.", 2 * config.filter.inner + 2
    sines = tuple(f"{filter_fn}implicit_filter.{2 * n + 1}.freq" for n in range(config.filter.inner + 1))
    table = backbone_renames(backbone, head, norm=norm, mlp=mlp, tied=config.tied)
    for name, published in (("in_proj", "in_proj"), ("short", "short_filter"), ("out_proj", "out_proj")):
        table += pair(f"{ours}mixer.{name}", f"{layer}{mixer}{published}")
    for n in range(config.filter.inner + 1):
        table += pair(f"{ours}mixer.filter.linears.{n}", f"{filter_fn}implicit_filter.{2 * n}")
    return [
        *table,
        Rename(f"{ours}mixer.filter.freq", sines[:1], sines[1:], axes(1)),
        Rename(f"{ours}mixer.filter.out.weight", (f"{filter_fn}implicit_filter.{last}.weight",)),
        Rename(f"{ours}mixer.filter.z", (f"{filter_fn}pos_emb.z",), view=axes(1)),
        Rename(f"{ours}mixer.filter.t", (f"{filter_fn}pos_emb.t",), view=axes(1, 1)),
        Rename(f"{ours}mixer.filter.deltas", (f"{filter_fn}modulation.deltas",), view=axes(2)),
        Rename(f"{ours}mixer.skip", (f"{filter_fn}bias",)),
    ]


def _original_renames(config: HyenaConfig, names: Collection[str]) -> list[Rename]:
    """The names of the training code: under "model." in a Lightning checkpoint, ".layer." where it was checkpointed."""
    outer = prefix(names)
    mixer = "mixer.layer." if any(".mixer.layer." in name for name in names) else "mixer."
    mlp = "mlp.layer." if any(".mlp.layer." in name for name in names) else "mlp."
    return _renames(config, f"{outer}backbone.", "ln_f", mixer, mlp, f"{outer}lm_head.weight")


def _channel_major_renames(config: HyenaConfig, names: Collection[str]) -> list[Rename]:
    """As `_original_renames`, with the filter's channels laid out (channel, order)."""
    lanes = swapped(config.width, config.order - 1)
    laid = ("mixer.filter.out.weight", "mixer.filter.deltas", "mixer.skip")
    return [
        dataclasses.replace(rename, view=rename.view.then(lanes)) if rename.ours.endswith(laid) else rename
        for rename in _original_renames(config, names)
    ]


def _hf_renames(config: HyenaConfig, names: Collection[str]) -> list[Rename]:
    return _renames(config, "hyena.backbone.", "ln_f", "mixer.", "mlp.", "lm_head.weight")


def _multimolecule_renames(config: HyenaConfig, names: Collection[str]) -> list[Rename]:
    """A sine module of its own at every place, and positions, times and decay rates rebuilt rather than stored."""
    table: list[Rename] = []
    for rename in _renames(config, "model.", "final_layer_norm", "mixer.", "mlp.", "lm_head.weight"):
        if rename.ours.endswith("filter.freq"):
            rename = dataclasses.replace(rename, published=rename.published + rename.optional, optional=())
        elif rename.ours.endswith("filter.deltas"):
            rename = Rename(rename.ours, (), build=lambda: _decay_rates(config.width))
        if not rename.ours.endswith(("filter.z", "filter.t")):
            table.append(rename)
    return table


def _decay_rates(channels: int) -> Tensor:
    """Decay rates that a folder does not hold: windows reach 1% between 0.3 and 1.5 of the length."""
    return torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, channels, dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- the settings


def _original(settings: Settings, vocab: int, *, orders: range, shorts: range, shift: float) -> HyenaConfig:
    """The config of the training code, with the operator's settings under "layer"."""
    outer = backbone(settings, vocab)
    without_attention(settings)
    layer = settings.section("layer")
    layer.ignore("lr", "wd", "lr_pos_emb", "w", "dropout", "filter_dropout", "fused_bias_fc", "fused_fft_conv")
    layer.ignore("jit_filter", "return_state", "use_flashfftconv", "modulation_lr", "layer_idx", "verbose")
    layer.ignore("fast_decay_pct", "slow_decay_pct", "target")
    layer.only(CAUSAL, _name_="hyena", bidirectional=False, num_heads=1, num_blocks=1, inner_factor=1, channels=1)
    layer.only(CAUSAL, outer_mixing=False, post_order_ffn=False, activation="id", filter_cls="hyena-filter")
    layer.only("filters are not normalised over their channels here", normalized=False)
    layer.only("frequencies and the skip term are read from the tensors", train_freq=True, bias=True, use_bias=True)
    layer.only("it is the width of the model", d_model=outer["width"])
    modulate = layer.flag("modulate", True)
    window = f"the window's shift is stored nowhere; {shift} was used, as in the published code (layer.shift sets it)"
    config = HyenaConfig(
        **outer,
        length=layer.integer("l_max"),
        order=layer.within("order", orders, 2, "of this layout"),
        short_taps=layer.within("short_filter_order", shorts, 3, "of this layout, whose code has no other"),
        filter=FilterConfig(
            width=layer.integer("filter_order", 64),
            features=layer.odd("emb_dim", 3),
            inner=layer.integer("num_inner_mlps", 2),
            modulate=modulate,
            shift=layer.number("shift", shift, window if modulate else ""),
            positions="stored",
        ),
    )
    layer.only("it is another word for short_filter_order", local_order=config.short_taps)
    layer.finish()
    return config


def _hyenadna(settings: Settings, tensors: Mapping[str, Tensor]) -> HyenaConfig:
    vocab = settings.integer("vocab_size")
    config = _original(settings, vocab, orders=range(2, 3), shorts=range(3, 4), shift=0.05)
    tell_of_head(settings, tensors)
    return dataclasses.replace(config, **_dna(settings, vocab))


def _safari(settings: Settings, tensors: Mapping[str, Tensor], shorts: range = range(1, 65)) -> HyenaConfig:
    vocab = settings.integer("vocab_size")
    config = _original(settings, vocab, orders=range(2, 65), shorts=shorts, shift=0.0)
    tell_of_head(settings, tensors)
    return dataclasses.replace(config, **text(vocab))


def _safari_standalone(settings: Settings, tensors: Mapping[str, Tensor]) -> HyenaConfig:
    return _safari(settings, tensors, shorts=range(3, 4))


def _hf(settings: Settings, tensors: Mapping[str, Tensor]) -> HyenaConfig:
    """The flat config of the transformers port."""
    settings.ignore("embed_dropout", "hyena_dropout", "hyena_filter_dropout", "activation_freq", *TRANSFORMERS)
    # The port gives the skip term its bias whatever this says.
    settings.ignore("use_bias")
    settings.only("frequencies are read from the tensors", train_freq=True)
    settings.only("the port's blocks have 1e-5, whatever the config says", layer_norm_epsilon=EPS)
    width, vocab = settings.integer("d_model"), settings.integer("vocab_size")
    return HyenaConfig(
        vocab_size=padded(vocab, settings.integer("pad_vocab_size_multiple", 8)),
        width=width,
        layers=settings.integer("n_layer"),
        length=settings.integer("max_seq_len"),
        order=settings.within("hyena_order", range(2, 3), 2, "of this port, whose filters have no room for more"),
        inner=settings.integer("d_inner", 4 * width),
        short_taps=settings.within("short_filter_order", range(3, 4), 3, "of this port, which pads for no other"),
        filter=_filter(settings, "emb_dim", 3, "stored"),
        tied=_tie(settings, tensors),
        **_dna(settings, vocab),
    )


def _multimolecule(settings: Settings, tensors: Mapping[str, Tensor]) -> HyenaConfig:
    settings.ignore("embedding_dropout", "hidden_dropout", "filter_dropout", "activation_freq", "use_bias")
    settings.ignore(*TRANSFORMERS)
    settings.only("frequencies are read from the tensors", train_freq=True)
    width, vocab = settings.integer("hidden_size"), settings.integer("vocab_size")
    if vocab != MULTIMOLECULE_VOCABULARY:
        raise settings.error("vocab_size", vocab, f"{MULTIMOLECULE_VOCABULARY}, its special tokens and A, C, G, T, N")
    return HyenaConfig(
        vocab_size=padded(vocab, settings.integer("pad_vocab_size_multiple", 8)),
        width=width,
        layers=settings.integer("num_hidden_layers"),
        length=settings.integer("max_position_embeddings"),
        order=settings.within("hyena_order", range(2, 3), 2, "of this port, whose filters have no room for more"),
        inner=settings.integer("intermediate_size", 4 * width),
        short_taps=settings.integer("short_filter_order", 3),
        filter=_filter(settings, "filter_emb_dim", 5, "rebuilt"),
        norm_eps=settings.number("layer_norm_eps", EPS, ""),
        tied=_tie(settings, tensors),
        tokens="dna-multimolecule",
        start_token=1,
        stop_tokens=(2,),
        pad_token=0,
    )


def _filter(settings: Settings, features: str, default: int, positions: str) -> FilterConfig:
    """The filter of the two ports to transformers."""
    settings.notes.append("the window's shift is stored nowhere; 0.05 was used, as in the published code")
    return FilterConfig(
        width=settings.integer("filter_order", 64),
        features=settings.odd(features, default),
        inner=settings.integer("num_inner_mlps", 2),
        shift=0.05,
        positions=positions,
    )


def _dna(settings: Settings, vocab: int) -> dict[str, Any]:
    """HyenaDNA's letters and special tokens."""
    if vocab != DNA_VOCABULARY:
        raise settings.error("vocab_size", vocab, f"{DNA_VOCABULARY}, HyenaDNA's letters and special tokens")
    settings.notes.append("text begins with [CLS], as the original tokenizer writes it; no [SEP] is put behind it")
    return {"tokens": "dna", "start_token": 0, "stop_tokens": (1,), "pad_token": 4}


def _tie(settings: Settings, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head is the embedding: as the config says."""
    tied = settings.flag("tie_word_embeddings", True)
    if tied:
        tell_of_head(settings, tensors)
    return tied


# --------------------------------------------------------------------------------------------------------- the layouts


def _is_original(config: Mapping[str, Any], names: Collection[str]) -> bool:
    # Other operators of safari stand in the same backbone; those of Hyena have a network for their filter.
    return isinstance(config.get("layer"), dict) and any(
        "backbone.layers." in name and ".filter_fn." in name for name in names
    )


def _is_dna(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return _is_original(config, names) and config.get("vocab_size") == DNA_VOCABULARY


def _is_safari(config: Mapping[str, Any], names: Collection[str]) -> bool:
    vocab = config.get("vocab_size")
    return _is_original(config, names) and isinstance(vocab, int) and vocab > 2 * DNA_VOCABULARY


def _is_above_order_2(config: Mapping[str, Any], names: Collection[str]) -> bool:
    order = config["layer"].get("order", 2) if _is_safari(config, names) else 2
    return isinstance(order, int) and order > 2


def _is_hf(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return "d_model" in config and any(name.startswith("hyena.backbone.") for name in names)


def _is_multimolecule(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return config.get("model_type") == "hyenadna" and any(name.startswith("model.layers.") for name in names)


LAYOUTS = (
    Layout("hyenadna", "HyenaDNA as its training code saves it", _is_dna, _hyenadna, _original_renames),
    Layout("hyenadna-hf", "HyenaDNA for transformers (the -hf folders)", _is_hf, _hf, _hf_renames),
    Layout(
        "hyenadna-multimolecule", "HyenaDNA as multimolecule saves it", _is_multimolecule, _multimolecule,
        _multimolecule_renames,
    ),
    Layout("safari-hyena", "safari's Hyena (src/)", _is_safari, _safari, _channel_major_renames),
    Layout(
        "safari-hyena-standalone", "safari's Hyena (standalone files)", _is_above_order_2, _safari_standalone,
        _original_renames,
    ),
)  # fmt: skip
