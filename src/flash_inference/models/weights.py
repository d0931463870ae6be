"""Model folders: config.json, model.safetensors, a tokenizer.json if need be, and a manifest.json that vouches for all.

A folder loads whole and unharmed or not at all: every truncation and every flipped bit of these files raises
CheckpointError or ModelError. Other files of the folder (a model card, pictures) are not looked at.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as render_tensors
from torch import Tensor

from flash_inference.errors import CheckpointError, ModelError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.families import FAMILIES
from flash_inference.models.published import read_published
from flash_inference.models.tensors import assign, cast, shape, stored
from flash_inference.models.tokenizer import FileTable
from flash_inference.models.tokens import TOKENIZER

FORMAT, VERSION = "flash-inference", 1
CONFIG, TENSORS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
PRETRAINED = Path(__file__).parents[1] / "pretrained"


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{MANIFEST}"))


def load(
    name_or_folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LanguageModel:
    """A shipped model by name, or the model in a folder: as `load_folder` gives it, or as `read_published` does.

    A folder with a manifest.json, or whose config.json names this format, is ours; any other is read as its authors
    published it. A shipped name wins over a folder of that name: write "./name" for the folder. Anything else raises
    ModelError.
    """
    names = shipped()
    if str(name_or_folder) in names:
        return load_folder(PRETRAINED / name_or_folder, dtype, device)
    if Path(name_or_folder).exists() or os.sep in str(name_or_folder):
        folder = Path(name_or_folder)
        return load_folder(folder, dtype, device) if _is_ours(folder) else read_published(folder, dtype, device)
    raise ModelError(
        f"model {str(name_or_folder)!r} is neither a shipped model nor a folder. {_nearest(str(name_or_folder), names)}"
        f"Shipped models: {', '.join(names) or 'none'}."
    )


def _is_ours(folder: Path) -> bool:
    """Whether `save` wrote the folder, even if it lost its manifest since."""
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return True
    config = folder / CONFIG
    return config.is_file() and f'"{FORMAT}"' in config.read_text(encoding="utf-8", errors="replace")


def load_folder(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LanguageModel:
    """The model in `folder`, checked against its manifest, in eval mode with gradients off.

    `dtype` converts the weights; a dtype below float32 leaves the filters as stored, for their taps need float32.
    Any damage raises CheckpointError. Peak memory: twice the file.
    """
    folder = Path(folder)
    contents = _read_checked(folder)
    model = _build(folder, contents[CONFIG])
    tensors = _parse(folder, contents[TENSORS])
    _check_tensors(folder, tensors, stored(model))
    assign(model, {name: cast(name, tensor, dtype, device) for name, tensor in tensors.items()})
    if TOKENIZER in contents:
        model.table = FileTable(contents[TOKENIZER].decode(), str(folder / TOKENIZER))
    return model.eval().requires_grad_(False)


def save(model: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Write `model` as a folder that `load_folder` reads: each file is replaced whole, the manifest last.

    Tied weights are stored once; what is rebuilt from the config is not stored. Weights that are not finite raise.
    """
    folder = Path(folder)
    if type(model) is not LanguageModel:
        raise ModelError(f"cannot save a {type(model).__name__}; expected a LanguageModel.")
    family = next((name for name, kind in FAMILIES.items() if type(model.config) is kind), None)
    if family is None:
        raise ModelError(
            f"cannot save a model of {type(model.config).__name__}; the known families are {', '.join(FAMILIES)}. "
            "Add it to FAMILIES in models/families.py."
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored(model).items()}
    _check_tensors(folder, tensors, tensors)
    config = {"format": FORMAT, "version": VERSION, "family": family, "config": model.config.to_dict()}
    contents = {CONFIG: _render(config), TENSORS: render_tensors(tensors)}
    if isinstance(model.table, FileTable):
        contents[TOKENIZER] = model.table.text.encode()
    contents[MANIFEST] = _render_manifest({name: _entry(content) for name, content in contents.items()})
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        part = folder / f"{name}.part"
        part.write_bytes(content)
        os.replace(part, folder / name)


# ------------------------------------------------------------------------------------------------ files and manifest


def _read_checked(folder: Path) -> dict[str, bytes]:
    """The bytes of config, tensors and, where there is one, tokenizer, each as the manifest says they are."""
    if not folder.is_dir():
        raise CheckpointError(f"model folder {folder} does not exist, or is no folder. Check the path.")
    entries = _manifest_entries(folder)
    contents = {name: _read(folder, name) for name in (CONFIG, TENSORS, TOKENIZER) if name in entries}
    for name, content in contents.items():
        got, expected = _entry(content), entries[name]
        for what in ("bytes", "sha256"):
            if got[what] != expected[what]:
                raise CheckpointError(
                    f"{folder / name} is damaged: its {what} is {got[what]}; {MANIFEST} expects {expected[what]}. "
                    "Fetch or save the folder again."
                )
    return contents


def _manifest_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's list of files. The manifest must read, byte for byte, as `save` would write that list."""
    content = _read(folder, MANIFEST)
    entries = _parse_json(folder / MANIFEST, content).get("files")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise CheckpointError(f"{folder / MANIFEST} has no object 'files' of objects. Fetch or save the folder again.")
    for name in (CONFIG, TENSORS, *({TOKENIZER} & set(entries))):
        if set(entries.get(name, ())) != {"bytes", "sha256"}:
            raise CheckpointError(
                f"{folder / MANIFEST} does not list {name} with 'bytes' and 'sha256'; it lists "
                f"{', '.join(map(repr, entries)) or 'nothing'}. Fetch or save the folder again."
            )
    if content != _render_manifest(entries):
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged: it differs from what its own entries and digest make. "
            "Fetch the folder again, or save it again if it was edited by hand."
        )
    return entries


def _render_manifest(entries: dict[str, dict[str, Any]]) -> bytes:
    """The manifest's bytes: the entries and a digest over them, so that no bit can change unseen."""
    digest = hashlib.sha256(_render(entries)).hexdigest()
    return _render({"format": FORMAT, "version": VERSION, "files": entries, "digest": digest})


def _entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _render(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {name}; a model folder holds {CONFIG}, {TENSORS} and {MANIFEST}. "
            "Fetch or save the folder again."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}. Check the file and its permissions.") from None


def _parse_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}. Fetch or save the folder again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a JSON {type(values).__name__}; expected an object.")
    return values


# --------------------------------------------------------------------------------------------------- config and model


def _build(folder: Path, content: bytes) -> LanguageModel:
    """The model that config.json describes, on the meta device: shapes without numbers."""
    path = folder / CONFIG
    values = _parse_json(path, content)
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        if values.get(key) != expected:
            raise CheckpointError(
                f"{path} has {key} {values.get(key)!r}; this release reads {expected!r}. "
                "Use a folder that `save` wrote, or a release that knows this one."
            )
    family = values.get("family")
    if family not in FAMILIES:
        hint = _nearest(str(family), list(FAMILIES))
        raise CheckpointError(f"{path} has unknown family {family!r}. {hint}Known: {', '.join(FAMILIES)}.")
    if not isinstance(values.get("config"), dict):
        raise CheckpointError(f"{path} has no object 'config'. Fetch or save the folder again.")
    try:
        with torch.device("meta"):
            return LanguageModel(FAMILIES[family].from_dict(values["config"]))
    except ModelError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} describes no {family} model: {error}. Check the types of its values.") from None


def _nearest(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, 1)
    return f"Did you mean {near[0]!r}? " if near else ""


# ------------------------------------------------------------------------------------------------------------ tensors


def _parse(folder: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return parse_tensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / TENSORS} is no safetensors file: {error}. Save the folder again.") from None


def _check_tensors(folder: Path, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every name once, every shape as the config makes it, one floating dtype but for filters, all finite."""
    faults = [f"missing {name} {shape(expected[name])}" for name in expected if name not in got]
    faults += [f"unexpected {name} {shape(got[name])}" for name in got if name not in expected]
    both = [name for name in expected if name in got]
    faults += [
        f"{name} is {shape(got[name])}, expected {shape(expected[name])}"
        for name in both
        if got[name].shape != expected[name].shape
    ]
    dtype = got[both[0]].dtype if both and got[both[0]].is_floating_point() else torch.float32
    faults += [
        f"{name} is {got[name].dtype}, expected {dtype}"
        for name in both
        if got[name].dtype != dtype
        and not (dtype.itemsize < 4 and ".filter." in name and got[name].dtype == torch.float32)
    ]
    faults += [f"{name} has NaN or infinity" for name in both if not torch.isfinite(got[name]).all()]
    if faults:
        raise CheckpointError(
            f"the tensors of {folder / TENSORS} do not make the model of {CONFIG}: {'; '.join(faults)}. "
            "Save config and tensors from one and the same model."
        )
