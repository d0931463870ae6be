"""Plain long convolutions under safari's backbone: its own LongConv, and SGConv's GConv.

safari's LongConv cuts a kernel to twice the input's length, so that on inputs shorter than `l_max` its unused taps wrap
around and weigh the future. Here every input is convolved causally, as inputs of `l_max` positions are there. Its
standalone file has a kernel of twice as many columns, whose upper half does the same: that is refused.
SGConv's repository publishes its operator and no language model around it; its names are read below `mixer` here.
Sources: github.com/HazyResearch/safari, github.com/ctlllll/SGConv.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from flash_inference.errors import CheckpointError
from flash_inference.models.hyena import FilterConfig
from flash_inference.models.long_conv import LongConvConfig
from flash_inference.models.published.layout import Layout, Rename, View
from flash_inference.models.published.safari import pair, plain_renames, prefix, text_backbone, without_attention
from flash_inference.models.published.settings import Settings

MODES = {
    "_".join((arrangement, *words)): (arrangement, "nearest" if "nearest" in words else "linear")
    for arrangement in ("cat", "sum")
    for start in ("randn", "cos")
    for words in ((start,), (start, "nearest"), ("nearest", start), (start, "linear"), ("linear", start))
}
"""GConv's `mode`: how its pieces are joined, how they began, how they are stretched."""
CAUSAL = "this library generates from causal convolutions"
PLAIN = "this library computes the operator without it"
MIXER = "blocks.{i}.mixer."


# ---------------------------------------------------------------------------------------------------- the rename tables


def heads(config: LongConvConfig) -> View:
    """Channels published as (head, channel), two axes, where ours are one."""
    return View(lambda t: t.flatten(0, 1), lambda t: t.unflatten(0, (config.heads, config.width)))


def shared(config: LongConvConfig) -> View:
    """A number a channel, published once for all heads as (1, channel, 1)."""
    return View(lambda t: t.reshape(-1).repeat(config.heads), lambda t: t[: config.width].reshape(1, -1, 1))


def _renames(config: LongConvConfig, names: Collection[str], out: str) -> list[Rename]:
    """All but the filter: the backbone, the skip term, and the linear map, which is published as `out`."""
    layer = f"{prefix(names)}backbone.layers.{{i}}.mixer."
    skip = Rename(f"{MIXER}skip", (f"{layer}D",), view=heads(config))
    return [
        *plain_renames(names), skip,
        *pair(f"{MIXER}out", f"{layer}{out}"),
    ]  # fmt: skip


def _long_conv_renames(config: LongConvConfig, names: Collection[str]) -> list[Rename]:
    kernel = f"{prefix(names)}backbone.layers.{{i}}.mixer.kernel.kernel"
    return [*_renames(config, names, "output_linear.0"), Rename(f"{MIXER}filter.kernel", (kernel,), view=heads(config))]


def _gconv_renames(config: LongConvConfig, names: Collection[str]) -> list[Rename]:
    layer = f"{prefix(names)}backbone.layers.{{i}}.mixer."
    activated = config.mixing == "glu" or any(".output_linear.0." in name for name in names)
    pieces = [
        Rename(f"{MIXER}filter.pieces.{n}", (f"{layer}kernel_list.{n}",), view=heads(config))
        for n in range(config.filter.options["pieces"])
    ]
    norm = View(lambda t: t.flatten(), lambda t: t.reshape(config.heads, config.width, 1))
    return [
        *_renames(config, names, "output_linear.0" if activated else "output_linear"), *pieces,
        Rename(f"{MIXER}filter.multiplier", (f"{layer}multiplier",), view=shared(config)),
        Rename(f"{MIXER}filter.norm", (f"{layer}kernel_norm",), view=norm),
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the settings


def _operator(
    settings: Settings, tensors: Mapping[str, Tensor], mixings: Mapping[Any, str], default: str | None
) -> tuple[Settings, dict[str, Any]]:
    """The section "layer", without what both operators say alike, and the fields of ours that this makes."""
    outer = text_backbone(settings, tensors)
    without_attention(settings)
    layer = settings.section("layer")
    layer.ignore("_name_", "dropout", "tie_dropout", "initializer", "verbose", "transposed", "lr", "layer_idx")
    layer.only(CAUSAL, bidirectional=False)
    layer.only("it is the width of the model", d_model=outer["width"])
    layer.only(PLAIN, activation="gelu", weight_norm=False)
    fields = {
        "heads": layer.integer("channels", 1),
        "mixing": layer.word("postact", mixings, default),
        "length": layer.integer("l_max"),
    }
    return layer, outer | fields


def _long_conv(settings: Settings, tensors: Mapping[str, Tensor]) -> LongConvConfig:
    layer, fields = _operator(settings, tensors, {"glu": "glu", "id": "linear"}, "glu")
    _refuse_the_standalone_kernel(tensors)
    layer.ignore("kernel_dropout", "learning_rate", "weight_init", "block_fft_conv_args")
    layer.only(CAUSAL, causal=True)
    layer.only("it mixes the taps with each other, the last with the first", smooth_freq=False)
    layer.only(PLAIN, block_fft_conv=False)
    smooth = layer.flag("use_ma_smoothing", False)
    window = layer.integer("ma_window_len", 7) if smooth else 1
    if window % 2 == 0:
        raise layer.error("ma_window_len", window, "an odd integer: an average is centred on its tap")
    layer.ignore("ma_window_len")
    options = {"threshold": layer.number("lam", 0.1, "layer.lam is not given; the published default 0.1 was used")}
    layer.finish()
    settings.notes.append(
        "safari lets unused taps wrap around on inputs shorter than l_max; here inputs of every length are convolved "
        "causally, as those of l_max positions are there"
    )
    return LongConvConfig(**fields, filter=FilterConfig("squashed", options=options | {"window": window}))


def _refuse_the_standalone_kernel(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith(".mixer.kernel"):
            raise CheckpointError(
                f"{name} {list(tensor.shape)} is the kernel of safari's standalone file, whose upper half weighs the "
                "future; expected mixer.kernel.kernel [channels, d_model, l_max]. If the model was trained causally, "
                "store its first l_max columns under that name."
            )


def _gconv(settings: Settings, tensors: Mapping[str, Tensor]) -> LongConvConfig:
    layer, fields = _operator(settings, tensors, {"glu": "glu", "id": "linear", None: "linear"}, None)
    layer.ignore("d_state", "decay_min", "decay_max")
    layer.only(PLAIN, ln=False, hyper_act=None, shift=False, linear=False)
    points, first = layer.integer("kernel_dim", 64), layer.integer("init_scale", 0, least=0)
    scales = 1 + math.ceil(math.log2(fields["length"] / points)) - first
    pieces = layer.integer("n_scales", scales if scales >= 1 else None)
    if pieces > len(tensors):
        raise layer.error("n_scales", pieces, f"no more than the {len(tensors)} tensors that there are")
    arrangement, interpolation = layer.word("mode", MODES, "cat_randn")
    layer.finish()
    options = {"points": points, "first": first, "pieces": pieces}
    options |= {"arrangement": arrangement, "interpolation": interpolation}
    return LongConvConfig(**fields, filter=FilterConfig("multiscale", options=options))


# --------------------------------------------------------------------------------------------------------- the layouts


def _named(name: str) -> Callable[[Mapping[str, Any], Collection[str]], bool]:
    """Whether a config's operator has this name, under safari's backbone."""

    def recognise(config: Mapping[str, Any], names: Collection[str]) -> bool:
        layer = config.get("layer")
        return isinstance(layer, dict) and layer.get("_name_") == name and any("backbone." in each for each in names)

    return recognise


def _norms_are_set(config: LongConvConfig, names: Collection[str]) -> dict[str, Tensor]:
    """GConv's norm is meaningless until its first forward has set it."""
    layer = f"{prefix(names)}backbone.layers."
    return {f"{layer}{i}.mixer.kernel_norm_initialized": torch.tensor(True) for i in range(config.layers)}


LAYOUTS = (
    Layout("safari-long-conv", "safari's LongConv", _named("long-conv"), _long_conv, _long_conv_renames),
    Layout("sgconv", "SGConv's GConv", _named("gconv"), _gconv, _gconv_renames, constants=_norms_are_set),
)
