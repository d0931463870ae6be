"""`flash-inference tune`: which implementation of a tile is fastest on this machine."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from flash_inference.cli.console import CommandError, Meter, note, size, write, write_json, write_table
from flash_inference.cli.options import Json
from flash_inference.cli.tune_gpu import GpuCase, gpu_cases, measure_gpu

if TYPE_CHECKING:
    from torch import Tensor

    from flash_inference.ops.tile_conv import Choice, Measurement, PreparedFilter

SIDES = tuple(2**q for q in range(1, 13))
CHANNELS, ROWS, DTYPES = (64, 256, 1024), (1, 8), ("float32", "float64")
QUICK_CHANNELS, QUICK_ROWS, QUICK_DTYPES = (256,), (1,), ("float32",)
DIRECT_SIDE = 512
"""Above it a direct sum is hopeless."""

SECONDS, QUICK_SECONDS = 0.1, 0.02
"""How long one tile is timed, at least."""


def tune(
    device: Annotated[str, typer.Option(help="cpu, or cuda where there is one.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="256 channels, one row, float32; shorter timings.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the table in force, and measure nothing.")] = False,
    json: Json = False,
) -> None:
    """Measure which way of computing a tile is fastest here, for the library to use.

    Times every implementation on square tiles of 2 to 4,096 positions, with the current number of threads; takes
    minutes, or seconds with --quick. Each result is first compared with a float64 reference: an implementation that
    exceeds its error bound is left out, and the exit code is 1. Ctrl-C writes nothing. The table counts from the next
    start on; what it says of other devices stays.

    On a GPU its kernels are measured as well, per batch: where direct sums end and transforms begin.

    \b
    Examples:
      flash-inference tune
      flash-inference tune --device cuda
      flash-inference tune --show
    """
    from flash_inference.ops.tile_conv import Choice, table_path

    if show:
        _print(Choice.load(), json)
        note(f"in force: {table_path()}" if table_path().exists() else f"built in; {table_path()} does not exist")
        return
    seconds = QUICK_SECONDS if quick else SECONDS
    cases = [*_gpu_cases(_device(device), quick), *_cases(device, quick)]
    measurements: list[Measurement] = []
    wrong: dict[str, str] = {}
    wrong_kernels: dict[str, str] = {}
    with Meter("tuning", sum(case.work for case in cases)) as meter:
        for case in cases:
            meter.label(str(case))
            if isinstance(case, Case):
                measurements += _measure(case, seconds, wrong)
            else:
                measurements += measure_gpu(case, seconds, wrong_kernels)
            meter.add(case.work)
    choice = Choice(tuple(m for m in measurements if m.impl not in (wrong if m.threads else wrong_kernels)))
    for message in (*wrong.values(), *wrong_kernels.values()):
        note(f"wrong: {message}")
    if not choice.measurements:
        raise CommandError("no implementation passed its check, so that no table was written. Is this build sound?")
    _print(choice, json)
    note(f"wrote {choice.beside(Choice.load()).save()}")
    if wrong or wrong_kernels:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Case:
    """One tile to time: `side` sources and as many targets."""

    side: int
    channels: int
    rows: int
    dtype: str
    device: str

    @property
    def work(self) -> float:
        """About how long it takes, in any unit."""
        return self.channels * self.rows * self.side * math.log2(self.side) + 1e6

    @property
    def nbytes(self) -> int:
        """About how many bytes the tile and its check take: inputs, targets, taps, spectra, and float64 copies."""
        return 8 * self.side * self.channels * (8 * self.rows + 8)

    def __str__(self) -> str:
        return f"side {self.side}, {self.channels} channels, {self.rows} rows, {self.dtype} on {self.device}"


def _device(name: str) -> str:
    import torch

    if name == "cpu" or (name == "cuda" and torch.cuda.is_available()):
        return name
    raise CommandError(f"device {name!r} cannot be used here. Use --device cpu; `flash-inference doctor` tells more.")


def _gpu_cases(device: str, quick: bool) -> list[GpuCase]:
    """The cases of a GPU's kernels; none where there are no kernels."""
    import torch

    if device != "cuda":
        return []
    try:
        import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        note(f"the GPU's kernels are left out: {error}; pip install triton")
        return []
    return list(gpu_cases(torch.cuda.mem_get_info()[0], quick))


def _cases(device: str, quick: bool) -> Iterator[Case]:
    from flash_inference.engine.plan import free_memory

    free = free_memory()
    for dtype in QUICK_DTYPES if quick else DTYPES:
        for channels in QUICK_CHANNELS if quick else CHANNELS:
            for rows in QUICK_ROWS if quick else ROWS:
                for side in SIDES:
                    case = Case(side, channels, rows, dtype, device)
                    if free is not None and case.nbytes > free:
                        note(f"left out: {case} takes {size(case.nbytes)}, {size(free)} are free")
                    else:
                        yield case


def _measure(case: Case, seconds: float, wrong: dict[str, str]) -> Iterator[Measurement]:
    """Checks, then times, every implementation but the reference; one that fails goes to `wrong`, for good."""
    import torch

    from flash_inference.ops.tile_conv import TILE_CONV_IMPLS, Impl, Measurement, PreparedFilter

    side, shape = case.side, (case.channels, case.rows, case.side)
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(side)
    y = torch.randn(shape, generator=generator, dtype=dtype).to(case.device).permute(2, 1, 0)
    rho = torch.randn(case.channels, 2 * side, generator=generator, dtype=dtype).to(case.device)
    prepared = PreparedFilter(rho, spectra_bytes=1 << 62)
    exact = _reference(y, rho)
    for impl in TILE_CONV_IMPLS:
        if impl is Impl.REFERENCE or impl in wrong or (impl is Impl.DIRECT and side > DIRECT_SIDE):
            continue
        out = torch.zeros(shape, dtype=dtype, device=case.device).permute(2, 1, 0)
        TILE_CONV_IMPLS[impl](y, prepared, 1, out, slice(None))
        error = (out.double().cpu() - exact).abs()
        excess = (error / _bound(impl, y, rho)).max()
        if not bool(excess <= 1):
            wrong[impl] = f"{impl} at {case}: {float(excess):.3g} times its error bound, so it is left out of the table"
            continue
        yield Measurement(
            side=side, rows=case.rows, channels=case.channels, dtype=str(dtype), device=case.device,
            threads=torch.get_num_threads(), impl=str(impl), microseconds=_time(impl, y, prepared, out, seconds),
            error=float(error.max() / exact.abs().max()),
        )  # fmt: skip


def _time(impl: str, y: Tensor, prepared: PreparedFilter, out: Tensor, seconds: float) -> float:
    """Microseconds of a call: the median of groups of calls that last `seconds` together, and three groups at least."""
    import torch

    from flash_inference.ops.tile_conv import TILE_CONV_IMPLS

    call = TILE_CONV_IMPLS[impl]

    def group(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call(y, prepared, 1, out, slice(None))
        if out.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    group(1)
    count = max(1, int(seconds / 10 / group(1)))
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(group(count))
    return statistics.median(times) * 1e6


def _reference(y: Tensor, rho: Tensor) -> Tensor:
    """The tile [T, B, C] in float64, on the CPU: summed directly, or above 32 positions by numpy's FFT."""
    import torch

    from flash_inference.ops.tile_conv import PreparedFilter
    from flash_inference.ops.tile_conv.reference import tile_conv_reference

    y, rho = y.double().cpu(), rho.double().cpu()
    side = y.shape[0]
    out = torch.zeros(y.shape, dtype=torch.float64)
    if side <= 32:
        tile_conv_reference(y, PreparedFilter(rho), 1, out, slice(None))
        return out
    import numpy as np

    for c in range(y.shape[2]):
        product = np.fft.rfft(y[:, :, c].numpy().T, 4 * side) * np.fft.rfft(rho[c].numpy(), 4 * side)
        out[:, :, c] = torch.from_numpy(np.fft.irfft(product, 4 * side)[:, side : 2 * side].T.copy())
    return out


def _bound(impl: str, y: Tensor, rho: Tensor) -> Tensor:
    """The largest error that an implementation may make, broadcast against [T, B, C].

    Direct: (S + 1) eps sum |y| |rho| per element. Others: 10 eps log2(n) ||y|| ||rho||, the worst case of two
    transforms forward and one back on n points (Higham, Accuracy and Stability of Numerical Algorithms, theorem
    24.2). Where the reference is a float64 FFT, its own bound is added.
    """
    import torch

    from flash_inference.ops.tile_conv import Impl

    side = y.shape[0]
    norms = y.double().cpu().norm(dim=0) * rho.double().cpu().norm(dim=1)
    transforms = 10 * math.log2(4 * side) * norms
    bound = torch.finfo(y.dtype).eps * transforms
    if impl is Impl.DIRECT:
        bound = (side + 1) * torch.finfo(y.dtype).eps * _reference(y.abs(), rho.abs())
    return bound + (torch.finfo(torch.float64).eps * transforms if side > 32 else 0)


def _print(choice: Choice, json: bool) -> None:
    if json:
        write_json([dataclasses.asdict(m) for m in choice.measurements])
        return
    if not choice.measurements:
        write(f"No table: tiles up to side {choice.crossover} are summed directly, larger ones go by FFT.\n")
        return
    groups: dict[tuple[str, str, int, int, int], dict[int, list[Measurement]]] = {}
    for m in choice.measurements:
        key = (m.device, m.dtype, m.threads, m.channels, m.rows)
        groups.setdefault(key, {}).setdefault(m.side, []).append(m)
    for (device, dtype, threads, channels, rows), sides in groups.items():
        by = f"{threads} threads" if threads else "its kernels"
        write(f"{device}, {dtype.removeprefix('torch.')}, {by}, {channels} channels, {rows} rows\n")
        impls = sorted({m.impl for ms in sides.values() for m in ms})
        table: list[list[str]] = []
        for side, ms in sorted(sides.items()):
            times = {m.impl: m.microseconds for m in ms}
            cells = [f"{times[impl]:,.1f}" if impl in times else "-" for impl in impls]
            table.append([str(side), min(times, key=lambda impl: times[impl]), *cells])
        write_table(["side", "fastest", *(f"{impl} us" for impl in impls)], table)
        write("\n")
