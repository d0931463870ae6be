"""Damaged folders of every layout: each an error of the library's, none a model."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from corruptions import Target, damage
from hyena_reference import CASES
from test_hyena import publish

import flash_inference as fi
from flash_inference.errors import FlashInferenceError
from flash_inference.models.published import LAYOUTS

LENGTH = 12
BY_LAYOUT = {case.layout: case for case in reversed(CASES)}
SIZES = ("d_model", "n_layer", "d_inner")
IN_LAYER = ("emb_dim", "filter_order", "l_max")
ORIGINAL = (*((name,) for name in SIZES), *(("layer", name) for name in IN_LAYER))
NEEDED = (("d_model",), ("n_layer",), ("vocab_size",), ("layer",), ("layer", "l_max"), ("layer", "filter_order"))
SHARED = ("3.freq", "5.freq", "lm_head.weight")

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
}


def test_every_layout_is_damaged_here():
    assert TARGETS.keys() == {layout.name for layout in LAYOUTS}


def survives(folder, broken, target: Target, seeds: range) -> list[str]:
    """What of many damages loaded all the same."""
    loaded = []
    for seed in seeds:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder, broken)
        told = damage(broken, target, random.Random(seed))
        try:
            fi.load(broken)
        except FlashInferenceError:
            continue
        loaded.append(f"{seed}: {told}")
    return loaded


@pytest.mark.parametrize("layout", TARGETS)
def test_sixty_damages_are_sixty_errors(tmp_path, layout):
    publish(tmp_path / "good", BY_LAYOUT[layout], torch.float32, LENGTH)
    fi.load(tmp_path / "good")
    assert survives(tmp_path / "good", tmp_path / "bad", TARGETS[layout], range(60)) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", TARGETS)
def test_five_hundred_damages(tmp_path, layout):
    publish(tmp_path / "good", BY_LAYOUT[layout], torch.float32, LENGTH)
    assert survives(tmp_path / "good", tmp_path / "bad", TARGETS[layout], range(60, 560)) == []
