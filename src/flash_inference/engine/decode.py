"""The loop of generation: choose a token, pay what is due, extend by the token."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_inference.engine.payer import Payer, Stacked, Steps
from flash_inference.models.decoder import Decoder
from flash_inference.ops.threads import one_thread
from flash_inference.tiling import Blocked, Prompted, Relaxed, Separated, Spread, Tiling

if TYPE_CHECKING:
    from flash_inference.models.backbone import LanguageModel
    from flash_inference.models.gpu import GpuDecoder

LONG_RUN, SHORT_PROMPT = 1024, 256
NEAR, BLOCK, EVERY, EVERY_BESIDE = 128, 32, 128, 512
PREFILL_CHUNK = 4096

Choose = Callable[[Tensor], Tensor]


def default_tiling(positions: int, prompt: int = 0) -> Tiling:
    """The tiling for `positions` new positions after a prompt: Blocked for short runs, else Separated + Spread.

    Long runs never wait for a large tile: those have slack, and are paid in shares. A long prompt is paid forward as
    one rectangle (Prompted); a short one is part of the tiling, since its rectangle would be all targets and no work.
    Shares are larger where a second core pays them: fewer transforms, and the caches are disturbed less often.
    """
    after = prompt if prompt > SHORT_PROMPT else 0
    length = positions if after else positions + prompt
    if length <= LONG_RUN:
        inner: Tiling = Blocked(length, block=BLOCK)
    else:
        inner = Spread(Separated(length, near=NEAR, block=BLOCK), every=turn())
    return Prompted(inner, after) if after else inner


def turn() -> int:
    """Steps between two shares of a tile."""
    return EVERY if cores() == 1 else EVERY_BESIDE


def prefill(decoder: Steps, state: Any, prompt: Tensor, chunk: int = PREFILL_CHUNK) -> Tensor:
    """Reads a prompt [B, P], P >= 1, in chunks of bounded memory; returns the last position's logits [B, V]."""
    logits = decoder.extend(state, prompt[:, :chunk])
    for first in range(chunk, prompt.shape[1], chunk):
        logits = decoder.extend(state, prompt[:, first : first + chunk])
    return logits


def best_device() -> tuple[str, str | None]:
    """The device that generates fastest here, and why it is not the GPU if there is one: in a line, or None."""
    if not torch.cuda.is_available():
        return "cpu", None
    try:
        from flash_inference.models.gpu import unusable
    except ImportError as error:
        return "cpu", f"the GPU is not used: {error}; pip install triton"
    reason = unusable(torch.empty(0, device="cuda"))
    return ("cuda", None) if reason is None else ("cpu", f"the GPU is not used: {reason}")


def decoder_for(
    model: LanguageModel, length: int, tiling: Tiling | None = None, batch: int = 1, *, prompt: int = 1,
    dtype: torch.dtype | None = None,
) -> Decoder | GpuDecoder:  # fmt: skip
    """The model made ready for `batch` sequences of `length` positions, with the GPU's kernels where it is on one.

    The first `prompt` positions are given, and `dtype` is how histories are stored: a GPU's memory is laid out for
    both. Where the GPU lacks the kernels, or they do not know the model, a warning says why, and PyTorch's operations
    run instead.
    """
    if on_graphs(model):
        from flash_inference.models.gpu import gpu_decoder

        latency = "relaxed" if isinstance(tiling, Relaxed) else "bounded"
        read = max(length - 1, prompt)  # the last new token is never read
        return gpu_decoder(model, read, latency, batch, prompt, dtype or torch.float32)
    return model.decoder(length)


def on_graphs(model: LanguageModel) -> bool:
    """Whether the model is on a GPU that can replay its steps; a warning says why if it is on one and cannot."""
    if model.embedding.weight.device.type != "cuda":
        return False
    try:
        from flash_inference.models import gpu
    except ImportError as error:
        reason = f"{error}; pip install triton"
    else:
        reason = gpu.unusable(model.embedding.weight) or gpu.unreplayed(model)
    if reason is not None:
        warnings.warn(f"the GPU's kernels are not used: {reason}. PyTorch's operations run instead.", stacklevel=4)
    return reason is None


def decode(
    decoder: Decoder | GpuDecoder,
    prompt: Tensor,
    choose: Choose,
    *,
    max_new_tokens: int,
    tiling: Tiling | None = None,
    beside: bool | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Yields tokens [B], `max_new_tokens` of them, each chosen from the exact logits [B, V] of all that came before.

    prompt [B, P], P >= 1. `choose` maps logits to tokens. `tiling` covers P + max_new_tokens - 1 positions (default:
    `default_tiling`, after the prompt as one parallel pass). `beside` pays tiles that have slack on a second core
    (default: if there is one). Nothing is left half done by a caller who stops.
    """
    batch, length = prompt.shape
    if not isinstance(decoder, Decoder):
        from flash_inference.engine.graphs import decode_gpu

        yield from decode_gpu(decoder, prompt, choose, max_new_tokens, tiling)
        return
    if tiling is None:
        tiling = default_tiling(max(max_new_tokens - 1, 1), length)
    state = decoder.init(batch, tiling, dtype=dtype)
    device = decoder.model.embedding.weight.device
    yield from run(decoder, state, prompt, choose, max_new_tokens=max_new_tokens, device=device, beside=beside)


def run(
    decoder: Steps,
    state: Stacked,
    prompt: Tensor,
    choose: Choose,
    *,
    max_new_tokens: int,
    device: torch.device,
    beside: bool | None = None,
) -> Iterator[Tensor]:
    """The loop of `decode`, from an empty state on, for whatever has `extend` and a stack."""
    logits = prefill(decoder, state, prompt.to(device)).cpu()
    with Payer(decoder, state, cores() > 1 if beside is None else beside) as pay:
        tokens = choose(logits)
        yield tokens
        for _ in range(max_new_tokens - 1):
            with beside_blas(state, len(tokens)):
                pay()
                tokens = choose(decoder.extend(state, tokens[:, None].to(device)).cpu())
            yield tokens


def beside_blas(state: Any, rows: int) -> AbstractContextManager[None]:
    """What steps and choices of so many rows run in: one thread for PyTorch where numpy multiplies matrices."""
    return one_thread() if rows > 1 and getattr(state, "step", None) is not None else nullcontext()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
