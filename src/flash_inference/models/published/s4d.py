"""safari's language models of S4D operators: one state space a channel.

What no file states: the operator takes sequences as (batch, length, channel) only with `transposed: false`, which its
models must say.
Source: github.com/HazyResearch/safari (`lm_simple` with the layer `s4d`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

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
    without_attention,
)
from flash_inference.models.published.settings import Settings
from flash_inference.models.s4d import S4DConfig

KERNEL = ".mixer.kernel.kernel.log_w_real"
CAUSAL = "this library generates from causal S4D operators of one channel"


def _renames(config: S4DConfig, names: Collection[str]) -> list[Rename]:
    mixer, ours = f"{prefix(names)}backbone.layers.{{i}}.mixer.", "blocks.{i}.mixer."
    kernel, filter = f"{mixer}kernel.kernel.", f"{ours}long.filter."
    return [
        *plain_renames(names),
        Rename(f"{filter}log_dt", (f"{kernel}log_dt",), float32=True),
        Rename(f"{filter}C", (f"{kernel}C",), view=axes(1), float32=True),
        Rename(f"{filter}log_w_real", (f"{kernel}log_w_real",), float32=True),
        Rename(f"{filter}w_imag", (f"{kernel}w_imag",), float32=True),
        Rename(f"{ours}long.skip", (f"{mixer}D",), view=axes(1), float32=True),
        *pair(f"{ours}out_proj", f"{mixer}output_linear" + (".0" if config.join == "glu" else "")),
    ]


def _s4d(settings: Settings, tensors: Mapping[str, Tensor]) -> S4DConfig:
    fields = text_backbone(settings, tensors)
    without_attention(settings)
    layer = settings.section("layer")
    layer.only("the tensors are those of S4D", _name_="s4d")
    layer.only(CAUSAL, channels=1, bidirectional=False, activation="gelu")
    if layer.flag("transposed", True):
        raise layer.error("transposed", True, "false: these models' sequences are (batch, length, channel)")
    layer.ignore("return_state", "scaling", "train_w", "train_dt", *OPTIMIZER)
    order = layer.integer("d_state", 64)
    if order % 2:
        raise layer.error("d_state", order, "an even number: modes come in conjugate pairs")
    options = {"modes": order // 2, "copies": layer.divisor("n_ssm", fields["width"], 1)}
    gated = "postact" in layer
    if gated:
        layer.choice("postact", ("glu",), "glu")
    layer.ignore("postact")
    config = S4DConfig(
        **fields,
        length=longest(layer),
        filter=FilterConfig("s4d", options=options),
        join="glu" if gated else "linear",
    )
    layer.finish()
    return config


def _is_s4d(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return has(config, names, KERNEL, "layer")


LAYOUTS = (Layout("safari-s4d", "safari's S4D (lm_simple)", _is_s4d, _s4d, _renames),)
