"""What a run will take, before it takes it."""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch

from flash_inference.engine.decode import PREFILL_CHUNK, default_tiling
from flash_inference.errors import PlanError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.block import common_stride
from flash_inference.ops.causal_conv import good_size
from flash_inference.ops.tile_conv import Choice, Impl
from flash_inference.tiling import Cost, Prompted, Rectangle, Spread, Tile, Tiling, cost

WORKSPACE = 12 << 20
WHY = {
    "tiles": "a long filter without a short recurrence",
    "recurrence": "a filter that is a short sum of exponentials",
    "FIR ring": "a filter of few taps",
    "KV cache": "every position weighs the past anew",
}


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How a part of a block decodes, and why; `bytes` is what one row of the batch keeps of the past for it."""

    block: int
    part: str
    decodes: str
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of a run, by what they are for. `total` is what the process grows by, the model's weights aside.

    `layers` tells how each part of each block decodes. On a GPU `weights` are copies as they are streamed, and `graphs`
    what the driver keeps of captured graphs, an estimate; a prompt's activations are part of the workspace there.
    """

    positions: int
    batch: int
    tiling: Tiling
    layers: tuple[LayerPlan, ...]
    state: int
    filters: int
    spectra: int
    workspace: int
    activations: int
    weights: int = 0
    graphs: int = 0

    @property
    def total(self) -> int:
        """The most at one time: spectra are kept as steps meet them, when the prompt's activations are gone."""
        rest = self.state + self.filters + self.workspace + self.weights + self.graphs
        return rest + max(self.spectra, self.activations)


def plan(
    model: LanguageModel, *, prompt: int = 1, max_new_tokens: int, batch: int = 1, tiling: Tiling | None = None,
    state_dtype: torch.dtype | None = None,
) -> Plan:  # fmt: skip
    """The memory of a generation on a CPU, computed from shapes; nothing is allocated. `plan_gpu` is a GPU's.

    state: one buffer of positions * batch * channels numbers, its staged block, and the pasts of the mixers that keep
    one of their own;
    filters: the taps; spectra: those that the tiling's tiles use, up to the budget (the taps' size, at least 64 MiB);
    workspace: transforms in flight; activations: the largest of the prompt's chunks.
    """
    tiling = default_tiling(max(max_new_tokens - 1, 1), prompt) if tiling is None else tiling
    size = 8 if model.embedding.weight.itemsize == 8 else 4
    length = prompt + max_new_tokens
    channels, taps = _filters(model, length)
    own = sum(mixer.past_bytes(length) for block in model.blocks for mixer in block.mixers)
    block = max(tiling.block, 32)
    rows = -(-prompt // block) * block + -(-max_new_tokens // block) * block
    stored = size if state_dtype is None else state_dtype.itemsize
    state = batch * (channels * (stored * rows + 2 * size * block) + own)
    filters = size * channels * (taps + min(taps, 256))
    budget = max(size * channels * taps, 64 << 20)
    spectra = _spectra(tiling, length, channels, size, budget) if channels else 0
    activations = size * batch * min(prompt, PREFILL_CHUNK) * max(block.activations for block in model.blocks)
    layers = layer_plans(model, length)
    return Plan(length, batch, tiling, layers, state, filters, spectra, WORKSPACE, activations)


def filter_bytes(model: LanguageModel, length: int, tiling: Tiling) -> int:
    """Bytes of the taps for `length` positions and of the spectra that the tiling's tiles use."""
    channels, taps = _filters(model, length)
    size = 8 if model.embedding.weight.itemsize == 8 else 4
    budget = max(size * channels * taps, 64 << 20)
    spectra = _spectra(tiling, tiling.taps or length, channels, size, budget) if channels else 0
    return size * channels * (taps + min(taps, 256)) + spectra


def _filters(model: LanguageModel, length: int) -> tuple[int, int]:
    """Channels of all long convolutions, and how many taps of each are kept for `length` positions."""
    groups = [group for block in model.blocks for group in block.convolutions]
    return sum(group.filter.channels for group in groups), -(-length // common_stride(groups))


def layer_plans(model: LanguageModel, length: int) -> tuple[LayerPlan, ...]:
    """How each part of each block decodes `length` positions: long convolutions by tiles, mixers as they say."""
    size = 8 if model.embedding.weight.itemsize == 8 else 4
    plans: list[LayerPlan] = []
    for number, block in enumerate(model.blocks):
        for group in block.convolutions:
            bytes = size * group.filter.channels * length
            plans.append(LayerPlan(number, type(group.filter).__name__, "tiles", bytes, WHY["tiles"]))
        for mixer in block.mixers:
            why = WHY.get(mixer.decodes, "it keeps a past of its own")
            plans.append(LayerPlan(number, type(mixer).__name__, mixer.decodes, mixer.past_bytes(length), why))
    return tuple(plans)


def work(tiling: Tiling) -> Cost:
    """Modelled multiply-adds per channel of a tiling: n log2 n for a tile by FFT on n points, its area if less."""
    return cost(tiling, price=tile_work)


def tile_work(tile: Tile) -> float:
    """Multiply-adds per channel of one tile, by the cheaper of direct sum and FFT."""
    if not isinstance(tile, Rectangle):
        return float(tile.area)
    n = points(tile)
    return min(float(tile.area), 2.5 * n * max(n.bit_length() - 1, 1))


def check_memory(
    model: LanguageModel, batch: int, prompt: int, max_new_tokens: int, tiling: Tiling | None = None,
    state_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Raises PlanError if the plan exceeds the memory that is free, saying what would fit.

    A GPU's memory is checked where its buffers are sized (`GpuDecoder`).
    """
    if model.embedding.weight.device.type != "cpu":
        return
    free = free_memory()

    def needed(positions: int) -> int:
        before = min(prompt, max(positions - 1, 1))
        new = max(positions - before, 1)
        own = tiling if positions == prompt + max_new_tokens else None
        made = plan(model, prompt=before, max_new_tokens=new, batch=batch, tiling=own, state_dtype=state_dtype)
        return made.total

    asked = prompt + max_new_tokens
    if free is None or needed(asked) <= free:
        return
    fits = bisect_right(range(asked), free, key=needed) - 1
    raise PlanError(
        f"the run needs {needed(asked) / 2**30:.2f} GiB for {batch} x {asked} positions; "
        f"{free / 2**30:.2f} GiB are free. About {max(fits, 0)} positions would fit, or a smaller batch; "
        "`flash-inference plan` shows where the bytes go."
    )


def free_memory() -> int | None:
    """Bytes that can be allocated without swapping, by the kernel's own count; None where it does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _spectra(tiling: Tiling, taps: int, channels: int, size: int, budget: int) -> int:
    """Bytes of the spectra that are stored: regular tiles', in the order of their first use, within a budget."""
    while isinstance(tiling, Prompted | Spread):
        tiling = tiling.tiling
    first_use: dict[tuple[int, int], int] = {}
    length, step = tiling.length or 2 * taps, 1
    while step < length:
        for n in range(step, min(5 * step, length), step):
            for tile in tiling.after(n - 1):
                if isinstance(tile, Rectangle) and by_fft(tile):
                    key = (tile.targets.start - tile.sources.stop + 1, points(tile))
                    first_use[key] = min(n, first_use.get(key, n))
        step *= 2
    used = 0
    for _, n in sorted(first_use, key=lambda key: first_use[key]):
        bytes_needed = channels * (n + 2) * size
        used += bytes_needed if used + bytes_needed <= budget else 0
    return used


def by_fft(tile: Rectangle) -> bool:
    """Whether the built-in choice pays the tile by FFT."""
    return Choice().pick(len(tile.sources), len(tile.targets), 1, 1, torch.empty(0)) == Impl.FFT


def points(tile: Rectangle) -> int:
    """Points of the circle that the tile is paid on."""
    return good_size(len(tile.sources) + len(tile.targets) - 1)
