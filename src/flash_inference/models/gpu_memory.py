"""What decoding on one GPU takes, computed from shapes: before it is taken, and without a GPU."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flash_inference.errors import PlanError
from flash_inference.filters import ImplicitFilter
from flash_inference.models.fused import unfused
from flash_inference.ops.tile_conv import measured
from flash_inference.ops.tile_conv.factors import scratch_numbers
from flash_inference.tiling import Staggered
from flash_inference.tiling.schedule import LEAST, Groups, Pricing
from flash_inference.tiling.triangle import next_power

if TYPE_CHECKING:
    from flash_inference.models.backbone import LanguageModel

GRAPH = 16
"""Positions a graph; pairs inside them are inline."""
NEAR = 64
"""Largest side that is paid at once; less where `flash-inference tune` says so. Larger ones stand out among steps."""
MANY = 16
"""Rows from which squares are paid on tensor cores, from the first taps channel by channel: fewer leave them idle."""
BLAS = 32 << 20
"""What PyTorch gives cuBLAS to work in, a stream, on devices of compute capability 9."""
BEHIND = 8
"""Graphs of which a ring still holds the tokens."""
OWED = 1 << 25
"""Points of transforms that are made at once where a prompt is paid forward beside running rows."""
READ = 2048
"""Positions of a prompt that are read at once beside running rows."""
NODE = 4096
"""About the bytes of a kernel in a captured graph. They are the driver's: PyTorch's allocator does not count them."""
MARGIN = 1 << 30
"""Left free beside the spectra: blocks that the allocator keeps between two uses, cuFFT's tables, the driver's."""


def near_side(device: str, batch: int, channels: int) -> int:
    """The largest side to pay at once on a GPU of that name: as `flash-inference tune` measured it, or a default.

    At most the default: a larger square would make its position stand out, and cost more than one by transforms.
    """
    return max(GRAPH, min(NEAR, measured().crossover_on(device, batch, channels) or NEAR))


def fits_bfloat16(weight: Tensor) -> bool:
    """Whether bfloat16 holds every number of a matrix."""
    return torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight)


@dataclass(frozen=True, slots=True)
class GpuShape:
    """What of a model its memory on a GPU depends on.

    `channels` of all long convolutions; `hidden`: of the widest filter network, 0 without; `past`: bytes of one row's
    other pasts; `activations`: numbers a position of a prompt; `own`: bytes of the model itself; `copies`: of weights
    as they are streamed, where those are not the model's own; `largest`: numbers of the largest matrix.
    """

    channels: int
    width: int
    vocab: int
    layers: int
    hidden: int
    past: int
    activations: int
    own: int
    copies: int
    largest: int

    @classmethod
    def of(cls, model: LanguageModel, narrow: bool | None = None, rows: int | None = None) -> GpuShape:
        """A model's; its weights may stand on the meta device if `narrow` is given.

        `narrow` tells whether bfloat16 holds every matrix without loss; None looks at the values. Pasts have room for
        `rows` positions, or all that the model allows. A model that runs by its own modules is not copied.
        """
        parameters, head = list(model.parameters()), model.head.weight
        groups = [group for block in model.blocks for group in block.convolutions]
        own = {
            id(module) for group in groups if isinstance(group.filter, nn.Module) for module in group.filter.modules()
        }
        linears = [module for block in model.blocks for module in block.modules() if isinstance(module, nn.Linear)]
        matrices = [linear.weight for linear in linears if id(linear) not in own]
        fused = unfused(model) is None
        streamed = [*matrices, *([] if head.dtype == torch.bfloat16 else [head])] if fused else []
        fit = [weight for weight in streamed if (fits_bfloat16(weight) if narrow is None else narrow)]
        wide = 4 * sum(p.numel() for p in parameters) if fused and parameters[0].dtype != torch.float32 else 0
        room = rows or model.config.length
        pasts = sum(mixer.past_bytes(room) for block in model.blocks for mixer in block.mixers)
        return cls(
            channels=sum(group.filter.channels for group in groups),
            width=model.config.width,
            vocab=model.config.vocab_size,
            layers=len(model.blocks),
            hidden=max((len(g.filter.freq) for g in groups if isinstance(g.filter, ImplicitFilter)), default=0),
            past=pasts * 4 // parameters[0].itemsize if fused else pasts,
            activations=max(block.activations for block in model.blocks),
            own=sum(p.nbytes for p in parameters),
            copies=wide + 2 * sum(weight.numel() for weight in fit),
            largest=max(weight.numel() for weight in [*matrices, head]),
        )


@dataclass(frozen=True, slots=True)
class GpuRunShape:
    """What of a run its memory depends on: `prompt` positions of `length`, of `batch` rows, stored as `dtype`.

    `near`, `bounded` and `pricing` are the decoder's: sides paid at once, tiles with slack or squares, chunks. With
    `lives` rows come and go on a clock without end, each for at most so many positions behind a prompt of its own:
    history is a ring then, and holds no prompts.
    """

    length: int
    prompt: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float32
    near: int = NEAR
    bounded: bool = True
    pricing: Pricing = field(default_factory=Pricing)
    lives: int = 0

    @property
    def lead(self) -> int:
        """Rows before the first new position: the prompt's, up to a whole graph."""
        return 0 if self.lives else -(-self.prompt // GRAPH) * GRAPH

    @property
    def behind(self) -> int:
        """Rows of the positions after the prompt, up to a whole graph; the ring's, where rows come and go."""
        return self.ring if self.lives else -(-max(self.length - self.prompt, 1) // GRAPH) * GRAPH

    @property
    def top(self) -> int:
        """The largest side of the late squares on a clock without end; 0 for none."""
        return Staggered(None, self.near, GRAPH, taps=self.lives).top

    @property
    def ring(self) -> int:
        """Rows of a ring: a tile's sources and targets, and two near-blocks.

        When position n is reached, chunks read sources from n - near - top on, and add to targets up to n + near + top.
        The host may be some graphs behind in reading tokens.
        """
        return max(2 * self.top + 2 * self.near, -(-(BEHIND * GRAPH) // self.near) * self.near)

    @property
    def sides(self) -> list[int]:
        """The sides of tiles by FFT, ascending."""
        if self.lives:
            return Groups(None, self.near, GRAPH, 1, self.lives).sizes
        top = next_power(self.length) // 2
        return [self.near << q for q in range(max(0, (top // self.near).bit_length()))]

    def groups(self, span: int | None, channels: int) -> Groups:
        """Which channels pay which large tiles when, over so many positions behind a prompt, or without end."""
        if self.lives:
            return Groups(None, self.near, GRAPH, channels, self.lives)
        return Groups(span, self.near, GRAPH, channels)

    def pieces(self, channels: int, width: int) -> list[range]:
        """The channels of each part of a Relaxed square: about a layer's, for smaller workspace at hardly any cost."""
        width = max(2, width // self.batch // 2 * 2)
        return [range(c, min(c + width, channels)) for c in range(0, channels, width)]

    def least(self, size: int, channels: int, kept: bool) -> int:
        """Channels that a chunk of that size has at least.

        Where its spectrum is not kept: as many as are made at once. The host launches some 30 kernels for one channel
        or for 64.
        """
        return LEAST if kept else max(LEAST, points_at_once(channels, self.length) // (2 * size))

    def widest(self, size: int, channels: int, width: int, kept: bool) -> int:
        """Channels of the widest chunk of that size."""
        if not self.bounded:
            return len(self.pieces(channels, width)[0])
        most, least = self.groups(self.length, channels).most(size), self.least(size, channels, kept)
        return len(self.pricing.widths(size, range(most), self.batch, least)[0])

    def scratch(self, channels: int, width: int, kept: tuple[int, ...]) -> int:
        """Numbers that the largest chunk works on, or the largest part of a Relaxed square; `width` is a layer's."""
        sizes = self.sides if channels else ()
        lanes = {size: self.widest(size, channels, width, size in kept) * self.batch for size in sizes}
        return max((scratch_numbers(size, many) for size, many in lanes.items()), default=0)


@dataclass(frozen=True, slots=True)
class GpuBytes:
    """Bytes on a GPU by what they are for; `own` are the model's, which stand there before.

    weights: copies as they are streamed; filters: near taps, READ more where rows come and go, and the filter networks'
    last hidden layers; spectra: of the sides in `kept`; state: history and the other pasts; workspace: the most that is
    in flight beside all that; graphs: the driver's, an estimate.
    """

    own: int
    weights: int
    filters: int
    spectra: int
    state: int
    workspace: int
    graphs: int
    kept: tuple[int, ...]

    @property
    def total(self) -> int:
        """What the process grows by on the device, the model's own weights aside."""
        return self.weights + self.filters + self.spectra + self.state + self.workspace + self.graphs


def points_at_once(channels: int, length: int) -> int:
    """Taps x channels that are worked on at once: a 64th of the state's numbers, from 2^20 to 2^24."""
    return min(max(channels * length >> 6, 1 << 20), 1 << 24)


def gpu_bytes(shape: GpuShape, run: GpuRunShape, spectra: int) -> GpuBytes:
    """The bytes of a run that may keep `spectra` bytes of spectra: small sides first, since they are used most.

    The most at one time is the largest of three: spectra being made, kernels being tried, and the run.
    """
    C, B = shape.channels, run.batch
    near_taps = 4 * C * (2 * run.near + 1)
    first_taps = 4 * C * min(READ + run.near, run.length) if run.lives else 0
    kept, used = list[int](), 0
    for size in run.sides:
        cost = 8 * size * C
        if used + cost <= spectra:
            kept.append(size)
            used += cost
    rows = run.lead + run.behind
    state = (rows + run.near) * C * B * run.dtype.itemsize + B * shape.past + rows * (8 * B + 8)
    small = 24 * B * shape.vocab + 16 * B * (shape.activations + shape.width)
    made = max((_made(C, shape, 2 * size, run.length) for size in kept), default=0)
    scratch, spectrum = 4 * run.scratch(C, shape.width, tuple(kept)), spectrum_bytes(shape, run, tuple(kept))
    unkept = C > 0 and len(kept) < len(run.sides)
    tried = (2 * run.near + GRAPH) * C * B * run.dtype.itemsize + spectrum
    # Where spectra are made in the run, its stream has its own place for cuBLAS from the start on.
    at_once = max(_prefill(shape, run) + (BLAS if unkept else 0), spectrum)
    if B > 1:
        made = max(made, 8 * shape.largest)
    return GpuBytes(
        own=shape.own,
        weights=shape.copies,
        filters=near_taps * (2 if B >= MANY else 1) + first_taps + 8 * C,
        spectra=used,
        state=state,
        workspace=small + scratch + BLAS + max(state + at_once, tried, made, 2 * near_taps) - state,
        graphs=NODE * GRAPH * (4 * shape.layers + 2) * (3 if run.lives else 1),
        kept=tuple(kept),
    )


def _taps(shape: GpuShape, points: int, hidden_rows: int) -> int:
    """Evaluating `points` taps: an implicit filter's window is float64, its hidden layer stands beside an older one."""
    if not shape.hidden:
        return 8 * points
    hidden = 4 * shape.hidden * hidden_rows
    return max(4 * hidden, 2 * hidden + 20 * points)


def _made(channels: int, shape: GpuShape, n: int, length: int) -> int:
    """Making spectra of n places: taps, their padding, transform and its workspace in float64, its rounding."""
    points = max(1, min(points_at_once(channels, length) // (2 * n), shape.width)) * n
    return max(_taps(shape, points, n), 2 * 4 * shape.hidden * n + 32 * points)


def spectrum_bytes(shape: GpuShape, run: GpuRunShape, kept: tuple[int, ...]) -> int:
    """A chunk's spectrum made anew, where it is not kept, beside the hidden layers that a prompt left or its own."""
    most = 2 * 4 * shape.hidden * run.length
    for size in run.sides if shape.channels else ():
        if size not in kept:
            points = run.widest(size, shape.channels, shape.width, False) * size
            made = max(_taps(shape, 2 * points, 2 * size), 2 * 4 * shape.hidden * 2 * size + 24 * points)
            most = max(most, made + BLAS)
    return most


def _prefill(shape: GpuShape, run: GpuRunShape) -> int:
    """A prompt's pass: a block's activations, or half of them beside a chunk of channels being convolved.

    One position needs no transform: its share of every later one is a tap.
    """
    total, P = run.length, run.prompt
    points, half = points_at_once(shape.channels, total), 2 * shape.activations * P
    if run.lives:
        n, read = 2 * next_power(total), min(READ, total)
        width = max(2, min(OWED // n, shape.channels))
        return 32 * width * n + _taps(shape, width * n, n) + 4 * (shape.activations + shape.channels) * read
    if P == 1:
        width = max(1, min(points // total, shape.width))
        return half + _taps(shape, width * total, total) + (8 * width * total if width < shape.width else 0)
    n = 1 << (2 * P + run.behind - 1).bit_length()
    width = max(1, min(points // n, shape.width))
    again = 4 * width * n if width < shape.width else 0
    taps = _taps(shape, width * total, total) + 2 * again
    convolved = 2 * 4 * shape.hidden * total + 4 * width * total + 16 * width * n + again
    return max(2 * half, half + max(taps, convolved))


def fitted(shape: GpuShape, run: GpuRunShape, free: int, name: str = "the GPU") -> GpuBytes:
    """The bytes of a run on a device with `free` bytes, spectra in what is left. Raises PlanError if that is nothing.

    The error says what would fit: a length, 16-bit state, a smaller batch.
    """

    def needed(run: GpuRunShape) -> int:
        return gpu_bytes(shape, run, 0).total

    def at(length: int) -> GpuRunShape:
        return replace(run, length=length, prompt=min(run.prompt, length))

    if needed(run) <= free:
        return gpu_bytes(shape, run, max(0, free - needed(run) - MARGIN))
    bare, remedies = gpu_bytes(shape, run, 0), list[str]()
    if fits := bisect_right(range(1, run.length), free, key=lambda length: needed(at(length))):
        remedies.append(f"{fits:,} positions")
    if run.dtype.itemsize > 2:
        short = torch.bfloat16
        half = bisect_right(range(1, run.length + 1), free, key=lambda n: needed(replace(at(n), dtype=short)))
        if half > fits:
            remedies.append(f"{half:,} with 16-bit state (state_dtype=torch.bfloat16)")
    if rows := bisect_right(range(1, run.batch), free, key=lambda batch: needed(replace(run, batch=batch))):
        remedies.append(f"{rows} of the {run.batch} rows")
    raise PlanError(
        f"{run.batch} x {run.length:,} positions need {bare.total / 2**30:.2f} GiB ({bare.state / 2**30:.2f} GiB of "
        f"mixer state, {bare.workspace / 2**30:.2f} GiB to work in); {free / 2**30:.2f} GiB are free on {name}. "
        + (f"Would fit: {', or '.join(remedies)}." if remedies else "No length fits: free memory there first.")
    )


def free_on(device: torch.device) -> int:
    """Bytes that a CUDA device has left, those that PyTorch keeps unused among them."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
