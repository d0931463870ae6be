"""Toeplitz networks: the laws of all published models, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from published_laws import LAWS, publish, write
from tnn_reference import CASES

import flash_inference as fi
from flash_inference.errors import CheckpointError, LengthError


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_published(tmp_path, case, law):
    law(tmp_path, case)


UNSUPPORTED = [
    {"par_type": 2}, {"par_type": 3}, {"normalize": True}, {"causal": False}, {"decoder_normalize_before": False},
    {"use_norm": True}, {"resi_param": True}, {"bias": False}, {"norm_type": "rmsnorm"}, {"norm_type": None},
    {"expand_ratio": 0}, {"act_fun": "leak"},
    {"rpe_act": "1+elu"}, {"glu_dim": 0}, {"use_multi_decay": True}, {"no_token_positional_embeddings": False},
    {"adaptive_input": True}, {"decoder_input_dim": 4}, {"fina_act": "silu"}, {"gamma": -0.5}, {"rpe_layers": -1},
]  # fmt: skip


@pytest.mark.parametrize("setting", UNSUPPORTED, ids=str)
def test_settings_that_mean_another_model_are_refused_by_name(tmp_path, setting):
    publish(tmp_path, CASES[0], length=20, **setting)
    with pytest.raises(CheckpointError, match=rf"{next(iter(setting))} = .*expected"):
        fi.load(tmp_path)


def test_a_filter_that_depends_on_the_length_is_told_why(tmp_path):
    publish(tmp_path, CASES[0], length=20, par_type=2)
    with pytest.raises(CheckpointError, match=r"par_type = 2; expected 1, since taps then depend on the length"):
        fi.load(tmp_path)


def test_fairseqs_version_is_passed_over(tmp_path):
    weights = publish(tmp_path, CASES[0], length=20)
    write(tmp_path / CASES[0].file, weights | {"decoder.version": torch.tensor([3.0])})
    fi.load(tmp_path)


def test_no_more_positions_than_the_config_says(tmp_path):
    publish(tmp_path, CASES[0], length=20)
    with pytest.raises(LengthError, match="21 positions were given"):
        fi.load(tmp_path)(torch.zeros(1, 21, dtype=torch.long))
