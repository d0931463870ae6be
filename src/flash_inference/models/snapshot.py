"""States on disk: one file, a checksum first, then tensors and the few numbers beside them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as render_tensors

from flash_inference.errors import FlashInferenceError, StateError
from flash_inference.mixers.stack import StackState, spaced
from flash_inference.models.decoder import Decoder, ModelState
from flash_inference.tiling import describe, rebuild

MAGIC = b"flash-inference state 1 "
NUMBERS = ("clock", "paid", "cleared", "staged", "row", "step_from", "step_until", "last_start")
TENSORS = ("start", "history", "inputs", "partial")


def save_state(decoder: Decoder, state: ModelState, path: str | os.PathLike[str]) -> None:
    """Writes a state to one file; what is due is paid first. Replaces the file only when all is written."""
    decoder.settle(state)
    stack = state.stack
    about = {name: getattr(stack, name) for name in NUMBERS}
    about |= {"tiling": describe(stack.tiling), "model": fingerprint(decoder)}
    tensors = {name: getattr(stack, name).contiguous() for name in TENSORS} | {"short": state.short}
    with torch.inference_mode(False):
        body = render_tensors({k: v.clone() for k, v in tensors.items()}, {"about": json.dumps(about)})
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
            tensors = parse_tensors(body)
            history = tensors["history"]
            tensors["history"] = spaced(history, *history.shape).copy_(history)
        about = json.loads(json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]["about"])
        if about["model"] != fingerprint(decoder):
            raise StateError(f"{path} belongs to another model or other weights; load it with the model that made it.")
        stack = StackState(
            tiling=rebuild(about["tiling"]),
            **{name: tensors[name] for name in TENSORS},
            **{name: about[name] for name in NUMBERS},
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FlashInferenceError):
            raise
        raise StateError(f"{path} cannot be read as a state: {error}. Save the state again.") from None
    return decoder.bind(ModelState(decoder.stack.bind(stack), tensors["short"]))


def fingerprint(decoder: Decoder) -> str:
    """sha256 over the configuration and the weights: states fit only the model that made them."""
    digest = hashlib.sha256(json.dumps(decoder.config.to_dict(), sort_keys=True).encode())
    for name, weight in sorted(decoder.model.state_dict().items()):
        digest.update(name.encode() + str(weight.dtype).encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
