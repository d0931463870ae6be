"""Model folders: what is saved loads bit for bit, and no damage ever loads."""

import dataclasses
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flash_inference.errors import CheckpointError, FlashInferenceError, ModelError
from flash_inference.models import weights
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.hyena import FilterConfig, HyenaConfig
from flash_inference.models.weights import CONFIG, MANIFEST, TENSORS, load, load_folder, save

TINY = HyenaConfig(8, 4, 1, 16, filter=FilterConfig(width=4), stop_tokens=(1,))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save(LanguageModel(TINY), tmp_path / "tiny")
    return tmp_path / "tiny"


def sign(folder):
    """Make the manifest agree with the files, as an editor of a folder would have to."""
    entries = {name: weights._entry((folder / name).read_bytes()) for name in (CONFIG, TENSORS)}
    (folder / MANIFEST).write_bytes(weights._render_manifest(entries))


def edit_config(folder, edit):
    values = json.loads((folder / CONFIG).read_text())
    edit(values)
    (folder / CONFIG).write_text(json.dumps(values))
    sign(folder)


def edit_tensors(folder, edit):
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS)
    sign(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_round_trip_is_exact(tmp_path, tied, order):
    config = dataclasses.replace(TINY, tied=tied, order=order, dropout=0.5)
    model = LanguageModel(config).eval().requires_grad_(False)
    save(model, tmp_path)
    again = load_folder(tmp_path)
    tokens = torch.randint(8, (2, 16))
    assert again.config == config
    assert torch.equal(again(tokens), model(tokens))
    assert not again.training
    assert not any(weight.requires_grad for weight in again.parameters())
    assert (again.head.weight is again.embedding.weight) == tied
    assert ("head.weight" in load_file(tmp_path / TENSORS)) != tied


def test_only_what_is_learned_is_stored(folder):
    names = set(load_file(folder / TENSORS))
    assert names == {name for name, _ in LanguageModel(TINY).named_parameters()}
    assert "blocks.0.mixer.filter.deltas" in names


def test_dtype_leaves_filters_in_float32(folder):
    model = load_folder(folder, dtype=torch.bfloat16, device="cpu")
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.blocks[0].mixer.filter.freq.dtype == torch.float32
    assert {weight.dtype for weight in load_folder(folder, dtype=torch.float64).parameters()} == {torch.float64}


def test_saving_twice_gives_the_same_bytes(folder, tmp_path):
    save(load_folder(folder), tmp_path / "again")
    for name in (CONFIG, TENSORS, MANIFEST):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_thousand_damages_are_a_thousand_errors(folder):
    rng = random.Random(0)
    for name in (CONFIG, TENSORS, MANIFEST):
        path = folder / name
        good = path.read_bytes()
        for i in range(334):
            bad = bytearray(good)
            if i % 2:
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            else:
                del bad[rng.randrange(len(bad)) :]
            path.write_bytes(bad)
            with pytest.raises(FlashInferenceError):
                load_folder(folder)
        path.write_bytes(good)
    load_folder(folder)


def test_every_byte_of_the_manifest_counts(folder):
    path = folder / MANIFEST
    good = path.read_bytes()
    for i in range(len(good)):
        bad = bytearray(good)
        bad[i] ^= 1 << i % 8
        path.write_bytes(bad)
        with pytest.raises(FlashInferenceError):
            weights._read_checked(folder)


@pytest.mark.parametrize("name", [CONFIG, TENSORS, MANIFEST])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        load_folder(folder)
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_folder(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"files": 3}', b'{"files": {}}', b"[" * 100_000])
def test_malformed_manifest(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=MANIFEST):
        load_folder(folder)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda v: v.update(format="other"), "format 'other'"),
        (lambda v: v.update(version=2), "version 2.*reads 1"),
        (lambda v: v.update(family="hyaena"), "unknown family 'hyaena'. Did you mean 'hyena'"),
        (lambda v: v.pop("config"), "no object 'config'"),
        (lambda v: v["config"].update(widht=4), "unknown key 'widht'.*Did you mean 'width'"),
        (lambda v: v["config"].pop("vocab_size"), "vocab_size"),
        (lambda v: v["config"].update(width="4"), "describes|make"),
        (lambda v: v["config"].update(stop_tokens=3), "describes|make"),
        (lambda v: v["config"].update(layers=2.5), "describes|make"),
        (lambda v: v["config"]["filter"].update(kind="magic"), "'magic' is unknown"),
        (lambda v: v["config"].update(width=8), r"embedding.weight is \[8, 4\], expected \[8, 8\]"),
    ],
)
def test_wrong_config(folder, edit, named):
    edit_config(folder, edit)
    with pytest.raises(ModelError, match=named):
        load_folder(folder)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop("norm.bias"), r"missing norm.bias \[4\]"),
        (lambda t: t.update(extra=torch.zeros(3)), r"unexpected extra \[3\]"),
        (lambda t: t.update({"head.weight": torch.zeros(8, 4)}), r"unexpected head.weight \[8, 4\]"),
        (lambda t: t.update({"norm.bias": torch.zeros(5)}), r"norm.bias is \[5\], expected \[4\]"),
        (lambda t: t.update({"norm.bias": torch.zeros(4, dtype=torch.int32)}), "norm.bias is torch.int32, expected"),
        (lambda t: t.update({"norm.bias": torch.zeros(4).double()}), "norm.bias is torch.float64, expected"),
        (lambda t: t["norm.bias"].fill_(float("nan")), "norm.bias has NaN"),
        (lambda t: t["norm.bias"].fill_(float("inf")), "norm.bias has NaN or infinity"),
    ],
)
def test_wrong_tensors(folder, edit, named):
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=named):
        load_folder(folder)


def test_tensors_that_are_no_safetensors(folder):
    (folder / TENSORS).write_bytes(b"junk" * 10)
    sign(folder)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_folder(folder)


def test_missing_folder_and_unknown_name(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"neither a shipped model nor a folder. Did you mean 'shakespeare'"):
        load("shakespear")


def test_load_takes_folders(folder):
    assert load(folder).config == load(str(folder)).config == TINY


def test_save_refuses_what_would_not_load(tmp_path):
    with pytest.raises(ModelError, match="cannot save a Linear"):
        save(torch.nn.Linear(2, 2), tmp_path)
    model = LanguageModel(TINY)
    model.embedding.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"embedding.weight has NaN"):
        save(model, tmp_path)


def test_a_picture_or_card_is_not_checked(folder):
    (folder / "README.md").write_text("anything")
    load_folder(folder)


@pytest.mark.parametrize("name", weights.shipped())
def test_shipped_models_load_and_fit(name, tmp_path):
    model = load(name)
    assert model.config.dropout == 0
    assert sum(weight.numel() for weight in model.parameters()) < 4_200_000
    for path in (weights.PRETRAINED / name).iterdir():
        assert path.stat().st_size < 2**24
    damaged = shutil.copytree(weights.PRETRAINED / name, tmp_path / name)
    content = bytearray((damaged / TENSORS).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / TENSORS).write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256"):
        load(damaged)
