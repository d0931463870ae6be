"""Which implementation is fastest: a measured table, on disk and printable, or built-in values."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flash_inference.errors import FlashInferenceError


@dataclass(frozen=True, slots=True)
class Measurement:
    """Microseconds of one implementation for a square tile of `side` on `channels` filter channels and `rows` rows."""

    side: int
    rows: int
    channels: int
    dtype: str
    device: str
    threads: int
    impl: str
    microseconds: float
    error: float


def table_path() -> Path:
    """Where `flash-inference tune` writes: the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "flash-inference" / "tile_conv.json"


class Choice:
    """The fastest implementation per (side, rows, channels, dtype, device, threads).

    `crossover` is the built-in value, used where nothing was measured: the side up to which a square tile is summed
    directly. Measured entries match dtype, device and threads exactly; side, rows and channels
    match to the nearest octave. The kernels of a GPU stand under its full name, with 0 threads.
    """

    crossover = 8

    def __init__(self, measurements: tuple[Measurement, ...] = ()) -> None:
        self.measurements = measurements
        self._known: dict[tuple[int, int, int, int, str, str, int], str] = {}

    def pick(self, sources: int, targets: int, rows: int, channels: int, like: torch.Tensor) -> str:
        """The name of the implementation for this tile."""
        if sources == 1 or targets == 1:
            return "direct"
        if not self.measurements:
            return "direct" if sources * targets <= self.crossover * (sources + targets) / 2 else "fft"
        key = (sources, targets, rows, channels, str(like.dtype), str(like.device.type), torch.get_num_threads())
        if key not in self._known:
            self._known[key] = self._nearest(*key)
        return self._known[key]

    def _nearest(
        self, sources: int, targets: int, rows: int, channels: int, dtype: str, device: str, threads: int
    ) -> str:
        side = (sources * targets) ** 0.5
        pool = [m for m in self.measurements if (m.dtype, m.device, m.threads) == (dtype, device, threads)]
        if not pool:
            return Choice().pick(sources, targets, rows, channels, torch.empty(0))

        def distance(m: Measurement) -> float:
            pairs = ((m.rows, rows), (m.channels, channels), (m.side, side))
            return sum(abs(math.log2(a / b)) for a, b in pairs)

        least = min(distance(m) for m in pool)
        return min((m for m in pool if distance(m) <= least + 1e-9), key=lambda m: m.microseconds).impl

    def crossover_on(self, device: str, rows: int, channels: int) -> int | None:
        """The largest measured side up to which a GPU, by its name, sums squares no slower than by FFT.

        It sums directly, or on tensor cores where that was measured.

        Of the measured batches and channels the nearest counts, in octaves. None where nothing was measured.
        """
        pool = [m for m in self.measurements if m.device == device]
        if not pool:
            return None
        shapes = {(m.rows, m.channels) for m in pool}
        nearest = min(shapes, key=lambda s: (abs(math.log2(s[0] / rows)) + abs(math.log2(s[1] / channels)), s))
        times = {(m.side, m.impl): m.microseconds for m in pool if (m.rows, m.channels) == nearest}
        found = None
        for side in sorted({side for side, _ in times}):
            summed = min(times.get((side, impl), math.inf) for impl in ("direct", "toeplitz"))
            if summed > times.get((side, "fft"), math.inf):
                break
            found = side
        return found

    def beside(self, other: Choice) -> Choice:
        """This table, and what another one says of devices that this one does not know."""
        known = {m.device for m in self.measurements}
        return Choice(self.measurements + tuple(m for m in other.measurements if m.device not in known))

    def save(self, path: Path | None = None) -> Path:
        """Writes the table as JSON and returns its path."""
        path = path or table_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps([asdict(m) for m in self.measurements], indent=1) + "\n")
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: Path | None = None) -> Choice:
        """The table that `save` wrote, or the built-in one where there is none."""
        path = path or table_path()
        if not path.exists():
            return cls()
        try:
            return cls(tuple(Measurement(**row) for row in json.loads(path.read_text())))
        except (ValueError, TypeError) as error:
            raise FlashInferenceError(
                f"the table {path} cannot be read ({error}); delete it, or write it anew with `flash-inference tune`."
            ) from None
