"""Random damage to a published folder: each kind makes another model, or none, so that loading must raise.

`damage(folder, rng)` reads what is there, does one thing to it, and says what. It knows tensors, configs and bytes, but
no family: `numbers` are the config's sizes (a path of keys each), `optional` names that may well be missing.
"""

from __future__ import annotations

import json
import random
import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import flash_inference as fi
from flash_inference.errors import FlashInferenceError


@dataclass(frozen=True)
class Target:
    """A folder's weight file, the sizes in its config, and the endings of tensor names that may be missing."""

    file: str
    numbers: tuple[tuple[str, ...], ...]
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()


def damage(folder: Path, target: Target, rng: random.Random) -> str:
    """Does one random kind of damage, and tells which."""
    kind = rng.choice(KINDS)
    return f"{kind.__name__}: {kind(folder, target, rng)}"


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file."""
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return content.get("state_dict", content.get("model", content))


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A weight file as its suffix says."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors} if path.suffix == ".ckpt" else tensors, path)


def _of_tensors(edit: Callable[[dict[str, torch.Tensor], Target, random.Random], str]):
    def kind(folder: Path, target: Target, rng: random.Random) -> str:
        tensors = dict(read(folder / target.file))
        told = edit(tensors, target, rng)
        write(folder / target.file, tensors)
        return told

    kind.__name__ = edit.__name__
    return kind


def _of_config(edit: Callable[[dict[str, Any], Target, random.Random], str]):
    def kind(folder: Path, target: Target, rng: random.Random) -> str:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        told = edit(config, target, rng)
        path.write_text(json.dumps(config))
        return told

    kind.__name__ = edit.__name__
    return kind


def _pick(tensors: dict[str, torch.Tensor], target: Target, rng: random.Random) -> str:
    return rng.choice([name for name in tensors if not name.endswith(target.optional or ("?",))])


def _typo(word: str, rng: random.Random) -> str:
    place = rng.randrange(len(word))
    return word[:place] + rng.choice(string.ascii_lowercase) + word[place + rng.randrange(2) :] + "x"


@_of_tensors
def lose_a_tensor(tensors, target, rng):
    name = _pick(tensors, target, rng)
    del tensors[name]
    return name


@_of_tensors
def lose_many_tensors(tensors, target, rng):
    names = [name for name in tensors if rng.random() < 0.5] or list(tensors)
    if all(name.endswith(target.optional or ("?",)) for name in names):
        names = list(tensors)
    for name in names:
        del tensors[name]
    return str(len(names))


@_of_tensors
def misspell_a_tensor(tensors, target, rng):
    name = rng.choice(list(tensors))
    tensors[_typo(name, rng)] = tensors.pop(name)
    return name


@_of_tensors
def add_a_tensor(tensors, target, rng):
    name = rng.choice(list(tensors))
    tensors[f"{name}.{rng.choice(['lora', 'extra', 'scale'])}"] = torch.zeros(3, dtype=tensors[name].dtype)
    return name


@_of_tensors
def reshape_a_tensor(tensors, target, rng):
    name = rng.choice(list(tensors))
    old = tensors[name]
    ways = [old[None], old[..., None]]
    ways += [old[:-1], torch.cat([old, old[:1]])] if old.ndim else []
    ways += [old.flatten()] if old.ndim > 1 else []
    ways += [old.transpose(0, -1)] if old.ndim and old.shape[0] != old.shape[-1] else []
    tensors[name] = rng.choice(ways).clone()
    return f"{name} {list(old.shape)} to {list(tensors[name].shape)}"


@_of_tensors
def change_a_dtype(tensors, target, rng):
    name = rng.choice(list(tensors))
    dtypes = (torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.int8, torch.float64)
    other = rng.choice([dtype for dtype in dtypes if dtype != tensors[name].dtype])
    tensors[name] = tensors[name].to(other)
    return f"{name} to {other}"


@_of_tensors
def spoil_a_number(tensors, target, rng):
    name = rng.choice([name for name in tensors if tensors[name].is_floating_point()])
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice(
        [float("nan"), float("inf"), -float("inf")]
    )
    return name


def cut_the_file(folder, target, rng):
    path = folder / target.file
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])
    return target.file


def flip_a_bit(folder, target, rng):
    """Anywhere in the parts of a zipped pickle, which have checksums, or in the header of a safetensors file."""
    path = folder / target.file
    content = bytearray(path.read_bytes())
    if path.suffix == ".safetensors":
        place = rng.randrange(8 + int.from_bytes(content[:8], "little"))
    else:
        place = rng.choice(_in_parts(path))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{target.file} at {place}"


def _in_parts(path: Path) -> list[int]:
    import zipfile

    places: list[int] = []
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            lengths = content[part.header_offset + 26 : part.header_offset + 30]
            start = (
                part.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            )
            places += range(start, start + part.file_size)
    return places


def empty_the_file(folder, target, rng):
    path = folder / rng.choice([target.file, "config.json"])
    path.write_bytes(rng.choice([b"", b"{", b"null", b"[]", b"\xff\xfe", b"\x80\x02}q\x00.", b"<html></html>"]))
    return path.name


def lose_the_file(folder, target, rng):
    path = folder / rng.choice([target.file, "config.json"])
    path.unlink()
    return path.name


@_of_config
def change_a_size(config, target, rng):
    path = rng.choice(target.numbers)
    inside = _at(config, path)
    old = inside[path[-1]]
    inside[path[-1]] = rng.choice([old + 2, old - 2, 2 * old + 2, 0, -1, 10**9, float(old), str(old), [old], True])
    return f"{'.'.join(path)} {old} to {inside[path[-1]]!r}"


@_of_config
def lose_a_key(config, target, rng):
    path = rng.choice(target.required)
    del _at(config, path)[path[-1]]
    return ".".join(path)


@_of_config
def misspell_a_key(config, target, rng):
    path = rng.choice(target.required + target.numbers)
    inside = _at(config, path)
    if path[-1] in inside:
        inside[_typo(path[-1], rng)] = inside.pop(path[-1])
    return ".".join(path)


@_of_config
def add_a_key(config, target, rng):
    inside = config["layer"] if isinstance(config.get("layer"), dict) and rng.random() < 0.5 else config
    key = rng.choice(["rope_base", "num_experts", "n_layers", "window", "quantization"])
    inside[key] = rng.choice([1, True, "x", None])
    return key


@_of_config
def name_another_layout(config, target, rng):
    config["layout"] = rng.choice(["hyena", "", 3, None, "striped", []])
    return repr(config["layout"])


def _at(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path[:-1]:
        config = config[key]
    return config


KINDS = (
    lose_a_tensor, lose_many_tensors, misspell_a_tensor, add_a_tensor, reshape_a_tensor, change_a_dtype, spoil_a_number,
    cut_the_file, flip_a_bit, empty_the_file, lose_the_file, change_a_size, lose_a_key, misspell_a_key, add_a_key,
    name_another_layout,
)  # fmt: skip


def survives(folder: Path, broken: Path, target: Target, seeds: range) -> list[str]:
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
