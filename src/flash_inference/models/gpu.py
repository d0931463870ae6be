"""A model made ready to decode on one GPU: weights as they are streamed, filter spectra, and a run's memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flash_inference.errors import LengthError, ModelError
from flash_inference.mixers.mixer import Moment
from flash_inference.models.block import BlockPast
from flash_inference.models.fused import unfused
from flash_inference.models.gpu_hyena import HyenaSteps
from flash_inference.models.gpu_memory import (
    GRAPH,
    MANY,
    OWED,
    READ,
    GpuBytes,
    GpuRunShape,
    GpuShape,
    fitted,
    free_on,
    gpu_bytes,
    near_side,
    points_at_once,
    spectrum_bytes,
)
from flash_inference.models.gpu_modules import ModuleStep, ModuleSteps, unreplayed
from flash_inference.models.side_by_side import SideBySide
from flash_inference.ops.decode_step.triton import GpuStep, Shapes
from flash_inference.ops.decode_step.triton_batch import BatchShapes, GpuBatchStep
from flash_inference.ops.tile_conv.fft_rows import TileFFT
from flash_inference.ops.tile_conv.toeplitz import LARGEST, SMALLEST, tile_toeplitz
from flash_inference.ops.tile_conv.triton import tile_rows
from flash_inference.tiling.schedule import Groups, Pricing
from flash_inference.tiling.triangle import next_power

if TYPE_CHECKING:
    from flash_inference.models.backbone import LanguageModel

AnyStep = GpuStep | GpuBatchStep | ModuleStep
PIECE = 4096
"""Positions of a prompt that are read at a time where no long convolution wants them all."""


@dataclass
class GpuRun:
    """Sequences in flight: the long convolutions' one buffer [rows, C B], time-major, and what is kept beside it.

    `pending` is the step's own: what mixers with another past keep, with room for `room` positions a row. Row r belongs
    to position r - lead; `lead` rows end where the prompts end, a multiple of the graph's positions. What stands before
    a shorter prompt is zero. `scratch` is what large tiles are worked in, one after the other.
    """

    batch: int
    lead: int
    rows: int
    room: int
    history: Tensor
    pending: Any
    clock: Tensor
    tokens: Tensor
    host_tokens: Tensor
    stamps: Tensor
    scratch: Tensor


class GpuSteps(Protocol):
    """How single positions run: by kernels that know a family, or by the model's own modules."""

    def make(self, batch: int, shapes: BatchShapes | None) -> AnyStep:
        """The step of that many sequences, ready to be forked."""
        ...

    def pending(self, batch: int, rows: int) -> Any:
        """What the mixers with a past of their own keep of `batch` sequences, each of at most `rows` positions."""
        ...

    def keep(self, run: GpuRun, row: int, pasts: list[list[Any]], prompt: int, clock: int) -> None:
        """Puts the pasts behind a row's prompt, block by block and mixer by mixer, where its steps find them.

        The prompt ended at `clock`.
        """
        ...

    def repeat(self, run: GpuRun, twin: int, row: int) -> None:
        """Gives a row what another keeps."""
        ...

    def turn(self, run: GpuRun, by: int) -> None:
        """The device's clock is about to be set back by so many positions, and time goes on."""
        ...


class GpuDecoder:
    """A LanguageModel made ready to decode up to `length` positions of up to `batch` sequences at once on its GPU.

    Hyena models run by fused kernels: matrices are streamed as bfloat16 where that changes no value, and as they are
    otherwise; activations and sums are float32. Other models run by their own modules, in their own dtype. The state of
    long convolutions is kept in `dtype` and summed in float32. `near` is the largest side that is paid at once, by
    default what `flash-inference tune` measured on this device. `spectra_bytes` bounds the stored filter spectra (by
    default what the device has left beside a run after `prompt` positions); larger sides are transformed when needed.
    `shapes`, `batch_shapes` and `pdl` are settings of the fused kernels. With `lives` rows come and go (`open`), each
    for at most so many positions behind its prompt. `free` bytes may be taken (default: what the device has left).
    Raises PlanError, before anything is allocated, if a run cannot fit: see `plan`, the bytes by what they are for.
    """

    def __init__(
        self, model: LanguageModel, length: int, *, shapes: Shapes | None = None, pdl: bool | None = None,
        spectra_bytes: int | None = None, near: int | None = None, latency: str = "bounded", batch: int = 1,
        dtype: torch.dtype = torch.float32, pricing: Pricing | None = None, batch_shapes: BatchShapes | None = None,
        prompt: int = 1, lives: int = 0, free: int | None = None,
    ) -> None:  # fmt: skip
        config = model.config
        if length > config.length:
            raise LengthError(f"{length} positions were asked for; this model's filter allows {config.length}.")
        self.model, self.config, self.length, self.dtype = model, config, length, dtype
        self.bounded, self.pricing, self.batch = latency == "bounded", pricing or Pricing(), batch
        self.device = next(model.parameters()).device
        self.shape = GpuShape.of(model, rows=length + 2 * GRAPH)
        self.near_side = near = near or tuned_near(self.device, batch, self.shape.channels)
        self.room = GpuRunShape(length, prompt, batch, dtype, near, self.bounded, self.pricing, lives)
        self.plan = self._planned(spectra_bytes, free)
        self.points = points_at_once(self.shape.channels, length)
        fused = unfused(model) is None
        float32 = next(model.parameters()).dtype == torch.float32
        self.exact = model if float32 or not fused else copy.deepcopy(model).float()
        self.filters = filters = SideBySide([block.convolutions for block in self.exact.blocks], length, self.device)
        self.channels, self.padded = filters.channels, filters.padded
        if self.device.type == "cuda":
            # Of two kernels that wait, the device starts the one of higher priority: steps before tiles.
            self.main, self.back = torch.cuda.Stream(priority=-5), torch.cuda.Stream(priority=0)
        with torch.inference_mode(False), torch.no_grad():
            taps = self.padded(0, 2 * near + 1, range(self.channels))
            self.near, self.by_channel = taps.T.contiguous(), taps.contiguous() if batch >= MANY else None
            self.early = self.padded(0, min(READ + near, length) if lives else 0, range(self.channels))
            settings = {"near": self.near, "diagonal": filters.skip + self.near[0], "block": GRAPH}
            self.steps: GpuSteps = (
                HyenaSteps(model, self.exact, shapes=shapes, batch_shapes=batch_shapes, pdl=pdl, **settings)
                if fused
                else ModuleSteps(model, filters.lanes, **settings)
            )
            self.step = self.steps.make(1, None)
            self._made: dict[tuple[int, BatchShapes | None], AnyStep] = {}
        self.ffts: dict[int, TileFFT] = {}
        for size in self.room.sides if self.channels else ():
            self.ffts[size] = fft = TileFFT(size, self.padded, near if self.bounded else 0)
            if size in self.plan.kept:
                fft.prepare(self.channels, max(1, min(self.points // (4 * size), config.width)))
        self._warmed = set[int]()
        if batch == 1:
            self._warm(self.step, 1)

    def step_of(self, batch: int, shapes: BatchShapes | None = None) -> AnyStep:
        """What runs a position of one sequence, or of a batch of that many: a fork, with scratch of its own."""
        if batch == 1:
            if 1 not in self._warmed:
                with torch.inference_mode(False), torch.no_grad():
                    self._warm(self.step, 1)
            return self.step.fork()
        key = batch, shapes
        if key not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = self.steps.make(batch, shapes)
                self._warm(self._made[key], batch)
        return self._made[key].fork()

    def _planned(self, spectra_bytes: int | None, free: int | None) -> GpuBytes:
        """The bytes of a run, and which spectra are kept; off a GPU, a GiB of them."""
        if self.device.type != "cuda":
            return gpu_bytes(self.shape, self.room, 1 << 30 if spectra_bytes is None else spectra_bytes)
        free = free_on(self.device) if free is None else free
        plan = fitted(self.shape, self.room, free, torch.cuda.get_device_name(self.device))
        return plan if spectra_bytes is None else gpu_bytes(self.shape, self.room, spectra_bytes)

    def serves(self, length: int, batch: int, prompt: int) -> bool:
        """Whether such a run fits this decoder, and the memory that is free beside it."""
        if self.length < length or self.batch < batch:
            return False
        run = replace(self.room, length=length, batch=batch, prompt=prompt)
        needs = gpu_bytes(self.shape, run, self.plan.spectra)
        return self.device.type != "cuda" or needs.state + needs.workspace <= free_on(self.device)

    def init(self, prompt: int, new: int, batch: int = 1) -> GpuRun:
        """Memory for `batch` prompts of up to `prompt` positions, and `new` positions after them."""
        lead = -(-prompt // GRAPH) * GRAPH
        rows = lead + -(-new // GRAPH) * GRAPH
        return self._memory(batch, lead, rows, rows)

    def open(self) -> GpuRun:
        """Memory for `batch` rows that come and go: a ring, all zeros, and no prompts."""
        return self._memory(self.batch, 0, self.room.ring, self.length)

    def _memory(self, batch: int, lead: int, rows: int, room: int) -> GpuRun:
        device = self.device
        return GpuRun(
            batch=batch,
            lead=lead,
            rows=rows,
            room=room,
            history=torch.zeros(rows + self.near_side, self.channels * batch, dtype=self.dtype, device=device),
            pending=self.steps.pending(batch, room),
            clock=torch.full((2 + batch,), lead, dtype=torch.long, device=device),
            tokens=torch.full((rows, batch), -1, dtype=torch.long, device=device),
            host_tokens=torch.full((rows, batch), -1, dtype=torch.long, pin_memory=device.type == "cuda"),
            stamps=torch.zeros(rows, dtype=torch.long, device=device),
            scratch=torch.empty(
                replace(self.room, batch=batch).scratch(self.channels, self.config.width, self.plan.kept),
                dtype=torch.float32,
                device=device,
            ),
        )

    @torch.no_grad()
    def prefill(self, run: GpuRun, prompt: Tensor, row: int = 0) -> Tensor:
        """Reads a row's prompt [P] -> logits [V]: mixer inputs before `lead`, what they owe behind it."""
        model, P, clock = self.exact, len(prompt), 0
        pasts = [[mixer.init(1, P) for mixer in block.mixers] for block in model.blocks]
        x = torch.empty(0)
        for piece in prompt[None].split(P if self.channels else PIECE, dim=1):
            x = model.embedding(piece)
            for number, block in enumerate(model.blocks):
                past = BlockPast(pasts[number], Moment(clock), partial(self._mix, run, row, number))
                x = block.extend(x, past)
            clock += piece.shape[1]
        self.steps.keep(run, row, pasts, P, run.lead)
        return model.head(model.norm(x[:, -1]))[0].float()

    def repeat(self, run: GpuRun, twin: int, row: int) -> None:
        """Gives a row the prompt that another has read."""
        history = run.history.unflatten(1, (self.channels, run.batch))
        history[..., row] = history[..., twin]
        self.steps.repeat(run, twin, row)

    def _mix(self, run: GpuRun, row: int, block: int, o: int, y: Tensor) -> Tensor:
        """A block's convolution of a whole prompt y [1, P, D], its inputs written and what they owe behind it added."""
        lanes, given = self.filters.lanes[block][o], y[0].float()
        history = run.history.unflatten(1, (self.channels, run.batch))[..., row]
        history[run.lead - len(given) : run.lead, lanes.start : lanes.stop] = given.to(self.dtype)
        z = self._causal(history[run.lead : run.rows], given, lanes.start, len(given))
        return (z + self.filters.skip[lanes.start : lanes.stop] * given)[None].to(y.dtype)

    def _causal(self, behind: Tensor, y: Tensor, first: int, P: int) -> Tensor:
        """What y [P, D] gives its own positions, returned, and the rows behind the prompt, added there."""
        total = min(self.length, P + len(behind))
        n = 1 << (2 * P + len(behind) - 1).bit_length() if P > 1 else 1
        out = torch.empty_like(y)
        width = max(1, min(y.shape[1], self.points // (total if P == 1 else n)))
        for c in range(0, y.shape[1], width):
            cut = slice(c, min(c + width, y.shape[1]))
            rho = self.padded(0, total, range(first + cut.start, first + cut.stop))
            if P == 1:
                z = rho * y[0, cut, None]
            else:
                z = torch.fft.irfft(torch.fft.rfft(y[:, cut].T.contiguous(), n=n) * torch.fft.rfft(rho, n=n), n=n)
            out[:, cut] = z[:, :P].T
            later = z[:, P:total].T
            rows = behind[: later.shape[0], first + cut.start : first + cut.stop]
            rows += later.to(self.dtype)
        return out

    def pay_square(self, run: GpuRun, side: int) -> None:
        """Pays the square behind the block of positions that `run.clock[1]` began: directly, or on tensor cores."""
        if self.by_channel is not None and run.batch >= MANY and SMALLEST <= side <= LARGEST:
            tile_toeplitz(run.history, self.by_channel, side, GRAPH - side, run.clock[1:], run.batch)
        else:
            sources, targets = range(GRAPH - side, GRAPH), range(GRAPH, GRAPH + side)
            tile_rows(run.history, self.near, sources, targets, run.clock[1:], run.batch)

    @torch.no_grad()
    def owed(self, inputs: Tensor, new: int) -> Tensor:
        """What inputs [C, P] of all convolutions owe the next `new` positions: [new, C], float32.

        The first `near` of them by taps; those behind by spectra that are kept for tiles, where a circle holds them.
        O((P + new) log(P + new)) a channel.
        """
        P, near = inputs.shape[1], self.near_side
        out = torch.zeros(new, self.channels, device=self.device)
        fits = (fft for fft in self.ffts.values() if fft.kept and fft.lag == near and fft.size >= max(P, new - near))
        far = next(fits, None) if new > near else None
        first = new if far is None else near
        known = P + min(first, new) <= self.early.shape[1]
        soon = TileFFT(max(GRAPH, next_power(max(P, min(first, new)))), self._early if known else self.padded)
        given = inputs.T.contiguous()
        for fft, rows in ((soon, out[:first]), *(() if far is None else ((far, out[near:]),))):
            for lanes in self._lanes(2 * fft.size):
                fft.owe(given, rows, lanes)
        return out

    def _early(self, first: int, stop: int, lanes: range) -> Tensor:
        """As `padded`, from the taps that are kept; zeros behind those."""
        taps = self.early[lanes.start : lanes.stop, first:stop]
        return torch.nn.functional.pad(taps, (0, stop - first - taps.shape[1]))

    def _lanes(self, n: int) -> list[range]:
        """Channels whose transforms of n points are made at once: few large ones, since the host launches each."""
        width = max(2, OWED // n // 2 * 2)
        return [range(c, min(c + width, self.channels)) for c in range(0, self.channels, width)]

    def pieces(self, batch: int) -> list[range]:
        """The channels of each part of a Relaxed square."""
        return replace(self.room, batch=batch).pieces(self.channels, self.config.width)

    def least(self, size: int) -> int:
        """The channels that a chunk of that size has at least."""
        return self.room.least(size, self.channels, size in self.plan.kept)

    def groups(self, span: int | None) -> Groups:
        """Which channels pay which large tiles when, over so many positions behind a prompt, or without end."""
        return self.room.groups(span, self.channels)

    def _warm(self, step: AnyStep, batch: int) -> None:
        """Runs every kernel once on memory of no worth, so that nothing is compiled in the loop."""
        if self.device.type != "cuda":
            return
        run, side = self.init(self.near_side, GRAPH, batch), GRAPH
        step.start(torch.zeros(batch, self.config.width, device=self.device))
        torch.cuda.synchronize()
        with torch.cuda.stream(self.main):
            positions(self, step, run)
            while side <= self.near_side and self.channels:
                self.pay_square(run, side)
                side *= 2
        if batch not in self._warmed and self.channels:
            # A tile of more sources or targets than its side is a run's largest: which that is, each run decides.
            more, room = self.bounded and not self.room.lives, replace(self.room, batch=batch)
            with torch.cuda.stream(self.back if self.bounded else self.main):
                for size, fft in self.ffts.items():
                    widest = room.widest(size, self.channels, self.config.width, fft.kept)
                    fft.warm(run.history, widest, batch, run.scratch, more)
        self._warmed.add(batch)
        torch.cuda.synchronize()

    def hold(self, batch: int) -> None:
        """Leaves with the allocator what spectra that are not kept are made in, so that no chunk asks the driver.

        That would stall a run for milliseconds. Whoever captures a graph calls it afterwards: a capture gives back all
        that the allocator keeps.
        """
        if self.device.type == "cuda" and any(not fft.kept for fft in self.ffts.values()):
            most = spectrum_bytes(self.shape, replace(self.room, batch=batch), self.plan.kept)
            with torch.cuda.stream(self.back if self.bounded else self.main):
                torch.empty(most, dtype=torch.uint8, device=self.device)


def unusable(weight: Tensor) -> str | None:
    """Why these kernels cannot run a model with such weights, in a line; None if they can."""
    device = weight.device
    if weight.dtype == torch.float64:
        return "they compute in float32, and the model is float64"
    if device.type != "cuda":
        return f"the model is on {device}, not on a GPU"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def tuned_near(device: torch.device, batch: int, channels: int) -> int:
    """The largest side to pay at once on this device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return near_side(name, batch, channels)


def gpu_decoder(
    model: LanguageModel, length: int, latency: str = "bounded", batch: int = 1, prompt: int = 1,
    dtype: torch.dtype = torch.float32,
) -> GpuDecoder:  # fmt: skip
    """The model made ready for `batch` sequences of `length` positions, the first `prompt` of them given.

    Kept on the model while weights stay the same and it suffices. Raises ModelError for a model that no graph can hold,
    PlanError if the run does not fit.
    """
    reason = unreplayed(model)
    if reason is not None:
        raise ModelError(f"no graph can hold this model: {reason}. Decode with model.decoder(length).")
    key = tuple((p.data_ptr(), p._version) for p in model.parameters()), latency, dtype
    kept = getattr(model, "_gpu_decoder", None)
    if kept is None or kept[0] != key or not kept[1].serves(length, batch, prompt):
        kept = model._gpu_decoder = None  # type: ignore[assignment]
        gc.collect()  # tiles hold their decoder, which holds them: its spectra are not freed before
        kept = key, GpuDecoder(model, length, latency=latency, batch=batch, dtype=dtype, prompt=prompt)
        model._gpu_decoder = kept  # type: ignore[assignment]
    return kept[1]


def positions(decoder: GpuDecoder, step: AnyStep, run: GpuRun, draw: Callable[[Tensor], Tensor] | None = None) -> None:
    """Launches a graph's positions. `draw` makes tokens from logits, on the device; None takes the largest."""
    for offset in range(GRAPH):
        step.launch(
            run.history, run.pending, run.clock, run.tokens, run.host_tokens, run.stamps, offset,
            last=offset + 1 == GRAPH, draw=draw,
        )  # fmt: skip
