"""Published Hyena models load as what their definition says, decode as they read, and go back as they came."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hyena_reference import CASES, Case, config_of, logits, random_weights
from published_laws import greedy_is_recompute, keeps_every_number, steps_are
from safetensors.torch import save_file

import flash_inference as fi
from flash_inference.errors import CheckpointError
from flash_inference.models.published import to_published

LENGTH = 300
cases = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


def publish(folder, case: Case, dtype=torch.float64, length=LENGTH, weights=None, **config):
    weights = random_weights(case, length) if weights is None else weights
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(case, length) | config))
    if case.flat:
        save_file(weights, folder / "model.safetensors")
    elif case.backbone.startswith("model."):
        torch.save({"state_dict": weights, "epoch": 3}, folder / "weights.ckpt")
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return weights


def some_ids(case: Case, length=LENGTH):
    return torch.randint(case.vocab, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@cases
def test_logits_are_those_of_the_definition(tmp_path, case):
    weights, ids = publish(tmp_path, case), some_ids(case)
    expected = logits(case, weights, LENGTH, ids)
    got = fi.load(tmp_path)(torch.tensor([ids]))[0].numpy()
    assert np.abs(got - expected).max() <= 1e-9 * np.abs(expected).max()


@cases
def test_logits_in_float32(tmp_path, case):
    weights, ids = publish(tmp_path, case, torch.float32), some_ids(case)
    expected = logits(case, weights, LENGTH, ids)
    got = fi.load(tmp_path)(torch.tensor([ids]))[0]
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


@cases
def test_state_dicts_round_trip(tmp_path, case):
    weights = publish(tmp_path, case)
    model = fi.load(tmp_path)
    again = to_published(model, case.layout, names=weights)
    assert set(weights) <= set(again)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    extra = set(again) - set(weights)
    assert all(name.endswith((".freq", "lm_head.weight")) for name in extra)
    assert model.notes


@cases
def test_our_format_keeps_every_number(tmp_path, case):
    publish(tmp_path / "theirs", case, torch.float32)
    keeps_every_number(tmp_path / "theirs", tmp_path / "ours")


@cases
def test_cached_steps_equal_the_definition_after_prompts_of_every_length(tmp_path, case):
    weights, ids = publish(tmp_path, case), some_ids(case)
    steps_are(fi.load(tmp_path), ids, logits(case, weights, LENGTH, ids))


@cases
def test_greedy_tokens_equal_full_recompute(tmp_path, case):
    publish(tmp_path, case)
    greedy_is_recompute(fi.load(tmp_path), some_ids(case, 7))


UNSUPPORTED = [
    {"bidirectional": True}, {"num_blocks": 2}, {"num_heads": 2}, {"outer_mixing": True}, {"post_order_ffn": True},
    {"activation": "gelu"}, {"inner_factor": 2}, {"normalized": True}, {"shift": "0.05"}, {"shift": -1},
    {"modulate": 1}, {"filter_cls": "other"}, {"emb_dim": 4}, {"_name_": "h3"}, {"local_order": 4}, {"order": 1},
]  # fmt: skip


@pytest.mark.parametrize("setting", UNSUPPORTED, ids=[str(setting) for setting in UNSUPPORTED])
@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=["hyenadna", "safari"])
def test_settings_that_mean_another_model_are_refused_by_name(tmp_path, case, setting):
    publish(tmp_path, case, length=20)
    config = config_of(case, 20)
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer": config["layer"] | setting}))
    with pytest.raises(CheckpointError, match=rf"layer\.{next(iter(setting))} = .*expected"):
        fi.load(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [{"hyena_order": 3}, {"short_filter_order": 4}, {"layer_norm_epsilon": 1e-6}, {"train_freq": False},
     {"vocab_size": 13}],
    ids=str,
)  # fmt: skip
def test_settings_that_the_port_ignores_or_cannot_hold_are_refused(tmp_path, setting):
    case = CASES[4]
    publish(tmp_path, case, length=20, **setting)
    with pytest.raises(CheckpointError, match=f"{next(iter(setting))} = .*expected"):
        fi.load(tmp_path)


def test_above_order_2_the_channel_layout_must_be_named(tmp_path):
    case = CASES[9]
    publish(tmp_path, case, length=20)
    config = config_of(case, 20)
    del config["layout"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"fits 'safari-hyena' and 'safari-hyena-standalone'.*add \"layout\""):
        fi.load(tmp_path)


def test_a_small_vocabulary_leaves_the_family_open(tmp_path):
    publish(tmp_path, CASES[7], length=20, vocab_size=20)
    with pytest.raises(CheckpointError, match=r'no published layout.*hyenadna.*safari-hyena.*add "layout"'):
        fi.load(tmp_path)


def test_every_fault_is_told_at_once_by_its_published_name(tmp_path):
    case = CASES[2]
    weights = random_weights(case, 20)
    name = "model.backbone.layers.{}.mixer.layer.{}"
    del weights[name.format(0, "in_proj.weight")]
    weights[name.format(1, "filter_fn.modulation.deltas")] = torch.zeros(1, 8, dtype=torch.float64)
    weights[name.format(1, "out_proj.bias")][3] = float("nan")
    weights[name.format(0, "filter_fn.implicit_filter.5.freq")][0, 1] += 1e-9
    weights["model.decoder.weight"] = torch.zeros(2, 3, dtype=torch.float64)
    publish(tmp_path, case, length=20, weights=weights)
    with pytest.raises(CheckpointError) as caught:
        fi.load(tmp_path)
    for told in (
        "missing model.backbone.layers.0.mixer.layer.in_proj.weight [24, 8]",
        "model.backbone.layers.1.mixer.layer.filter_fn.modulation.deltas is [1, 8], expected [1, 1, 8]",
        "model.backbone.layers.1.mixer.layer.out_proj.bias has NaN or infinity",
        "implicit_filter.5.freq differs from model.backbone.layers.0.mixer.layer.filter_fn.implicit_filter.1.freq",
        "unexpected model.decoder.weight [2, 3]",
    ):
        assert told in str(caught.value)


def test_notes_tell_the_defaults_that_no_file_states(tmp_path):
    publish(tmp_path, CASES[0], length=20)
    told = "; ".join(fi.load(tmp_path).notes)
    assert "shift is stored nowhere; 0.05 was used" in told
    assert "the head is not stored" in told
    assert "num_inner_mlps is not given; the published default 2" in told


def test_dna_models_draw_letters_alone(tmp_path):
    publish(tmp_path, CASES[0], length=40)
    model = fi.load(tmp_path)
    made = fi.generate(model, "ACGT", max_new_tokens=30, allowed=model.tokens.letters, temperature=1.0, seed=0)
    assert set(model.tokens.decode(made[0].tolist())) <= set("ACGT")
    assert model.tokens.encode("acgtn") == [7, 8, 9, 10, 11]


def test_sixteen_bit_checkpoints_load(tmp_path):
    case = CASES[4]
    weights, ids = publish(tmp_path, case, torch.bfloat16), torch.tensor([some_ids(case)])
    expected = logits(case, weights, LENGTH, ids[0].tolist())
    got = fi.load(tmp_path, dtype=torch.float64)(ids)[0].numpy()
    assert np.abs(got - expected).max() <= 1e-9 * np.abs(expected).max()
    model = fi.load(tmp_path)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.blocks[0].mixer.filter.parameters()} == {torch.float32}
    fi.save(model, tmp_path / "ours")
    again = fi.load(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
