"""`flash-inference doctor`: what is installed, and what is missing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from flash_inference.cli.console import size, write, write_json
from flash_inference.cli.options import Json
from flash_inference.errors import FlashInferenceError


def doctor(json: Json = False) -> None:
    """Tell what is installed, whether it is sound, and how to get what is missing.

    Exit code 0: sound; 1: a shipped model or the tuning table is damaged.

    \b
    Example:
      flash-inference doctor
    """
    found = examine()
    if json:
        write_json(found)
    else:
        rows = [(key, value) for key, value in found.items() if key not in ("advice", "models", "sound")]
        rows += [(f"model {name}", state) for name, state in found["models"].items()]
        rows += [("advice", line) for line in found["advice"]]
        write("".join(f"{key:<17} {_shown(key, value)}\n" for key, value in rows))
    if not found["sound"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that the command tells, as JSON values."""
    import torch

    from flash_inference import __version__
    from flash_inference.engine.decode import cores
    from flash_inference.engine.plan import free_memory

    cuda = torch.cuda.is_available()
    tuning, tuned = _tuning()
    models = _models()
    found: dict[str, Any] = {
        "flash_inference": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "numpy": _version("numpy"),
        "safetensors": _version("safetensors"),
        "triton": _version("triton"),
        "matplotlib": _version("matplotlib"),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cores": {"usable": cores(), "machine": os.cpu_count()},
        "memory free": free_memory(),
        "tuning": tuning,
        "models": models,
        "sound": tuned and all(state == "sound" for state in models.values()),
    }
    found["advice"] = _advice(found, cuda)
    return found


def _models() -> dict[str, str]:
    """Each shipped model: "sound" when its files are those of its manifest and make a model, or what is wrong."""
    from flash_inference.models.weights import load, shipped

    states: dict[str, str] = {}
    for name in shipped():
        try:
            load(name)
            states[name] = "sound"
        except FlashInferenceError as error:
            states[name] = str(error)
    return states


def _tuning() -> tuple[str, bool]:
    """Which table is in force, and whether it can be read."""
    from flash_inference.ops.tile_conv import Choice, table_path

    if not table_path().exists():
        return "built-in table", True
    try:
        return f"{len(Choice.load().measurements)} measurements in {table_path()}", True
    except (FlashInferenceError, OSError) as error:
        return str(error), False


def _advice(found: dict[str, Any], cuda: bool) -> list[str]:
    lines: list[str] = []
    if not found["models"]:
        lines.append("no shipped model is here: pip install --force-reinstall --no-deps flash-inference")
    for name, state in found["models"].items():
        if state != "sound":
            lines.append(f"model {name} is damaged: pip install --force-reinstall --no-deps flash-inference")
    if found["tuning"] == "built-in table":
        lines.append("tiles are chosen by a built-in table; measure this machine with: flash-inference tune")
    if found["matplotlib"] is None:
        lines.append("benchmarks draw no plots without matplotlib: pip install matplotlib")
    if found["torch build"] != "CPU" and not cuda:
        lines.append(
            "torch is a CUDA build but finds no GPU; for a smaller CPU build, pip install torch==2.13.0 first, "
            "with an index of CPU builds configured"
        )
    if cuda and found["triton"] is None:
        lines.append("there is a GPU but no triton: pip install triton")
    return lines


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _shown(key: str, value: Any) -> str:
    if key == "memory free":
        return "unknown" if value is None else size(value)
    if key == "cores":
        return f"{value['usable']} usable of {value['machine']}"
    return "not installed" if value is None else str(value)
