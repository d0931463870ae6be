"""Damaged folders of every layout: each an error of the library's, none a model."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from corruptions import Target, survives
from hyena_reference import CASES
from long_conv_reference import CASES as LONG_CONV
from published_laws import publish as publish_case
from striped_reference import CASES as STRIPED_CASES
from stu_reference import CASES as STU
from test_gated import LAYOUTS as GATED
from test_hyena import publish
from test_striped_hyena import publish as publish_striped
from tnn_reference import CASES as TNN

import flash_inference as fi
from flash_inference.errors import CheckpointError
from flash_inference.models.published import LAYOUTS

LENGTH = 12
BY_LAYOUT = {case.layout: partial(publish, case=case, length=LENGTH) for case in reversed(CASES)}
BY_LAYOUT |= {
    case.layout: partial(publish_striped, case=case) for case in STRIPED_CASES if case.id in ("sh-7b", "evo2")
}
BY_LAYOUT |= {
    case.layout: partial(publish_case, case=case, length=LENGTH) for case in reversed((*LONG_CONV, *STU, *TNN))
}
SIZES = ("d_model", "n_layer", "d_inner")
IN_LAYER = ("emb_dim", "filter_order", "l_max")
ORIGINAL = (*((name,) for name in SIZES), *(("layer", name) for name in IN_LAYER))
NEEDED = (("d_model",), ("n_layer",), ("vocab_size",), ("layer",), ("layer", "l_max"), ("layer", "filter_order"))
SHARED = ("3.freq", "5.freq", "lm_head.weight")
STRIPED = ("hidden_size", "num_layers", "num_attention_heads", "inner_mlp_size", "state_size", "short_filter_length")
STRIPED_NEEDED = ("hidden_size", "num_layers", "num_attention_heads", "vocab_size", "state_size", "tie_embeddings")
FIRST, SECOND = ("attn_layer_idxs", "hyena_layer_idxs"), ("hcs_layer_idxs", "hcm_layer_idxs", "hcl_layer_idxs")
SECOND_SIZES = ("hcs_filter_length", "hcm_filter_length", "hcs_filter_groups", "hcm_filter_groups")


def keys(names: tuple[str, ...]) -> tuple[tuple[str], ...]:
    return tuple((name,) for name in names)


TARGETS = {
    "hyenadna": Target("pytorch_model.bin", ORIGINAL, NEEDED, SHARED),
    "safari-hyena": Target("pytorch_model.bin", ORIGINAL, NEEDED, SHARED),
    "safari-hyena-standalone": Target("pytorch_model.bin", ORIGINAL, NEEDED, SHARED),
    "hyenadna-hf": Target(
        "model.safetensors",
        (*((name,) for name in SIZES), ("max_seq_len",), ("emb_dim",), ("filter_order",), ("num_inner_mlps",)),
        (("d_model",), ("n_layer",), ("vocab_size",), ("max_seq_len",), ("filter_order",)),
    ),
    "hyenadna-multimolecule": Target(
        "model.safetensors",
        (("hidden_size",), ("num_hidden_layers",), ("intermediate_size",), ("filter_emb_dim",), ("filter_order",)),
        (("hidden_size",), ("num_hidden_layers",), ("vocab_size",), ("max_position_embeddings",), ("model_type",)),
        ("lm_head.weight",),
    ),
    "stripedhyena": Target("pytorch-model.bin", keys(STRIPED), keys(STRIPED_NEEDED + FIRST), ("inv_freq",)),
    "stripedhyena2": Target(
        "evo2_7b.pt", keys(STRIPED + SECOND_SIZES), keys(STRIPED_NEEDED + SECOND + SECOND_SIZES), ("inv_freq",)
    ),
    "safari-long-conv": Target(
        "pytorch_model.bin",
        (*((name,) for name in SIZES), ("layer", "l_max")),
        (("d_model",), ("n_layer",), ("vocab_size",), ("layer",), ("layer", "l_max"), ("layer", "_name_")),
        ("lm_head.weight",),
    ),
    "sgconv": Target(
        "pytorch_model.bin",
        (*((name,) for name in SIZES), ("layer", "kernel_dim")),
        (("d_model",), ("n_layer",), ("vocab_size",), ("layer",), ("layer", "l_max"), ("layer", "_name_")),
        ("lm_head.weight",),
    ),
    "flash-stu": Target(
        "model.safetensors",
        (("n_embd",), ("n_layers",), ("seq_len",), ("num_eigh",), ("mlp_scale",)),
        (("n_embd",), ("n_layers",), ("seq_len",), ("num_eigh",), ("vocab_size",)),
    ),
    "tnn": Target(
        "checkpoint.pt",
        (("decoder_embed_dim",), ("decoder_layers",), ("rpe_embedding",), ("rpe_layers",), ("glu_dim",)),
        (("decoder_embed_dim",), ("decoder_layers",), ("vocab_size",), ("max_target_positions",), ("use_decay",)),
        ("output_projection.weight", "decoder.layer_norm.weight"),
    ),
}


def test_every_layout_is_damaged_here():
    """Here, or with the other tests of H3, S4D and MultiHyena."""
    assert TARGETS.keys() | {layout.name for layout in GATED} == {layout.name for layout in LAYOUTS}


@pytest.mark.parametrize("layout", TARGETS)
def test_sixty_damages_are_sixty_errors(tmp_path, layout):
    BY_LAYOUT[layout](tmp_path / "good", dtype=torch.float32)
    fi.load(tmp_path / "good")
    assert survives(tmp_path / "good", tmp_path / "bad", TARGETS[layout], range(60)) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", TARGETS)
def test_five_hundred_damages(tmp_path, layout):
    BY_LAYOUT[layout](tmp_path / "good", dtype=torch.float32)
    assert survives(tmp_path / "good", tmp_path / "bad", TARGETS[layout], range(60, 560)) == []


@pytest.mark.parametrize(("layout", "key"), [("hyenadna-hf", "num_inner_mlps"), ("tnn", "rpe_layers")])
def test_a_depth_beyond_all_tensors_is_refused_before_anything_is_built(tmp_path, layout, key):
    BY_LAYOUT[layout](tmp_path, dtype=torch.float32)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 10**9}))
    with pytest.raises(CheckpointError, match="asks for 1000000000 layers of the filter"):
        fi.load(tmp_path)
