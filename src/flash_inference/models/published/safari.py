"""What safari's language models share, whatever mixes along time: the backbone's names and settings.

They are `ConvLMHeadModel` and `SimpleLMHeadModel`, with the operator's settings under "layer", and the earlier
`SSMLMHeadModel` of the H3 repository, with them under "ssm_cfg". All tie the head to the embedding.
Sources: github.com/HazyResearch/safari, github.com/HazyResearch/H3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from flash_inference.models.published.layout import Rename
from flash_inference.models.published.settings import TRANSFORMERS, Settings
from flash_inference.models.tokens import TOKENIZER

GPT2_VOCABULARY = 50257
ENDLESS = 1 << 20
"""Positions that are allowed where filters end nowhere."""
TRAINING = ("resid_dropout", "embed_dropout", "initializer_cfg", "checkpoint_mixer", "checkpoint_mlp")
FUSED = ("fused_mlp", "fused_dropout_add_ln", "residual_in_fp32", "sequence_parallel", "use_flashfftconv")
OPTIMIZER = (
    "lr", "wd", "learning_rate", "kernel_dropout", "weight_init", "dropout", "layer_idx", "verbose", "dt_min", "dt_max",
    "deterministic", "fused_bias_fc", "device", "dtype",
)  # fmt: skip


def outer_name(names: Collection[str]) -> str:
    """What stands before all names: "model." in a Lightning checkpoint."""
    return "model." if any(name.startswith("model.backbone.") for name in names) else ""


def pair(ours: str, published: str) -> list[Rename]:
    """A module with a weight and a bias."""
    return [Rename(f"{ours}.{part}", (f"{published}.{part}",)) for part in ("weight", "bias")]


def backbone(names: Collection[str]) -> list[Rename]:
    """The renames of all but the operators."""
    outer = outer_name(names)
    layer, ours = f"{outer}backbone.layers.{{i}}.", "blocks.{i}."
    embedding = f"{outer}backbone.embeddings.word_embeddings.weight"
    table = [Rename("embedding.weight", (embedding,), (f"{outer}lm_head.weight",))]
    table += pair("norm", f"{outer}backbone.ln_f")
    for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
        table += pair(ours + name, layer + name)
    return table


def settings_of(settings: Settings, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our fields for the backbone's settings, but for attention."""
    settings.ignore("_name_", "_target_", "return_hidden_state", "n_classes", *TRAINING, *FUSED, *TRANSFORMERS)
    settings.only("these models have no embedding of positions", max_position_embeddings=0)
    settings.only("classifiers are not read", use_head=False)
    width, vocab = settings.integer("d_model"), settings.integer("vocab_size")
    multiple = settings.integer("pad_vocab_size_multiple", 1)
    if not any(name.endswith("lm_head.weight") for name in tensors):
        settings.notes.append("the head is not stored; it is the embedding, as in the published code")
    end = {"start_token": vocab - 1, "stop_tokens": (vocab - 1,), "pad_token": vocab - 1}
    return {
        "vocab_size": -(-vocab // multiple) * multiple,
        "width": width,
        "layers": settings.integer("n_layer"),
        "inner": settings.integer("d_inner", 4 * width),
        "norm_eps": settings.number("layer_norm_epsilon", 1e-5, ""),
        "tokens": TOKENIZER,
        **(end if vocab == GPT2_VOCABULARY else {}),
    }


def longest(layer: Settings) -> int:
    """The longest sequence of a model whose filters end nowhere: `l_max` if it is given."""
    if "l_max" in layer:
        return layer.integer("l_max")
    layer.ignore("l_max")
    layer.notes.append(f"l_max is not given, and the filters end nowhere; up to {ENDLESS} positions are allowed")
    return ENDLESS


def has(config: Mapping[str, Any], names: Collection[str], part: str, *sections: str) -> bool:
    """Whether a folder has one of the sections of settings, and a tensor of some operator in a layer."""
    return any(isinstance(config.get(key), dict) for key in sections) and any(
        "backbone.layers." in name and part in name for name in names
    )
