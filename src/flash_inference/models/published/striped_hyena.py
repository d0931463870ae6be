"""Published StripedHyena models: Evo 1 and SH-7B (the first kind), Evo 2 (the second).

Both kinds share names: a config with `hyena_layer_idxs` is of the first, one with `hcs_`, `hcm_` and `hcl_layer_idxs`
of the second. In which order the rows of a projection lie is data of a config, and undone as the tensors are read.
Sources: github.com/togethercomputer/stripedhyena, github.com/Zymrael/vortex, github.com/evo-design/evo.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from flash_inference.models.norms import EpsPlace
from flash_inference.models.published.layout import AS_IS, Layout, Rename, View, swapped
from flash_inference.models.published.settings import TRANSFORMERS, Settings
from flash_inference.models.striped_hyena import StripedHyenaConfig
from flash_inference.models.tokens import STRIPED_BYTES, TOKENIZER

VOCABULARY = STRIPED_BYTES.vocab_size
LONG_FIR = 128
"""From this length on, the published code turns a filter's taps round and adds a skip term."""

RUNTIME = (
    "attn_block_dtype", "compile", "depthwise_dtype", "ground_truth_activations_path", "hyena_block_dtype",
    "inference_mode", "log_intermediate_values", "low_mem_mode", "make_vocab_size_divisible_by", "max_batch_size",
    "mlp_dtype", "mlp_init_method", "mlp_output_init_method", "model_name", "padding_idx", "params_dtype",
    "pile_parallel_size", "pipe_parallel_size", "prefill_style", "print_activations", "process_group", "rng_fork",
    "seqlen", "split_k0", "tie_word_embeddings", "tokenizer_type", "use_flash_attention_2", "use_flash_attn",
    "use_flash_depthwise", "use_flashfft", "use_hcl_kernel", "use_hcm_kernel", "use_hcs_kernel", "use_laughing_hyena",
    "vocab_file",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the rename table


MLP = ((1, "gate"), (2, "up"), (3, "down"))
INNER = {
    "modal": (("filter.poles", "poles"), ("filter.residues", "residues"), ("skip", "D")),
    "long": (("filter.log_poles", "log_poles"), ("filter.residues", "residues"), ("skip", "D")),
    "medium": (("weight", "h"), ("skip", "D")),
    "short": (("weight", "h"),),
}


def _prefix(names: Collection[str]) -> str:
    return "backbone." if any(name.startswith("backbone.") for name in names) else ""


def _renames(config: StripedHyenaConfig, names: Collection[str]) -> list[Rename]:
    """Our names and published ones: those of transformers' folders begin with "backbone."."""
    P = _prefix(names)
    embedding, head = f"{P}embedding_layer.weight", f"{P}unembed.weight"
    table = [_rename("embedding.weight", embedding, *((head,) if config.tied else ()))]
    table += [] if config.tied else [_rename("head.weight", head)]
    table.append(_rename("norm.weight", f"{P}norm.scale"))
    for i, operator in enumerate(config.pattern):
        layer, ours = f"{P}blocks.{i}.", f"blocks.{i}."
        table += [_rename(f"{ours}norm1.weight", f"{layer}pre_norm.scale")]
        table += [_rename(f"{ours}norm2.weight", f"{layer}post_norm.scale")]
        table += [_rename(f"{ours}mlp.{name}.weight", f"{layer}mlp.l{n}.weight") for n, name in MLP]
        mixer = _attention(config) if operator == "attention" else _convolution(config, operator)
        table += [_rename(f"{ours}mixer.{name}", layer + published) for name, published in mixer]
    return table


def _attention(config: StripedHyenaConfig) -> list[tuple[str, str]]:
    names = [("mixer.qkv", "Wqkv", config.qkv_bias), ("mixer.out", "out_proj", config.attention_out_bias)]
    return [pair for ours, published, bias in names for pair in _linear(ours, f"inner_mha_cls.{published}", bias)]


def _convolution(config: StripedHyenaConfig, operator: str) -> list[tuple[str, str]]:
    table = _linear("in_proj", "projections", config.in_bias) + _linear("out_proj", "out_filter_dense", config.out_bias)
    table.append(("features.weight", "filter.short_filter_weight"))
    table += [("features.bias", "filter.short_filter_bias")] if config.feature_bias else []
    table += [(f"inner.{name}", f"filter.{published}") for name, published in INNER[operator]]
    return table


def _linear(ours: str, published: str, bias: bool) -> list[tuple[str, str]]:
    return [(f"{ours}.{part}", f"{published}.{part}") for part in ("weight", "bias")[: 1 + bias]]


def _rename(ours: str, published: str, *optional: str) -> Rename:
    """Poles and residues stay in float32; the published code rounds whatever else is stored so."""
    return Rename(ours, (published,), optional, float32=True)


def _first_rows(config: StripedHyenaConfig, settings: Mapping[str, Any]) -> dict[str, View]:
    """Rows of the gates lie head by head, or gate, key and value side by side as ours do."""
    by_head = swapped(config.heads, 3) if _on(settings, "column_split_hyena", True) else AS_IS
    return _on_both({"in_proj": by_head, "features": by_head})


def _second_rows(config: StripedHyenaConfig, settings: Mapping[str, Any]) -> dict[str, View]:
    """Rows of the gates may lie channel by channel, the first two may be exchanged; queries lie head by head too."""
    gates = swapped(config.width, 3) if _on(settings, "interleave", False) else AS_IS
    gates = gates.then(swapped(config.heads, 3)) if _on(settings, "column_split_hyena", True) else gates
    gates = gates.then(View(_flip, _flip)) if _on(settings, "hyena_flip_x1x2", False) else gates
    qkv = swapped(config.heads, 3) if _on(settings, "column_split", True) else AS_IS
    return _on_both({"in_proj": gates, "features": gates, "qkv": qkv})


def _on(settings: Mapping[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name)
    return default if value is None else value


def _on_both(views: dict[str, View]) -> dict[str, View]:
    return {f"{name}.{part}": view for name, view in views.items() for part in ("weight", "bias")}


def _flip(rows: Tensor) -> Tensor:
    """The first two thirds of the rows in the place of each other."""
    return rows.unflatten(0, (3, -1))[[1, 0, 2]].flatten(0, 1)


def _frequencies(config: StripedHyenaConfig, names: Collection[str]) -> dict[str, Tensor]:
    """Rotary frequencies, which attention layers store though their base tells them."""
    half = config.width // config.heads // 2
    frequencies = config.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
    layers = [i for i, operator in enumerate(config.pattern) if operator == "attention"]
    return {f"{_prefix(names)}blocks.{i}.inner_mha_cls.rotary_emb.inv_freq": frequencies for i in layers}


# -------------------------------------------------------------------------------------------------------- the settings


def _first(settings: Settings, tensors: Mapping[str, Tensor]) -> StripedHyenaConfig:
    layers = settings.integer("num_layers")
    pattern = _pattern(settings, layers, attn_layer_idxs="attention", hyena_layer_idxs="modal")
    activation = settings.choice("mlp_activation", ("gelu", "silu"), "silu")
    settings.only("every channel has a filter of its own", hyena_filter_groups=1)
    groups = settings.integer("proj_groups", 1)
    if groups == 1:
        settings.ignore("column_split")
    else:
        settings.only("the published code reads grouped queries side by side", column_split=False)
    return _config(
        settings, layers, pattern, (activation,) * layers, groups, settings.flag("qkv_proj_bias", True), base=10_000.0,
        eps=1e-5, feature_bias=settings.flag("short_filter_bias", True),
    )  # fmt: skip


def _second(settings: Settings, tensors: Mapping[str, Tensor]) -> StripedHyenaConfig:
    layers = settings.integer("num_layers")
    pattern = _pattern(
        settings, layers, attn_layer_idxs="attention", hcl_layer_idxs="long", hcm_layer_idxs="medium",
        hcs_layer_idxs="short",
    )  # fmt: skip
    activation = settings.choice("mlp_activation", ("gelu", "silu"), "gelu")
    later = "none" if settings.flag("evo2_style_activations", False) else activation
    # The published code gives every channel of a long filter poles of its own, whatever these say.
    settings.ignore("hcl_filter_groups", "hyena_filter_groups")
    settings.only("attention of the second kind has a key for every query head", proj_groups=1)
    for name, default in (("interleave", False), ("hyena_flip_x1x2", False), ("column_split", True)):
        settings.flag(name, default)  # `_second_rows` reads them.
    bias = settings.flag("qkv_proj_bias")
    if settings.flag("use_fp8_input_projections", False):
        settings.notes.append("input projections run in the precision of the weights, not in 8 bits")
    short, medium = settings.integer("hcs_filter_length"), settings.integer("hcm_filter_length")
    if short >= LONG_FIR:
        raise settings.error("hcs_filter_length", short, f"less than {LONG_FIR}: longer filters are hcm's")
    if medium < LONG_FIR:
        raise settings.error("hcm_filter_length", medium, f"at least {LONG_FIR}: shorter filters are hcs's")
    return _config(
        settings, layers, pattern, (activation, *(later,) * (layers - 1)), 1, bias, base=1_000_000.0, eps=1e-6,
        feature_bias=settings.flag("short_filter_bias", False),
        in_bias=bias, out_bias=settings.flag("hyena_out_proj_bias"),
        short_taps=short, short_groups=settings.integer("hcs_filter_groups"),
        medium_taps=medium, medium_groups=settings.integer("hcm_filter_groups"),
    )  # fmt: skip


def _config(
    settings: Settings,
    layers: int,
    pattern: tuple[str, ...],
    activations: tuple[str, ...],
    groups: int,
    qkv_bias: bool,
    *,
    base: float,
    eps: float,
    **own: Any,
) -> StripedHyenaConfig:
    """What both kinds say alike; `base` and `eps` are the defaults of the published code."""
    width, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    if width % heads:
        raise settings.error("num_attention_heads", heads, f"a divisor of hidden_size, {width}")
    if heads % groups:
        raise settings.error("proj_groups", groups, f"a divisor of num_attention_heads, {heads}")
    settings.flag("column_split_hyena", True)  # `_first_rows` and `_second_rows` read it.
    settings.only("it is the width of the model", num_filters=width)
    settings.only("queries share keys in rows, and a norm stands before the head", smeared_gqa=False, final_norm=True)
    settings.only("filters run over all positions", long_fir_threshold=None)
    settings.only("the tensors are those of the whole model", model_parallel_size=1)
    vocab = settings.integer("vocab_size")
    config = StripedHyenaConfig(
        vocab_size=vocab,
        width=width,
        layers=layers,
        length=_length(settings),
        pattern=pattern,
        activations=activations,
        inner=_inner(settings, width),
        heads=heads,
        kv_heads=heads // groups,
        modes=settings.integer("state_size"),
        feature_taps=settings.integer("short_filter_length", 3),
        qkv_bias=qkv_bias,
        attention_out_bias=settings.flag("mha_out_proj_bias", True),
        rotary_base=settings.number("rotary_emb_base", base, f"rotary_emb_base is not given; {base:g} was used"),
        rotary_interpolation=_interpolation(settings),
        norm_eps=settings.number("eps", eps, f"eps is not given; {eps:g} was used"),
        norm_eps_place=_eps_place(settings),
        tied=settings.flag("tie_embeddings"),
        **_tokens(settings, vocab),
        **own,
    )
    settings.ignore(*RUNTIME, *TRANSFORMERS)
    return config


def _pattern(settings: Settings, layers: int, **operators: str) -> tuple[str, ...]:
    """The operator of each layer, from lists of layers. Published lists name layers beyond the last: those are told."""
    at: dict[int, str] = {}
    for name, operator in operators.items():
        layers_of = settings.indices(name)
        if twice := sorted(set(layers_of) & set(at)):
            raise settings.error(name, layers_of, f"no layer of another list; {twice} are in two")
        at |= dict.fromkeys(layers_of, operator)
    beyond = sorted(i for i in at if i >= layers)
    if len(at) - len(beyond) < layers:
        lost = next(i for i in range(layers) if i not in at)
        raise settings.error("num_layers", layers, f"every layer in one of {', '.join(operators)}; {lost} is in none")
    if beyond:
        settings.notes.append(f"the lists of layers name {beyond}, beyond the last of {layers}; these are no layers")
    return tuple(at[i] for i in range(layers))


def _length(settings: Settings) -> int:
    name = "max_sequence_len" if "max_sequence_len" in settings and "max_seqlen" not in settings else "max_seqlen"
    length = settings.integer(name, 8192)
    settings.ignore("max_sequence_len")
    settings.notes.append(f"sequences may have {length} positions, as {name} says; no weight depends on it")
    return length


def _inner(settings: Settings, width: int) -> int:
    """Width of the MLP's hidden layer: given, or 8/3 of the model's, rounded up."""
    if "inner_mlp_size" in settings:
        settings.ignore("inner_size_multiple_of")
        return settings.integer("inner_mlp_size")
    multiple = settings.integer("inner_size_multiple_of", 64)
    return settings.integer("inner_mlp_size", -(-int(2 * width * 4 / 3) // multiple) * multiple)


def _interpolation(settings: Settings) -> float:
    if settings.flag("use_interpolated_rotary_pos_emb", False):
        return settings.number("rotary_emb_scaling_factor", 1.0, "rotary_emb_scaling_factor is not given; 1 was used")
    settings.ignore("rotary_emb_scaling_factor")
    return 1.0


def _eps_place(settings: Settings) -> EpsPlace:
    """Where norms have eps: the kernel that `use_flash_rmsnorm` asks for has it inside the root."""
    return "inside" if settings.flag("use_flash_rmsnorm", False) else "outside"


def _tokens(settings: Settings, vocab: int) -> dict[str, Any]:
    """Bytes where there are 512 ids, a tokenizer.json otherwise."""
    if vocab == VOCABULARY:
        settings.notes.append("text is read as bytes; 0 is both start and end of text")
        return {"tokens": STRIPED_BYTES.name, "start_token": 0, "stop_tokens": (0,), "pad_token": 1}
    start, stop = settings.integer("bos_token_id", 1, least=0), settings.integer("eos_token_id", 2, least=0)
    return {"tokens": TOKENIZER, "start_token": start, "stop_tokens": (stop,)}


# --------------------------------------------------------------------------------------------------------- the layouts


def _has_blocks(names: Collection[str]) -> bool:
    return any(name.removeprefix("backbone.").startswith("blocks.") for name in names)


def _is_first(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return "hyena_layer_idxs" in config and _has_blocks(names)


def _is_second(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return any(f"{kind}_layer_idxs" in config for kind in ("hcl", "hcm", "hcs")) and _has_blocks(names)


IGNORED = re.compile(r".*(\._extra_state|fftconv_fn\..*|\.twiddle_factors.*)")

LAYOUTS = (
    Layout(
        "stripedhyena", "StripedHyena of the first kind (Evo 1, SH-7B)", _is_first, _first, _renames,
        rows=_first_rows, derived=_frequencies, ignored=IGNORED,
    ),
    Layout(
        "stripedhyena2", "StripedHyena of the second kind (Evo 2)", _is_second, _second, _renames,
        rows=_second_rows, derived=_frequencies, ignored=IGNORED,
    ),
)  # fmt: skip
