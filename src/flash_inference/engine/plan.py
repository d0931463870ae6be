"""What a run will take, before it takes it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flash_inference.engine.decode import default_tiling
from flash_inference.errors import PlanError
from flash_inference.models.backbone import LanguageModel
from flash_inference.ops.causal_conv import good_size
from flash_inference.tiling import Cost, Rectangle, Share, Tile, Tiling, cost

WORKSPACE = 64 << 20
DIRECT = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of a run, by what they are for. `total` is what the process grows by, the model's weights aside."""

    positions: int
    batch: int
    tiling: Tiling
    state: int
    filters: int
    spectra: int
    workspace: int

    @property
    def total(self) -> int:
        """Sum of the parts, in bytes."""
        return self.state + self.filters + self.spectra + self.workspace


def plan(
    model: LanguageModel, *, prompt: int = 1, max_new_tokens: int, batch: int = 1, tiling: Tiling | None = None
) -> Plan:
    """The memory of a generation, computed from shapes; nothing is allocated.

    state: one buffer of positions * batch * channels numbers, its staged block and the short convolutions;
    filters: the taps; spectra: those that the tiling's tiles use, up to the budget (the taps' size, at least 64 MiB);
    workspace: transforms in flight and the largest activations of the prompt.
    """
    config = model.config
    tiling = default_tiling(max(max_new_tokens - 1, 1), prompt) if tiling is None else tiling
    size = 8 if model.embedding.weight.itemsize == 8 else 4
    channels = config.layers * (config.order - 1) * config.width
    length = prompt + max_new_tokens
    block = max(tiling.block, 32)
    rows = -(-prompt // block) * block + -(-max_new_tokens // block) * block
    short = config.layers * (config.short_taps - 1) * batch * (config.order + 1) * config.width
    state = size * (batch * channels * (rows + 2 * block) + short)
    filters = size * channels * (length + min(length, 256))
    budget = max(size * channels * length, 64 << 20)
    spectra = min(budget, _spectra(tiling, channels, size))
    widest = max(config.mlp_width * 2, (config.order + 1) * config.width * 2, config.vocab_size)
    workspace = WORKSPACE + size * batch * min(prompt, 16_384) * widest
    return Plan(length, batch, tiling, state, filters, spectra, workspace)


def work(tiling: Tiling) -> Cost:
    """Modelled multiply-adds per channel of a tiling: n log2 n for a tile by FFT on n points, its area if less."""
    return cost(tiling, price=tile_work)


def tile_work(tile: Tile) -> float:
    """Multiply-adds per channel of one tile, by the cheaper of direct sum and FFT."""
    if not isinstance(tile, Rectangle):
        return float(tile.area)
    n = good_size(len(tile.sources) + len(tile.targets) - 1)
    return min(float(tile.area), 2.5 * n * max(n.bit_length() - 1, 1))


def check_memory(
    model: LanguageModel, batch: int, prompt: int, max_new_tokens: int, tiling: Tiling | None = None
) -> None:
    """Raises PlanError if the plan exceeds the memory that is free, saying what would fit."""
    free = free_memory()
    if free is None:
        return
    needed = plan(model, prompt=prompt, max_new_tokens=max_new_tokens, batch=batch, tiling=tiling).total
    if needed <= free:
        return
    per_position = (needed - WORKSPACE) / (prompt + max_new_tokens)
    fits = max(int((free - WORKSPACE) / per_position), 0)
    raise PlanError(
        f"the run needs {needed / 2**30:.2f} GiB for {batch} x {prompt + max_new_tokens} positions; "
        f"{free / 2**30:.2f} GiB are free. About {fits} positions would fit, or a smaller batch; "
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


def _spectra(tiling: Tiling, channels: int, size: int) -> int:
    """Bytes of the spectra of every tile that falls due at the first few multiples of each power of two."""
    length = tiling.length or 0
    sizes: set[int] = set()
    step = 1
    while step < length:
        for n in range(step, min(5 * step, length), step):
            for tile in tiling.after(n - 1 + tiling.origin if n + tiling.origin <= length else n - 1):
                whole = tile.tile if isinstance(tile, Share) else tile
                if isinstance(whole, Rectangle) and min(len(whole.sources), len(whole.targets)) > DIRECT:
                    sizes.add(good_size(len(whole.sources) + len(whole.targets) - 1))
        step *= 2
    return sum(channels * (n + 2) * size for n in sizes)
