"""How `flash-inference tune` measures the kernels of a GPU: squares as direct sums against squares by FFT."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flash_inference.ops.tile_conv import Measurement

SIDES = (32, 64, 128, 256, 512, 1024)
CHANNELS, BATCHES = (1024, 4608, 13_824), (1, 8, 32)
QUICK_CHANNELS, QUICK_BATCHES = (4608,), (1,)
DIRECT_SIDE = 1024
"""Above it a direct sum is hopeless."""
PIECE = 256
"""Channels whose spectra are made at once; as many are checked, or fewer of large tiles."""


@dataclass(frozen=True, slots=True)
class GpuCase:
    """A square of `side` positions on `channels` filter channels, each for `batch` sequences."""

    side: int
    channels: int
    batch: int
    device: str = "cuda"

    @property
    def work(self) -> float:
        """About how long it takes, in the unit of the CPU's cases."""
        return 1e6 + self.channels * self.batch * self.side / 4

    @property
    def nbytes(self) -> int:
        """About how many bytes the tile and its check take: two blocks, taps, spectra, chunks in flight."""
        return 4 * self.side * self.channels * (2 * self.batch + 6) + (1 << 28)

    def __str__(self) -> str:
        return f"side {self.side}, {self.channels} channels, batch {self.batch} on {self.device}"


def gpu_cases(free: int, quick: bool) -> Iterator[GpuCase]:
    """The squares to time that fit `free` bytes."""
    for channels in QUICK_CHANNELS if quick else CHANNELS:
        for batch in QUICK_BATCHES if quick else BATCHES:
            for side in SIDES:
                case = GpuCase(side, channels, batch)
                if case.nbytes <= free:
                    yield case


def implementations(case: GpuCase, history: Tensor, rho: Tensor) -> dict[str, Callable[[], None]]:
    """The ways to pay the square: rows side .. 2 side - 1 of `history` [2 side, C B] from those before, rho [C, taps].

    By FFT in the chunks, and with the spectra kept, of a decoder; directly up to DIRECT_SIDE, and on tensor cores where
    a decoder does that.
    """
    import torch

    from flash_inference.models.gpu_memory import MANY
    from flash_inference.ops.tile_conv.fft_rows import TileFFT
    from flash_inference.ops.tile_conv.toeplitz import LARGEST, SMALLEST, tile_toeplitz
    from flash_inference.ops.tile_conv.triton import tile_rows
    from flash_inference.tiling.schedule import Pricing

    side = case.side
    fft = TileFFT(side, lambda first, stop, channels: rho[channels.start : channels.stop, first:stop].contiguous())
    fft.prepare(case.channels, PIECE)
    cuts = Pricing().widths(side, range(case.channels), case.batch)

    def by_fft() -> None:
        for cut in cuts:
            fft.pay(history, range(side), range(side, 2 * side), cut, case.batch)

    if side > DIRECT_SIDE:
        return {"fft": by_fft}
    clock, near = torch.zeros(1, dtype=torch.long, device=rho.device), rho.T.contiguous()
    ways = {"direct": partial(tile_rows, history, near, range(side), range(side, 2 * side), clock, case.batch)}
    if case.batch >= MANY and SMALLEST <= side <= LARGEST:
        ways["toeplitz"] = partial(tile_toeplitz, history, rho, side, 0, clock, case.batch)
    return ways | {"fft": by_fft}


def measure_gpu(case: GpuCase, seconds: float, wrong: dict[str, str]) -> Iterator[Measurement]:
    """Checks each way against float64, then times it; one that fails goes to `wrong`, for good."""
    import torch

    from flash_inference.ops.tile_conv import Measurement

    side, device = case.side, torch.device(case.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else case.device
    generator = torch.Generator(device).manual_seed(side)
    history = torch.randn(2 * side, case.channels * case.batch, generator=generator, device=device)
    rho = torch.randn(case.channels, 2 * side, generator=generator, device=device)
    for impl, pay in implementations(case, history, rho).items():
        if impl in wrong:
            continue
        history[side:] = 0
        pay()
        excess, error = _judge(impl, history, rho, case)
        if not excess <= 1:
            wrong[impl] = f"{impl} at {case}: {excess:.3g} times its error bound, so it is left out of the table"
            continue
        yield Measurement(
            side=side, rows=case.batch, channels=case.channels, dtype="torch.float32", device=name, threads=0,
            impl=impl, microseconds=device_time(pay, seconds, device), error=error,
        )  # fmt: skip


def device_time(call: Callable[[], None], seconds: float, device: torch.device) -> float:
    """Microseconds of a call on the device's own clock, captured in a graph: the median of at least three replays."""
    import torch

    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    count, graph = 8, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(count):
            call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    with torch.cuda.stream(stream):
        while len(times) < 3 or time.perf_counter() < end:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) * 1e3 / count)
    return statistics.median(times[1:])


def _judge(impl: str, history: Tensor, rho: Tensor, case: GpuCase) -> tuple[float, float]:
    """By how much the worst element exceeds its bound, and the largest error over the largest number.

    Bounds as for the other implementations (`cli/tune.py`); NaN exceeds every one.
    """
    import torch

    side, eps = case.side, torch.finfo(torch.float32).eps
    excess, error, largest = 0.0, 0.0, 0.0
    whole = history.view(2 * side, case.channels, case.batch)
    piece = max(1, min(PIECE, (1 << 22) // (side * case.batch)))
    for c in range(0, case.channels, piece):
        y, taps = whole[:side, c : c + piece].double(), rho[c : c + piece].double()
        exact = _square(y, taps)
        off = (whole[side:, c : c + piece].double() - exact).abs()
        transforms = 10 * math.log2(4 * side) * y.norm(dim=0) * taps.norm(dim=1)[:, None]
        bound = eps * transforms
        if impl != "fft":
            bound = (side + 1) * eps * _square(y.abs(), taps.abs()) + torch.finfo(torch.float64).eps * transforms
        worst = (off / bound).amax()
        if not bool(worst <= 1):
            return float(worst), float(off.amax() / exact.abs().amax())
        excess = max(excess, float(worst))
        error, largest = max(error, float(off.amax())), max(largest, float(exact.abs().amax()))
    return excess, error / largest


def _square(y: Tensor, rho: Tensor) -> Tensor:
    """What sources y [S, C, B] owe the next S targets under rho [C, 2 S], in float64, by FFT on 4 S places."""
    import torch

    S = y.shape[0]
    product = torch.fft.rfft(y, n=4 * S, dim=0) * torch.fft.rfft(rho, n=4 * S).T[..., None]
    return torch.fft.irfft(product, n=4 * S, dim=0)[S : 2 * S]
