"""The files of a published folder: every form is read, and every damage is one error that names the file."""

from __future__ import annotations

import io
import json
import sys
import types
from collections import defaultdict

import pytest
import torch
from safetensors.torch import save_file

from flash_inference.errors import CheckpointError
from flash_inference.models.published.files import read_config, read_weights

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4)}


def same(weights):
    assert weights.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(weights.tensors[name], TENSORS[name]) for name in TENSORS)
    return weights


def shard(folder, names=("one.safetensors", "two.safetensors")):
    where = dict(zip(TENSORS, names, strict=True))
    for name, file in where.items():
        save_file({name: TENSORS[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_safetensors(tmp_path, name):
    save_file(TENSORS, tmp_path / name)
    assert same(read_weights(tmp_path)).path == tmp_path / name


@pytest.mark.parametrize("wrapped", [None, "state_dict", "module", "model"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch-model.bin", "evo2.pt", "weights.ckpt"])
def test_pickles(tmp_path, name, wrapped):
    torch.save({wrapped: TENSORS, "step": 3} if wrapped else TENSORS, tmp_path / name)
    same(read_weights(tmp_path))


def test_pickles_of_old_releases(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    same(read_weights(tmp_path))


def test_safetensors_come_first(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    same(read_weights(tmp_path))


def test_shards(tmp_path):
    shard(tmp_path)
    same(read_weights(tmp_path))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["evo2_40b.pt", "model.safetensors"])
def test_pieces_are_joined_in_the_order_of_their_numbers(tmp_path, name, first):
    whole = tmp_path / name
    torch.save(TENSORS, whole) if name.endswith("pt") else save_file(TENSORS, whole)
    content = whole.read_bytes()
    whole.unlink()
    size = -(-len(content) // 12)
    for n in range(12):
        (tmp_path / f"{name}.part{first + n}").write_bytes(content[n * size : (n + 1) * size])
    same(read_weights(tmp_path))
    (tmp_path / f"{name}.part3").unlink()
    with pytest.raises(CheckpointError, match="lacks pieces"):
        read_weights(tmp_path)


def test_buffers_beside_the_weights_are_kept_apart(tmp_path):
    torch.save(TENSORS | {"a._extra_state": io.BytesIO(b"fp8"), "n": None}, tmp_path / "evo2.pt")
    assert same(read_weights(tmp_path)).others == {"a._extra_state": "BytesIO", "n": "NoneType"}


def test_what_a_trainer_pickled_beside_the_weights_is_not_imported(tmp_path, monkeypatch):
    module = types.ModuleType("omegaconf.dictconfig")

    class DictConfig(dict):
        def __setstate__(self, state):
            raise AssertionError("the trainer's own class was used")

        def __reduce__(self):
            return DictConfig, (), {"_content": {"lr": 1.0}}

    DictConfig.__module__, DictConfig.__qualname__ = module.__name__, "DictConfig"
    module.DictConfig = DictConfig
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    beside = {
        "hyper_parameters": DictConfig(),
        "callbacks": defaultdict(dict, {"a": {1: 2}}),
        "kinds": [int, dict, list],
    }
    torch.save({"state_dict": TENSORS} | beside, tmp_path / "weights.ckpt")
    monkeypatch.undo()
    same(read_weights(tmp_path))


class Harm:
    def __reduce__(self):
        return exec, ("import flash_inference; flash_inference.harmed = True",)


def test_a_pickle_that_would_run_code_runs_none(tmp_path):
    import flash_inference

    torch.save({"state_dict": TENSORS, "x": Harm()}, tmp_path / "weights.ckpt")
    with pytest.raises(
        CheckpointError,
        match=r"weights\.ckpt.*more than weights.*: Unsupported global: GLOBAL exec.*safetensors",
    ):
        read_weights(tmp_path)
    assert not hasattr(flash_inference, "harmed")


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


DAMAGES = {
    "nothing": (lambda f: None, "no weights that can be read; it has nothing"),
    "cut safetensors": (lambda f: (save_file(TENSORS, f / "m.safetensors"), cut(f / "m.safetensors")), "m.safetensors"),
    "cut pickle": (lambda f: (torch.save(TENSORS, f / "m.bin"), cut(f / "m.bin")), "m.bin"),
    "two files": (lambda f: (torch.save({}, f / "a.bin"), torch.save({}, f / "b.pt")), "2 weight files (a.bin, b.pt)"),
    "lost shard": (lambda f: (shard(f), (f / "two.safetensors").unlink()), "'two.safetensors', which is not in"),
    "shard elsewhere": (lambda f: shard_outside(f), "which is not in the folder"),
    "swapped shards": (lambda f: (shard(f), swap(f / "one.safetensors", f / "two.safetensors")), "disagree"),
    "cut index": (lambda f: (shard(f), cut(f / "model.safetensors.index.json")), "index.json is no JSON"),
    "empty index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no object 'weight_map'"),
    "a list": (lambda f: torch.save([1, 2], f / "m.pt"), "holds a list; expected a state dict"),
    "numbers for names": (lambda f: torch.save({1: torch.ones(1)}, f / "m.pt"), "expected a state dict"),
    "a web page": (lambda f: (f / "m.bin").write_text("<html>404</html>"), "m.bin"),
}  # fmt: skip


def swap(one, two):
    one.rename(one.with_suffix(".x"))
    two.rename(one)
    one.with_suffix(".x").rename(two)


def shard_outside(folder):
    inside = folder / "inside"
    inside.mkdir()
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": "../one.safetensors"}}))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_one_error_with_the_files_name(tmp_path, name):
    harm, told = DAMAGES[name]
    harm(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"), [(None, "has no config"), (b"{", "is no JSON"), (b"[1]", "a JSON list"), (b"\xff", "no JSON")]
)
def test_a_config_is_an_object(tmp_path, content, told):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=told):
        read_config(tmp_path)
