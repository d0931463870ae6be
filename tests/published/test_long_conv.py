"""safari's LongConv and SGConv: the laws of all published models, and what these refuse."""

from __future__ import annotations

import json

import pytest
import torch
from long_conv_reference import CASES
from published_laws import LAWS, publish, write

import flash_inference as fi
from flash_inference.errors import CheckpointError

LONG, SGCONV = CASES[0], CASES[3]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_published(tmp_path, case, law):
    law(tmp_path, case)


UNSUPPORTED = [
    (LONG, {"bidirectional": True}), (LONG, {"causal": False}), (LONG, {"activation": "relu"}), (LONG, {"lam": -1}),
    (LONG, {"weight_norm": True}), (LONG, {"smooth_freq": True}), (LONG, {"block_fft_conv": True}),
    (LONG, {"postact": "tanh"}), (LONG, {"postact": None}), (LONG, {"channels": 0}), (LONG, {"d_model": 9}),
    (LONG, {"ma_window_len": 4, "use_ma_smoothing": True}), (LONG, {"l_max": None}),
    (SGCONV, {"bidirectional": True}), (SGCONV, {"mode": "cat_randn_learnable"}), (SGCONV, {"mode": ["cat"]}),
    (SGCONV, {"ln": True}), (SGCONV, {"hyper_act": "gelu"}), (SGCONV, {"shift": True}), (SGCONV, {"linear": True}),
    (SGCONV, {"n_scales": 10**9}), (SGCONV, {"init_scale": 40}), (SGCONV, {"kernel_dim": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("case", "setting"), UNSUPPORTED, ids=lambda value: getattr(value, "id", str(value)))
def test_settings_that_mean_another_model_are_refused_by_name(tmp_path, case, setting):
    publish(tmp_path, case, length=20, layer=case.config(20)["layer"] | setting)
    name = "n_scales" if "init_scale" in setting else next(iter(setting))
    with pytest.raises(CheckpointError, match=rf"layer\.{name}('| = ).*(expected|default)"):
        fi.load(tmp_path)


def test_an_unknown_key_is_told_the_nearest(tmp_path):
    publish(tmp_path, LONG, length=20, layer=LONG.config(20)["layer"] | {"use_ma_smothing": True})
    with pytest.raises(CheckpointError, match=r"'layer\.use_ma_smothing'\. Did you mean 'use_ma_smoothing'"):
        fi.load(tmp_path)


def test_the_standalone_kernel_is_refused_since_its_upper_half_weighs_the_future(tmp_path):
    weights = publish(tmp_path, LONG, length=20)
    for i in range(2):
        kernel = weights.pop(f"backbone.layers.{i}.mixer.kernel.kernel")
        weights[f"backbone.layers.{i}.mixer.kernel"] = torch.cat([kernel, kernel], 2)
    write(tmp_path / LONG.file, weights)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mixer\.kernel \[1, 8, 40\].*upper half weighs the future"):
        fi.load(tmp_path)


def test_a_norm_that_was_never_set_is_refused(tmp_path):
    weights = publish(tmp_path, SGCONV, length=20)
    weights["backbone.layers.1.mixer.kernel_norm_initialized"] = torch.tensor(False)
    del weights["backbone.layers.0.mixer.kernel_norm_initialized"]
    write(tmp_path / SGCONV.file, weights)
    with pytest.raises(CheckpointError) as caught:
        fi.load(tmp_path)
    assert "layers.1.mixer.kernel_norm_initialized is False (torch.bool), expected True" in str(caught.value)
    assert "missing backbone.layers.0.mixer.kernel_norm_initialized []" in str(caught.value)


def test_text_is_that_of_gpt2(tmp_path):
    weights = publish(tmp_path, LONG, length=20)
    for name in ("backbone.embeddings.word_embeddings.weight", "lm_head.weight"):
        weights[name] = torch.ones(50264, 8, dtype=torch.float64)
    write(tmp_path / LONG.file, weights)
    config = LONG.config(20) | {"vocab_size": 50257}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fi.load(tmp_path).config.stop_tokens == (50256,)
