"""The files of a published folder: its config, and its tensors from safetensors or from pickles of weights alone."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flash_inference.errors import CheckpointError

CONFIG = "config.json"
WHOLE = ("model.safetensors", "pytorch_model.bin", "pytorch-model.bin")
INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PIECE = re.compile(r"(?P<file>.+\.(?:bin|pt|pth|ckpt|safetensors))\.part(?P<number>\d+)")
AGAIN = "Fetch the file again."

PLAIN = (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple, io.BytesIO)

# What trainers put beside the weights. These names become empty dicts here: nothing of the packages is imported.
TRAINERS = (
    "omegaconf.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "abc.", "argparse.", "collections.",
    "typing.",
)  # fmt: skip


@dataclass(slots=True)
class Weights:
    """What a folder's weight files hold: tensors by published name, and the type names of what is no tensor."""

    path: Path
    tensors: dict[str, Tensor]
    others: dict[str, str] = field(default_factory=dict)


class Inert:
    """Stands for a class that a trainer's objects beside the weights were of: makes dicts that nobody reads.

    PyTorch's unpickler fills a dict, and gives it attributes, whatever the class; it does neither to other objects.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An empty dict."""
        return OrderedDict[Any, Any]()


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises CheckpointError if it is missing or is no JSON object."""
    return _read_json(folder / CONFIG)


def read_weights(folder: Path) -> Weights:
    """The tensors of a folder, on the CPU, under their published names.

    Takes the first of model.safetensors, pytorch_model.bin, pytorch-model.bin, their sharded forms with an index, the
    only *.safetensors, *.bin, *.pt, *.pth or *.ckpt, and pieces *.part0, *.part1, .. of one. Pickles are read with
    `weights_only=True`: no code in them runs. Raises CheckpointError, which names the file, for every damage.
    """
    for name in WHOLE:
        if (folder / name).is_file():
            return _read(folder / name)
    for name in INDEXED:
        if (folder / name).is_file():
            return _read_shards(folder / name)
    loose = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES) and path.is_file())
    if len(loose) == 1:
        return _read(loose[0])
    if loose:
        raise CheckpointError(
            f"{folder} has {len(loose)} weight files ({', '.join(path.name for path in loose)}) and no index that "
            "joins them. Leave the one to read, or fetch the index."
        )
    return _read_pieces(folder)


def _read(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return Weights(path, _read_safetensors(path))
    with path.open("rb") as file:
        return _unwrap(path, _read_pickle(path, file))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}. {AGAIN}") from None


def _read_shards(index: Path) -> Weights:
    """The tensors of all shards that an index names: each in the shard that it says, and no others."""
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{index} has no object 'weight_map' of names and files. {AGAIN}")
    weights = Weights(index, {})
    for file in sorted(set(where.values())):
        path = index.parent / file
        if Path(file).name != file or not path.is_file():
            raise CheckpointError(f"{index} names the shard {file!r}, which is not in the folder. Fetch it too.")
        shard = _read(path)
        listed, found = {name for name, at in where.items() if at == file}, {*shard.tensors, *shard.others}
        if listed != found:
            raise CheckpointError(
                f"{path} and {index.name} disagree: {_some(listed - found)} missing in the shard, "
                f"{_some(found - listed)} not in the index. Fetch both again, of one revision."
            )
        weights.tensors |= shard.tensors
        weights.others |= shard.others
    return weights


def _read_pieces(folder: Path) -> Weights:
    """A file that was cut into pieces, read as if they were joined."""
    pieces: dict[str, dict[int, Path]] = {}
    for path in folder.iterdir():
        if match := PIECE.fullmatch(path.name):
            pieces.setdefault(match["file"], {})[int(match["number"])] = path
    if len(pieces) != 1:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} has no weights that can be read; it has {found}. Expected {', '.join(WHOLE)}, shards with an "
            f"index, or one file that ends in .safetensors, {', '.join(PICKLES)} (or in pieces .part0, .part1, ..)."
        )
    ((name, parts),) = pieces.items()
    numbers = sorted(parts)
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] > 1:
        raise CheckpointError(f"{folder / name} lacks pieces: there are .part{numbers}. Fetch the others too.")
    whole = io.BytesIO(b"".join(parts[number].read_bytes() for number in numbers))
    path = folder / name
    if path.suffix != ".safetensors":
        return _unwrap(path, _read_pickle(path, whole))
    from safetensors.torch import load

    try:
        return Weights(path, load(whole.getvalue()))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the joined pieces of {path} are no safetensors file: {error}. {AGAIN}") from None


def _read_pickle(path: Path, file: Any) -> Any:
    """What a pickle holds, read by PyTorch's unpickler of weights."""
    try:
        _check_sums(path, file)
        with _trainers_inert(file):
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than weights, which is not read since it could run code: "
            f"{_reason(error)}. Fetch it again, or save its state dict alone, as safetensors."
        ) from None
    except Exception as error:  # A damaged pickle raises whatever its bytes happen to ask for.
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}. {AGAIN}") from None


def _reason(error: Exception) -> str:
    """What stopped PyTorch's unpickler, without its advice to read the pickle with all that it can do."""
    told = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return re.split(r"\.?\s+(?:Please|Check)\s|\n", told)[0].rstrip(". ") or type(error).__name__


def _check_sums(path: Path, file: Any) -> None:
    """Holds the parts of a zipped pickle against the sums stored with them, which PyTorch does not compare."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return
    with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise CheckpointError(f"{path} is damaged: its part {bad} has another checksum than was stored. {AGAIN}")
    file.seek(0)


@contextmanager
def _trainers_inert(file: Any) -> Iterator[None]:
    """Lets a pickle hold plain values, buffers, and the objects of trainers, which become `Inert`."""
    named: list[str] = []
    zipped = zipfile.is_zipfile(file)
    file.seek(0)
    if zipped:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    inert: list[Any] = [(Inert, name) for name in named if name.startswith(TRAINERS)]
    with torch.serialization.safe_globals([*PLAIN, *inert]):
        yield


def _unwrap(path: Path, content: Any) -> Weights:
    """The state dict in what was pickled: itself, or under "state_dict", "model" or "module"."""
    for key in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict, or a dict with one.")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return Weights(path, tensors, {k: type(v).__name__ for k, v in content.items() if not isinstance(v, Tensor)})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}. Fetch it too.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Check the file and its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}. {AGAIN}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a JSON {type(values).__name__}; expected an object. {AGAIN}")
    return values


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
