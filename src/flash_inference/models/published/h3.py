"""Published H3 language models: those of the H3 repository, and safari's, with state spaces or long convolutions.

What no file states: heads wider than 1 leave the operator in the order (head, place) where the fused kernel ran, and
(place, head) elsewhere, so that the columns of the output map depend on `use_fast_fftconv`. A long convolution of
H3Conv wraps around in the published code where the input is shorter than `l_max`; here it is causal at every length.
Sources: github.com/HazyResearch/H3, github.com/HazyResearch/safari, the model cards of danfu09/H3-*.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from flash_inference.models.h3 import H3Config
from flash_inference.models.h3_conv import H3ConvConfig
from flash_inference.models.hyena import FilterConfig
from flash_inference.models.published.layout import Layout, Rename, axes
from flash_inference.models.published.safari import (
    OPTIMIZER,
    has,
    longest,
    pair,
    plain_renames,
    prefix,
    text_backbone,
)
from flash_inference.models.published.settings import Settings

BASE = 10_000.0
SSM = "this library computes the diagonal state spaces of the published models"
ATTENTION = "this library computes the attention of the published models"
WIDE = {
    True: "heads are laid out (head, place) before the output map, as the fused kernel does (use_fast_fftconv)",
    False: "heads are laid out (place, head) before the output map, as without use_fast_fftconv",
}

# ---------------------------------------------------------------------------------------------------- the rename table


def _renames(config: H3Config, names: Collection[str], mixes: Callable[[str, str], list[Rename]]) -> list[Rename]:
    """The renames of a model; `mixes` gives those of what a layer's gates stand around."""
    table = plain_renames(names)
    for i in range(config.layers):
        published, ours = f"{prefix(names)}backbone.layers.{i}.mixer.", f"blocks.{i}.mixer."
        if i in config.attention:
            table += pair(f"{ours}mixer.qkv", f"{published}Wqkv") + pair(f"{ours}mixer.out", f"{published}out_proj")
        else:
            for name in ("q_proj", "k_proj", "v_proj"):
                table += pair(ours + name, published + name)
            table += pair(f"{ours}out_proj", f"{published}output_linear") + mixes(ours, published)
    return table


def _state_spaces(ours: str, published: str) -> list[Rename]:
    shift, diagonal = f"{published}ssm_k_kernel.kernel.", f"{published}kernel.kernel."
    inner = f"{ours}diagonal.filter."
    return [
        Rename(f"{ours}shift.filter.B", (f"{shift}B",), float32=True),
        Rename(f"{ours}shift.filter.C", (f"{shift}C",), view=axes(1), float32=True),
        Rename(f"{ours}shift.skip", (f"{published}ssm_k_D",), float32=True),
        Rename(f"{inner}log_dt", (f"{diagonal}log_dt",), float32=True),
        Rename(f"{inner}C", (f"{diagonal}C",), view=axes(1), float32=True),
        Rename(f"{inner}B", (f"{diagonal}B",), float32=True),
        Rename(f"{inner}log_A_real", (f"{diagonal}inv_A_real",), float32=True),
        Rename(f"{inner}A_imag", (f"{diagonal}A_imag",), float32=True),
        Rename(f"{ours}skip", (f"{published}D",), float32=True),
    ]


def _long_convolutions(ours: str, published: str) -> list[Rename]:
    return [
        Rename(f"{ours}first.filter.kernel", (f"{published}k_kernel.kernel",), view=axes(1), float32=True),
        Rename(f"{ours}first.skip", (f"{published}k_D",), float32=True),
        Rename(f"{ours}second.filter.kernel", (f"{published}kernel.kernel",), view=axes(1), float32=True),
        Rename(f"{ours}second.skip", (f"{published}D",), float32=True),
    ]


def _h3_renames(config: H3Config, names: Collection[str]) -> list[Rename]:
    return _renames(config, names, _state_spaces)


def _h3_conv_renames(config: H3Config, names: Collection[str]) -> list[Rename]:
    return _renames(config, names, _long_convolutions)


def _frequencies(config: H3Config, names: Collection[str]) -> dict[str, Tensor]:
    """Rotary frequencies, which attention layers store though their base tells them."""
    if not config.rotary:
        return {}
    frequencies = BASE ** (-torch.arange(0, config.rotary, 2, dtype=torch.float64) / config.rotary)
    layers = f"{prefix(names)}backbone.layers."
    return {f"{layers}{i}.mixer.rotary_emb.inv_freq": frequencies for i in config.attention}


# -------------------------------------------------------------------------------------------------------- the settings


def _h3(settings: Settings, tensors: Mapping[str, Tensor]) -> H3Config:
    """safari's config, with the operator's settings under "layer"."""
    layer = settings.section("layer")
    layer.only("the tensors are those of H3", _name_="h3")
    return _state_space_config(settings, layer, tensors)


def _original_h3(settings: Settings, tensors: Mapping[str, Tensor]) -> H3Config:
    """The arguments of the H3 repository's model, with the operator's under "ssm_cfg"."""
    return _state_space_config(settings, settings.section("ssm_cfg"), tensors)


def _state_space_config(settings: Settings, layer: Settings, tensors: Mapping[str, Tensor]) -> H3Config:
    fields = text_backbone(settings, tensors)
    layer.ignore("measure", "measure_args", "rank", *OPTIMIZER)
    layer.only(SSM, mode="diag", channels=1, real_type="exp", bandlimit=None, force_real=False)
    shift = layer.integer("d_state", 64)
    if shift % 2:
        raise layer.error("d_state", shift, "an even number: modes come in conjugate pairs")
    head = layer.divisor("head_dim", fields["width"], 1)
    fused = layer.flag("use_fast_fftconv", False)
    if head > 1:
        layer.notes.append(WIDE[fused])
    heads = fields["width"] // head
    config = H3Config(
        **fields,
        length=longest(layer),
        shift=shift,
        modes=shift // 2,
        copies=layer.divisor("n_ssm", heads, heads) if "n_ssm" in layer else 0,
        discretization=layer.choice("disc", ("bilinear", "zoh"), "bilinear"),
        head_width=head,
        order="head-place" if fused else "place-head",
        **_attention(settings, fields),
    )
    layer.ignore("n_ssm")
    layer.finish()
    return config


def _h3_conv(settings: Settings, tensors: Mapping[str, Tensor]) -> H3ConvConfig:
    fields = text_backbone(settings, tensors)
    layer = settings.section("layer")
    layer.only("the tensors are those of H3Conv", _name_="h3-conv")
    layer.ignore("use_fast_fftconv", *OPTIMIZER)
    layer.only("the published code has no room for heads in its second convolution", head_dim=1)
    layer.only("the future is not known in generation", causal=True, channels=1)
    layer.only("smoothing of spectra makes a filter that depends on its length", smooth_freq=False)
    smooth = layer.flag("use_ma_smoothing", False)
    window = layer.odd("ma_window_len", 7) if smooth else 1
    layer.ignore("ma_window_len")
    layer.notes.append("long convolutions are causal here; the published code wraps around on inputs below l_max")
    options = {"threshold": layer.number("lam", 0.1, "lam is not given; the published default 0.1 was used")}
    config = H3ConvConfig(
        **fields,
        length=layer.integer("l_max"),
        filter=FilterConfig("squashed", options=options | {"window": window}),
        **_attention(settings, fields),
    )
    layer.finish()
    return config


def _attention(settings: Settings, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks that attend, and how."""
    blocks = settings.indices("attn_layer_idx", fields["layers"]) if "attn_layer_idx" in settings else []
    if not blocks:
        settings.ignore("attn_layer_idx", "attn_cfg")
        return {}
    attention = settings.section("attn_cfg")
    attention.ignore("use_flash_attn", "fused_bias_fc", "dropout", "return_residual", "checkpointing", "layer_idx")
    attention.only(ATTENTION, causal=True, cross_attn=False, dwconv=False, softmax_scale=None, bias=True)
    attention.only(ATTENTION, rotary_emb_scale_base=0, rotary_emb_base=BASE, rotary_emb_interleaved=False)
    heads = attention.divisor("num_heads", fields["width"])
    rotary = attention.integer("rotary_emb_dim", 0, least=0)
    if rotary % 2 or rotary > fields["width"] // heads:
        raise attention.error("rotary_emb_dim", rotary, f"an even number up to {fields['width'] // heads}")
    attention.finish()
    return {"attention": tuple(blocks), "heads": heads, "rotary": rotary}


# --------------------------------------------------------------------------------------------------------- the layouts

STATE_SPACE, LONG = ".mixer.ssm_k_kernel.", ".mixer.k_kernel."


def _is_h3(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return has(config, names, STATE_SPACE, "layer")


def _is_original_h3(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return has(config, names, STATE_SPACE, "ssm_cfg")


def _is_h3_conv(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return has(config, names, LONG, "layer")


LAYOUTS = (
    Layout("h3", "H3 as its repository saves it", _is_original_h3, _original_h3, _h3_renames, derived=_frequencies),
    Layout("safari-h3", "safari's H3", _is_h3, _h3, _h3_renames, derived=_frequencies),
    Layout("safari-h3-conv", "safari's H3 with long convolutions", _is_h3_conv, _h3_conv, _h3_conv_renames,
           derived=_frequencies),
)  # fmt: skip
