"""States on disk: one file, a checksum first, then tensors and the few numbers beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as render_tensors
from torch import Tensor

from flash_inference.errors import FlashInferenceError, StateError
from flash_inference.mixers.mixer import tensors
from flash_inference.mixers.stack import StackState, spaced
from flash_inference.models.decoder import Decoder, ModelState
from flash_inference.tiling import describe, rebuild

MAGIC = b"flash-inference state 3 "
COUNTS = ("room", "last_start", "first_start", "clock")
NUMBERS = ("clock", "paid", "cleared", "staged", "row", "step_from", "step_until", "last_start", "chunk")
TENSORS = ("start", "history", "inputs", "partial")


def save_state(decoder: Decoder, state: ModelState, path: str | os.PathLike[str]) -> None:
    """Writes a state to one file; what is due is paid first. Replaces the file only when all is written."""
    decoder.settle(state)
    about: dict[str, Any] = {"model": fingerprint(decoder)} | {name: getattr(state, name) for name in COUNTS}
    saved = {"start": state.start}
    for name, past in _named(state.pasts):
        saved |= {f"{name}.{field}": tensor for field, tensor in tensors(past).items()}
    if state.stack is not None:
        about["stack"] = {name: getattr(state.stack, name) for name in NUMBERS}
        about["stack"]["tiling"] = describe(state.stack.tiling)
        lives = state.stack.lives
        about["stack"]["lives"] = None if lives is None else [(life.start, life.stop) for life in lives]
        saved |= {f"stack.{name}": getattr(state.stack, name) for name in TENSORS}
    with torch.inference_mode(False):
        body = render_tensors({k: v.contiguous().clone() for k, v in saved.items()}, {"about": json.dumps(about)})
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    partial.replace(path)


def load_state(decoder: Decoder, path: str | os.PathLike[str]) -> ModelState:
    """Reads what `save_state` wrote. Raises StateError if the file is damaged or belongs to another model."""
    path = Path(path)
    if not path.is_file():
        raise StateError(f"{path} is no file; expected a state that save_state wrote.")
    content = path.read_bytes()
    head, _, body = content.partition(b"\n")
    if not head.startswith(MAGIC):
        raise StateError(f"{path} does not begin as a saved state does; it is damaged, or another kind of file.")
    if head[len(MAGIC) :] != hashlib.sha256(body).hexdigest().encode():
        raise StateError(f"{path} is damaged: its sha256 is not the one written in it. Save the state again.")
    try:
        with torch.inference_mode(False):
            saved = parse_tensors(body)
        about = json.loads(json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]["about"])
        if about["model"] != fingerprint(decoder):
            raise StateError(f"{path} belongs to another model or other weights; load it with the model that made it.")
        return decoder.bind(_rebuilt(decoder, saved, about))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FlashInferenceError):
            raise
        raise StateError(f"{path} cannot be read as a state: {error}. Save the state again.") from None


def _rebuilt(decoder: Decoder, saved: dict[str, Tensor], about: dict[str, Any]) -> ModelState:
    """The state that was saved: fresh pasts say which tensors each mixer keeps, and the saved ones take their place."""
    stack = None
    with torch.inference_mode(False), torch.no_grad():
        if decoder.stack is not None:
            numbers = {name: about["stack"][name] for name in NUMBERS}
            parts = {name: saved[f"stack.{name}"] for name in TENSORS}
            parts["history"] = spaced(parts["history"], *parts["history"].shape).copy_(parts["history"])
            lives = about["stack"]["lives"]
            numbers["lives"] = None if lives is None else [range(*life) for life in lives]
            stack = decoder.stack.bind(StackState(tiling=rebuild(about["stack"]["tiling"]), **parts, **numbers))
        pasts = [[mixer.init(1, 1) for mixer in block.mixers] for block in decoder.model.blocks]
    for name, past in _named(pasts):
        for field, fresh in tensors(past).items():
            setattr(past, field, saved[f"{name}.{field}"].to(fresh.device))
    return ModelState(pasts, saved["start"], **{name: about[name] for name in COUNTS}, stack=stack)


def _named(pasts: list[list[Any]]) -> Iterator[tuple[str, Any]]:
    """Every past with its name: block, then mixer."""
    for i, of_block in enumerate(pasts):
        for j, past in enumerate(of_block):
            yield f"past.{i}.{j}", past


def fingerprint(decoder: Decoder) -> str:
    """sha256 over the configuration and the weights: states fit only the model that made them."""
    digest = hashlib.sha256(json.dumps(decoder.config.to_dict(), sort_keys=True).encode())
    for name, weight in sorted(decoder.model.state_dict().items()):
        digest.update(name.encode() + str(weight.dtype).encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
