"""What safari's language models share, whatever mixes along time: the backbone's names and settings.

They are `ConvLMHeadModel` and `SimpleLMHeadModel`, with the operator's settings under "layer", and the earlier
`SSMLMHeadModel` of the H3 repository, with them under "ssm_cfg": an embedding, blocks of norm, mixer, norm and MLP, a
last norm, a head that is the embedding. Raw state dicts, or under "model." in a Lightning checkpoint.
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
EPS = 1e-5
ENDLESS = 1 << 20
"""Positions that are allowed where filters end nowhere."""
TRAINING = ("resid_dropout", "embed_dropout", "initializer_cfg", "checkpoint_mixer", "checkpoint_mlp")
FUSED = ("fused_mlp", "fused_dropout_add_ln", "residual_in_fp32", "sequence_parallel", "use_flashfftconv")
OPTIMIZER = (
    "lr", "wd", "learning_rate", "kernel_dropout", "weight_init", "dropout", "layer_idx", "verbose", "dt_min", "dt_max",
    "deterministic", "fused_bias_fc", "device", "dtype",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the settings


def backbone(settings: Settings, vocab: int) -> dict[str, Any]:
    """What the config says of all but operators and attention, as fields of ours; `vocab` is its vocab_size."""
    settings.ignore("_name_", "_target_", "return_hidden_state", "n_classes", *TRAINING, *FUSED, *TRANSFORMERS)
    settings.only("classifiers are not read", use_head=False)
    settings.only("embeddings of positions are not read", max_position_embeddings=0)
    width = settings.integer("d_model")
    return {
        "vocab_size": padded(vocab, settings.integer("pad_vocab_size_multiple", 1)),
        "width": width,
        "layers": settings.integer("n_layer"),
        "inner": settings.integer("d_inner", 4 * width),
        "norm_eps": settings.number("layer_norm_epsilon", EPS, ""),
    }


def without_attention(settings: Settings) -> None:
    """Raises CheckpointError for layers that attend, beside operators that are read without them."""
    settings.ignore("attn_cfg")
    settings.only("attention layers are not read beside this operator", attn_layer_idx=None)


def text(vocab: int) -> dict[str, Any]:
    """The fields of a vocabulary of text: GPT-2's has one special token, which begins, ends and pads."""
    end = GPT2_VOCABULARY - 1
    special = {"start_token": end, "stop_tokens": (end,), "pad_token": end} if vocab == GPT2_VOCABULARY else {}
    return {"tokens": TOKENIZER, **special}


def padded(vocab: int, multiple: int) -> int:
    """A vocabulary size rounded up, as the code that trains pads it."""
    return -(-vocab // multiple) * multiple


def tell_of_head(settings: Settings, tensors: Mapping[str, Tensor]) -> None:
    """Notes that the head is not stored, where it is not."""
    if not any(name.endswith("lm_head.weight") for name in tensors):
        settings.notes.append("the head is not stored; it is the embedding, as in the published code")


def text_backbone(settings: Settings, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of ours of a model of text, but for operators and attention."""
    vocab = settings.integer("vocab_size")
    tell_of_head(settings, tensors)
    return backbone(settings, vocab) | text(vocab)


def longest(layer: Settings) -> int:
    """The longest sequence of a model whose filters end nowhere: `l_max` if it is given."""
    if "l_max" in layer:
        return layer.integer("l_max")
    layer.ignore("l_max")
    layer.notes.append(f"l_max is not given, and the filters end nowhere; up to {ENDLESS} positions are allowed")
    return ENDLESS


# ----------------------------------------------------------------------------------------------------------- the names


def has(config: Mapping[str, Any], names: Collection[str], part: str, *sections: str) -> bool:
    """Whether a folder has one of the sections of settings, and a tensor of some operator in a layer."""
    return any(isinstance(config.get(key), dict) for key in sections) and any(
        "backbone.layers." in name and part in name for name in names
    )


def prefix(names: Collection[str]) -> str:
    """What stands before all names: "model." in a Lightning checkpoint."""
    return "model." if any(name.startswith("model.backbone.") for name in names) else ""


def pair(ours: str, published: str) -> list[Rename]:
    """The weight and the bias of a linear map or a norm."""
    return [Rename(f"{ours}.{part}", (f"{published}.{part}",)) for part in ("weight", "bias")]


def backbone_renames(
    backbone: str, head: str, *, norm: str = "ln_f", mlp: str = "mlp.", tied: bool = True
) -> list[Rename]:
    """Our names and published ones of all but the operator, for a backbone's prefix, its last norm, and its MLPs'."""
    layer, ours = f"{backbone}layers.{{i}}.", "blocks.{i}."
    table = [Rename("embedding.weight", (f"{backbone}embeddings.word_embeddings.weight",), (head,) if tied else ())]
    table += [] if tied else [Rename("head.weight", (head,))]
    table += pair("norm", f"{backbone}{norm}")
    for name in ("norm1", "norm2"):
        table += pair(ours + name, layer + name)
    for name in ("fc1", "fc2"):
        table += pair(f"{ours}mlp.{name}", f"{layer}{mlp}{name}")
    return table


def plain_renames(names: Collection[str]) -> list[Rename]:
    """`backbone_renames` as most models spell them."""
    return backbone_renames(f"{prefix(names)}backbone.", f"{prefix(names)}lm_head.weight")
