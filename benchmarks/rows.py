"""Result rows: one JSON object a line, each with the commit, the machine and the versions that made it."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import date
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, object]:
    """Where a row comes from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=False).stdout
    return {
        "commit": commit + ("+changes" if dirty.strip() else ""),
        "date": date.today().isoformat(),
        "device": cpu_name(),
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def gpu_origin(commit: str | None = None) -> dict[str, object]:
    """Where a row measured on a GPU comes from; `commit` where the source came without its history."""
    import triton

    return {
        "commit": commit or provenance()["commit"],
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def gpu_bandwidth(nbytes: int = 4 << 30, repeats: int = 10) -> dict[str, float]:
    """Bytes a second that the device copies (each counted read and written) and reads: the best of several."""
    data = torch.rand(nbytes // 4, device="cuda")
    other = torch.empty_like(data)
    found = {}
    for name, run, moved in (("copy", lambda: other.copy_(data), 2 * nbytes), ("read", data.sum, nbytes)):
        times = []
        for _ in range(repeats + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        found[name] = moved / min(times[1:])
    return found


class Rows:
    """Rows of one question, written to `folder`/`name`.jsonl as they are measured, in place of an earlier run's."""

    def __init__(self, name: str, folder: Path, origin: dict[str, object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.origin, self._mode = folder / f"{name}.jsonl", origin, "w"

    def add(self, row: dict[str, object]) -> None:
        """One more, printed as well."""
        with self.path.open(self._mode) as file:
            file.write(json.dumps(row | self.origin) + "\n")
        self._mode = "a"
        print(json.dumps(row), flush=True)


def cpu_name() -> str:
    """The processor's own name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(name: str, rows: list[dict[str, object]], folder: Path = RESULTS) -> Path:
    """Writes the rows of one run to `folder`/`name`.jsonl, in place of an earlier run's."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = provenance()
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row | origin) + "\n" for row in rows))
    return path


def spread(microseconds: np.ndarray) -> dict[str, float]:
    """Mean, median, p99, p99.9 and worst of per-step times, rounded to 0.1 us."""
    q = np.quantile(microseconds, [0.5, 0.99, 0.999, 1])
    names = ("median_us", "p99_us", "p999_us", "worst_us")
    return {"us_per_token": round(float(microseconds.mean()), 1)} | {
        n: round(float(v), 1) for n, v in zip(names, q, strict=True)
    }


def read_bandwidth(nbytes: int = 256 << 20, repeats: int = 7) -> float:
    """Bytes per second at which the cores read memory: the best of several sums over a large array."""
    import time

    data = torch.ones(nbytes // 4)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return nbytes / min(times)
