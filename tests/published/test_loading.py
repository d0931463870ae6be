"""Which layout a folder has, what is told about it, and the command that converts it."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from hyena_reference import CASES, random_weights
from test_hyena import publish
from typer.testing import CliRunner

import flash_inference as fi
from flash_inference.cli import app
from flash_inference.errors import CheckpointError, ModelError
from flash_inference.models.published import LAYOUTS, to_published
from flash_inference.models.published.files import read_config, read_weights
from flash_inference.models.published.layout import read

HYENADNA, HF, SAFARI = CASES[0], CASES[4], CASES[7]


def test_a_folder_of_another_family_is_told_by_what_it_has(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    torch.save({"model.embed_tokens.weight": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model_type 'llama'.*'hidden_size'.*'model' \(1\).*no published layout"):
        fi.load(tmp_path)


def test_an_unknown_layout_is_told_the_nearest(tmp_path):
    publish(tmp_path, HYENADNA, length=20, layout="hyenadma")
    with pytest.raises(CheckpointError, match=r"layout 'hyenadma' is unknown\. Did you mean 'hyenadna'"):
        fi.load(tmp_path)


def test_an_unknown_key_is_told_the_nearest(tmp_path):
    publish(tmp_path, HF, length=20, hyena_ordr=2)
    with pytest.raises(CheckpointError, match=r"unknown key 'hyena_ordr'\. Did you mean 'hyena_order'"):
        fi.load(tmp_path)


def test_state_beside_the_weights_is_passed_over_and_other_objects_are_not(tmp_path):
    weights = random_weights(HYENADNA, 20)
    publish(tmp_path, HYENADNA, length=20)
    torch.save(weights | {"backbone.layers.0._extra_state": None}, tmp_path / "pytorch_model.bin")
    fi.load(tmp_path)
    torch.save(weights | {"backbone.layers.0.mode": "fast"}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"backbone\.layers\.0\.mode is of type str, expected a tensor"):
        fi.load(tmp_path)


def test_a_tensor_that_may_keep_float32_among_16_bits(tmp_path):
    layout = next(layout for layout in LAYOUTS if layout.name == HYENADNA.layout)
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(HYENADNA, 20).items()}
    times = "backbone.layers.0.mixer.filter_fn.pos_emb.t"
    weights[times] = weights[times].float() + 1e-4
    publish(tmp_path, HYENADNA, torch.bfloat16, length=20)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pos_emb\.t is torch\.float32, expected torch\.bfloat16 as most are"):
        fi.load(tmp_path)
    allowing = dataclasses.replace(
        layout,
        renames=lambda config, names: [
            dataclasses.replace(rename, float32=rename.ours.endswith(".t")) for rename in layout.renames(config, names)
        ],
    )
    model = read(allowing, read_config(tmp_path), read_weights(tmp_path))
    assert torch.equal(model.blocks[0].mixer.filter.t, weights[times][0, :, 0])
    assert model.blocks[0].mixer.in_proj.weight.dtype == torch.bfloat16


def test_a_model_of_another_family_does_not_go_into_a_layout(tmp_path):
    with pytest.raises(ModelError, match=r"layout 'hyenadna' has no room for this model"):
        to_published(fi.load("shakespeare"), "hyenadna")


def test_notes_are_logged_without_a_warning(tmp_path, caplog, recwarn):
    publish(tmp_path, HYENADNA, length=20)
    with caplog.at_level(logging.INFO, logger="flash_inference"):
        model = fi.load(tmp_path)
    assert [record.levelname for record in caplog.records] == ["INFO"] * len(model.notes)
    assert all(note in caplog.text for note in model.notes)
    assert not recwarn.list


def test_safari_reads_the_gpt2_vocabulary(tmp_path):
    weights = random_weights(SAFARI, 20)
    for name in ("backbone.embeddings.word_embeddings.weight", "lm_head.weight"):
        weights[name] = torch.ones(50264, 8, dtype=torch.float64)
    publish(tmp_path, SAFARI, length=20, weights=weights, vocab_size=50257)
    model = fi.load(tmp_path)
    assert model.config.vocab_size == 50264
    assert model.config.start_token == 50256
    assert model.config.stop_tokens == (50256,)
    assert "put the family's there" in model.notes[-1]


def test_convert_writes_our_format_and_tells_what_was_assumed(tmp_path):
    publish(tmp_path / "theirs", HF, torch.float32)
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    assert "shift is stored nowhere; 0.05 was used" in result.stderr
    assert (tmp_path / "ours" / "manifest.json").is_file()
    ours, theirs = (fi.load(tmp_path / name).state_dict() for name in ("ours", "theirs"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = CliRunner().invoke(app, ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--json"])
    assert again.exit_code == 2
    assert "is no empty folder" in again.stderr


def test_convert_prints_notes_as_json(tmp_path):
    publish(tmp_path / "theirs", HF, torch.float32, length=20)
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--json"])
    values = json.loads(result.stdout)
    assert values["config"]["tokens"] == "dna"
    assert any("shift" in told for told in values["notes"])


def test_convert_needs_a_folder(tmp_path):
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "none"), str(tmp_path / "ours")])
    assert result.exit_code == 2
    assert "is no folder" in result.stderr
