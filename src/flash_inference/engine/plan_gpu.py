"""What a run will take on a GPU, before it takes it: from shapes alone, so that no GPU is needed to know."""

from __future__ import annotations

import torch

from flash_inference.engine.plan import Plan, layer_plans
from flash_inference.errors import ModelError, TilingError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.fused import unfused
from flash_inference.models.gpu_memory import GRAPH, GpuRunShape, GpuShape, fitted, free_on, near_side
from flash_inference.tiling import Prompted, Relaxed, Staggered, Tiling


def plan_gpu(
    model: LanguageModel,
    *,
    prompt: int = 1,
    max_new_tokens: int,
    batch: int = 1,
    tiling: Tiling | None = None,
    state_dtype: torch.dtype | None = None,
    free: int | None = None,
    device: str = "the GPU",
    narrow: bool | None = None,
) -> Plan:
    """The memory of a generation by the GPU's kernels; nothing is allocated.

    `free` bytes are left on the device beside the model (default: what the model's own GPU says); spectra get what the
    rest leaves of them. `device` is the GPU's name, which `tune` knows it by. `narrow` as in `GpuShape.of`.
    `total` lies within 5% of the most that PyTorch's allocator holds, the model and the driver's graphs aside.
    Raises PlanError for a run that does not fit, which says what would; TilingError as generation would; ModelError for
    a model that runs by PyTorch's operations there.

    >>> plan_gpu(model, max_new_tokens=100_000, free=80 << 30).spectra
    """
    reason = unfused(model)
    if reason is not None:
        raise ModelError(f"the GPU's kernels cannot run this model: {reason}. Its memory is not planned.")
    tiling = tiling.tiling if isinstance(tiling, Prompted) else tiling
    weight = model.embedding.weight
    if free is None:
        if weight.device.type != "cuda":
            raise ModelError(f"the model is on {weight.device}, which tells no GPU's free bytes. Pass free=.")
        free, device = free_on(weight.device), torch.cuda.get_device_name(weight.device)
    shape = GpuShape.of(model, narrow)
    check_gpu_tiling(tiling, shape.channels)
    near = near_side(device, batch, shape.channels)
    length, bounded = prompt + max_new_tokens - 1, not isinstance(tiling, Relaxed)
    run = GpuRunShape(length, prompt, batch, state_dtype or torch.float32, near, bounded)
    made = fitted(shape, run, free, device)
    span = max(max_new_tokens - 1, 1)
    return Plan(
        positions=prompt + max_new_tokens,
        batch=batch,
        tiling=Staggered(span, near=near, block=GRAPH) if bounded else Relaxed(span),
        layers=layer_plans(model, length),
        state=made.state,
        filters=made.filters,
        spectra=made.spectra,
        workspace=made.workspace,
        activations=0,
        weights=made.weights,
        graphs=made.graphs,
    )


def check_gpu_tiling(tiling: Tiling | None, channels: int) -> None:
    """Raises TilingError for tilings that have no graphs; without long convolutions there is nothing to tile."""
    if channels and tiling is not None and not isinstance(tiling, Relaxed):
        raise TilingError(f"got {tiling!r}; on a GPU generation runs on its own bounded tiling (None) or on Relaxed.")
