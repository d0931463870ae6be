"""Long convolutions of several layers side by side: one state, one clock, one call that pays a tile of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from flash_inference.errors import LengthError, ShapeError, StateError, TilingError
from flash_inference.ops.memory import roomy_zeros
from flash_inference.ops.tile_conv import NEAR, Impl, PreparedFilter, measured, tile_conv, triangle_conv
from flash_inference.tiling import Parallelogram, Rectangle, Share, Tiling, clip_to_lives

STAGE = 32
CHUNK = 4096


@dataclass(slots=True)
class StackState:
    """The past of M convolutions of width D for a batch of B sequences, as one value.

    `history` [M * D, B, rows] is the one buffer: a column holds a position's partial sums until the position is read
    and its inputs afterwards. Time is its contiguous axis, since transforms run along it. The base block around the
    clock is staged time-major in `inputs` and `partial` [block, B, M * D], since steps read and write rows.
    `row` is the next position's row there.
    `clock` counts the positions known; `paid` how many of them have paid their tiles, `owed` what the last one still
    owes. Row b begins at clock `start[b]`; inputs before it are zero. Single steps run from clock `step_from`, behind
    prompt and starts, to `step_until`, the length. A tiling without end uses the rows as a ring: `cleared` is the
    clock up to which rows have been zeroed for use as targets, `chunk` the most positions that one `begin` takes.
    Where sequences come and go (`mixers.rows`), `lives[b]` are the clocks at which row b takes inputs, empty for none.
    """

    tiling: Tiling
    start: Tensor
    history: Tensor
    inputs: Tensor
    partial: Tensor
    clock: int = 0
    paid: int = 0
    cleared: int = 0
    staged: bool = False
    row: int = 0
    step_from: int = 0
    step_until: float = math.inf
    owed: list[Rectangle | Share] | None = None
    last_start: int = 0
    chunk: int = 0
    lives: list[range] | None = None
    pushes: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, repr=False)

    @property
    def block(self) -> int:
        """Positions in the staged block."""
        return self.inputs.shape[0]

    @property
    def base(self) -> int:
        """The clock of the staged block's first position."""
        return self.clock - (self.clock - self.tiling.origin) % self.block

    def clone(self) -> StackState:
        """An independent copy; `Stack.bind` makes it ready to step."""
        with torch.inference_mode(False), torch.no_grad():
            copies = {name: getattr(self, name).clone() for name in ("start", "inputs", "partial")}
            copies["history"] = spaced(self.history, *self.history.shape).copy_(self.history)
        lives = None if self.lives is None else list(self.lives)
        return replace(self, **copies, owed=None if self.owed is None else list(self.owed), lives=lives, pushes=[])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.history.nbytes + self.inputs.nbytes + self.partial.nbytes


class Stack:
    """M causal depthwise convolutions of width D with one PreparedFilter [M * D, taps] and skip terms [M * D].

    A list of widths stands for convolutions of different widths, side by side; M * D is then their sum.

    z[m, t, d] = sum over i <= t of y[m, i, d] rho[m, t - i, d] + skip[m, d] y[m, t, d], exactly, for positions that
    arrive in any chunks. One step is `begin(n)`, `mix(m, y)` for m = 0 .. M - 1 in order, `commit(n)`; between steps
    `due` tells the tiles that became payable and `pay` pays one of them for all M convolutions at once.
    """

    def __init__(self, filter: PreparedFilter, width: int | Sequence[int], skip: Tensor | None = None) -> None:
        self.filter, self.width, self.passing = filter, width, filter.passing()
        self.lanes = _lanes(filter.channels, width)
        with torch.inference_mode(False), torch.no_grad():
            zero = torch.zeros_like(filter.rho[:, 0])
            self.skip = zero if skip is None else skip.detach().to(zero).clone()
            self.diagonal = filter.rho[:, 0] + self.skip

    @property
    def count(self) -> int:
        """M, the number of convolutions."""
        return len(self.lanes)

    def init(
        self,
        batch: int,
        tiling: Tiling,
        *,
        dtype: torch.dtype | None = None,
        start: Tensor | None = None,
        lives: Sequence[range] | None = None,
    ) -> StackState:
        """An empty past. Memory: about rows * B * M * D numbers, rows = `rows(tiling)`; raises LengthError.

        `dtype` is how the history is stored (default: the filter's); the staged block and all sums keep the filter's.
        `start` [B] is the clock at which each row begins (default 0). With `lives`, rows come and go: see
        `mixers.rows`. The tiling is then endless, needs to pay lags below its own taps only, and takes single steps.
        """
        check_tiling(tiling, self.filter.length if lives is None else 1)
        C, rho = self.filter.channels, self.filter.rho
        block = tiling.block if tiling.block > 1 else STAGE
        with torch.inference_mode(False):
            start = torch.zeros(batch, dtype=torch.long, device=rho.device) if start is None else start.detach().clone()
            chunk = self.chunk(tiling) if lives is None else block
            rows = self.rows(tiling) if lives is None else ring_rows(tiling)
            history = spaced(torch.zeros(0, dtype=dtype or rho.dtype, device=rho.device), C, batch, rows)
            inputs, partial = (rho.new_zeros(block, batch, C) for _ in range(2))
        state = StackState(tiling, start, history, inputs, partial, last_start=int(start.max()))
        state.chunk, state.lives = chunk, None if lives is None else list(lives)
        state.step_from = max(state.last_start, tiling.origin)
        state.step_until = math.inf if tiling.length is None else tiling.length
        state.cleared = history.shape[2]
        return self.bind(state)

    def bind(self, state: StackState) -> StackState:
        """Makes the views that a block's inline pairs are paid through: row r owes rows r + 1 .. of its block."""
        state.pushes = []
        if state.tiling.block > 1:
            rho, s = self.filter.near if state.block <= NEAR else self.filter.rho.T, self.filter.stride
            for r in range(state.block):
                n = min(state.block - r - 1, self.filter.length - 1) // s
                targets = state.partial[r + s : r + s * n + 1 : s]
                state.pushes.append((targets, rho[1 : 1 + n, None], state.inputs[r : r + 1]))
        return state

    def rows(self, tiling: Tiling) -> int:
        """Rows of history that a tiling needs: its length, or the ring that holds its reach and a chunk."""
        block = tiling.block if tiling.block > 1 else STAGE
        lead = _lead(tiling, block)
        if tiling.length is not None:
            if tiling.length < 1:
                raise LengthError(f"the tiling's length is {tiling.length}; expected at least 1 position.")
            return lead + _round_up(tiling.length - tiling.origin, block)
        back, ahead = tiling.reach
        return _round_up(back, block) + _round_up(ahead, block) + 2 * block + self.chunk(tiling)

    def chunk(self, tiling: Tiling) -> int:
        """The most positions that one `begin` takes in a ring."""
        block = tiling.block if tiling.block > 1 else STAGE
        return _round_up(min(CHUNK, max(block, self.filter.length)), block)

    def pieces(self, state: StackState, n: int) -> list[int]:
        """Sizes in which n further positions are taken: one piece, but for rings, whose pieces do not wrap."""
        if state.tiling.length is not None:
            left = state.tiling.length - state.clock
            if n > left:
                raise LengthError(
                    f"{n} more positions after {state.clock} make {state.clock + n}; the state holds "
                    f"{state.tiling.length}. Make the tiling longer."
                )
            return [n] if n else []
        sizes, clock, rows = [], state.clock, state.history.shape[2]
        while n:
            size = min(n, state.chunk, rows - self._slot(state, clock))
            sizes.append(size)
            clock, n = clock + size, n - size
        return sizes

    def due(self, state: StackState) -> tuple[Rectangle | Share, ...]:
        """The tiles that became payable with the last position and are not paid yet."""
        if state.paid == state.clock:
            return ()
        owed: list[Rectangle | Share]
        owed = list(state.tiling.after(state.clock - 1)) if state.owed is None else state.owed  # type: ignore[arg-type]
        if owed:
            state.owed = owed
        else:
            state.paid, state.owed = state.clock, None
        return tuple(owed)

    def pay(self, state: StackState, tile: Rectangle | Share, impl: str = Impl.MEASURED) -> None:
        """Pays one of the tiles that `due` told, for all M convolutions. Raises StateError for any other tile."""
        if tile not in self.due(state):
            raise StateError(f"{tile} is not due after {state.clock} positions; pay what due() tells, each tile once.")
        self.apply(state, tile, impl)
        assert state.owed is not None
        state.owed.remove(tile)
        if not state.owed:
            state.paid, state.owed = state.clock, None

    def take(self, state: StackState) -> tuple[Rectangle | Share, ...]:
        """All that is due, now the caller's to `apply` before the tiles' targets are read."""
        tiles = self.due(state)
        state.paid, state.owed = state.clock, None
        return tiles

    def settle(self, state: StackState) -> None:
        """Pays all that is due."""
        for tile in self.take(state):
            self.apply(state, tile)

    def apply(
        self,
        state: StackState,
        tile: Rectangle | Share,
        impl: str = Impl.MEASURED,
        *,
        store: bool = True,
        staged: bool = True,
        ahead: Tensor | None = None,
    ) -> None:
        """Adds what a tile's sources owe its targets, for all M convolutions. That it is due is up to the caller.

        `store` keeps the spectra made, for shapes that come again (a prompt's rectangle never does). Without
        `staged`, sources and targets are known to lie outside the staged block, and nothing that a step changes is
        looked at: another thread may call. `ahead` [N, B, M * D] stands for the next N positions' partial sums, in
        place of the state's, which then keeps its own.
        """
        channels = slice(None)
        if isinstance(tile, Share):
            part = tile.channels(self.filter.channels)
            if not part:
                return
            channels, tile = slice(part.start, part.stop), tile.tile
        staged = staged and state.staged
        store = store and tile.sources.start >= state.tiling.origin
        filter = self.filter if store else self.passing
        if state.lives is not None:
            assert ahead is None, "drafts run beside a state without lives"
            for rows, part in clip_to_lives(tile, state.lives):
                # Clipped shapes are many, and each comes a few times a row: only whole tiles are worth their spectra.
                self._apply_rows(state, part, channels, rows, staged, filter if part == tile else self.passing, impl)
            return
        newest, oldest = tile.sources.stop - 1, tile.targets.start
        if ahead is None:
            targets = self.columns(state, tile.targets, channels, staged, state.partial)
        else:
            targets = [(0, ahead[oldest - state.clock : tile.targets.stop - state.clock, :, channels])]
        for s, y in self.columns(state, tile.sources, channels, staged, state.inputs):
            for t, out in targets:
                first = (oldest - newest) + t + (len(tile.sources) - s - y.shape[0])
                tile_conv(y, filter, first, out=out, channels=channels, impl=impl)

    def _apply_rows(
        self,
        state: StackState,
        tile: Rectangle,
        channels: slice,
        rows: slice,
        staged: bool,
        filter: PreparedFilter,
        impl: str,
    ) -> None:
        """`apply` for some rows, as one tile wherever the ring's end lies, so that a row's sums never depend on it."""
        assert state.lives is not None
        S, T, C = len(tile.sources), len(tile.targets), self.filter.rho[channels].shape[0]
        if impl == Impl.MEASURED:
            impl = measured().pick(S, T, len(state.lives), C, filter.rho)
        sources = [y[:, rows] for _, y in self.columns(state, tile.sources, channels, staged, state.inputs)]
        targets = [(t, x[:, rows]) for t, x in self.columns(state, tile.targets, channels, staged, state.partial)]
        y = sources[0] if len(sources) == 1 else torch.cat(sources)
        out = targets[0][1] if len(targets) == 1 else filter.rho.new_zeros(T, y.shape[1], C)
        first = tile.targets.start - tile.sources.stop + 1
        tile_conv(y, filter, first, out=out, channels=channels, impl=impl)
        if len(targets) > 1:
            for t, column in targets:
                column += out[t : t + column.shape[0]]

    def begin(self, state: StackState, n: int) -> None:
        """Makes the next n positions readable: pays what is due, and what earlier sources owe inside a chunk."""
        if state.paid < state.clock:
            self.settle(state)
        if n == 1 and state.clock >= state.tiling.origin:
            if not state.staged:
                self._stage(state)
            return
        self._unstage(state)
        for item in self._before(state, n):
            self.apply(state, item, store=False)

    def ahead(self, state: StackState, n: int) -> Tensor:
        """What the next n positions [n, B, M * D] get from the positions known, once all of it is paid.

        The state stays as it is. What is due must have been paid, also by those who pay beside the steps. Costs no tile
        inside the base block. Raises LengthError.
        """
        if state.tiling.length is None and n > self.chunk(state.tiling):
            raise LengthError(f"{n} positions ahead in a ring; expected at most {self.chunk(state.tiling)}.")
        self.pieces(state, n)
        positions = range(state.clock, state.clock + n)
        columns = self.columns(state, positions, slice(None), state.staged, state.partial)
        sums = torch.cat([column for _, column in columns]).to(self.filter.rho.dtype)
        for item in self._before(state, n):
            self.apply(state, item, store=False, ahead=sums)
        return sums

    def enter(self, state: StackState, y: Tensor) -> int:
        """Steps whose inputs y [n, B, M * D] are known beforehand, as `begin(1)`, every `mix` and `commit(1)` of each.

        Takes them up to the first behind which a tile is due, at least one, and tells how many.
        """
        self.begin(state, 1)
        if not state.pushes or not state.staged:
            if state.staged:
                state.inputs[state.row] = y[0]
            else:
                slot = self._slot(state, state.clock)
                state.history[:, :, slot] = y[0].T
            self.commit(state, 1)
            return 1
        r, n, s = state.row, 1, self.filter.stride
        most = min(len(y), state.block - r)
        while n < most and not state.tiling.after(state.clock + n - 1):
            n += 1
        state.inputs[r : r + n] = y[:n]
        for i, (out, rho, source) in enumerate(state.pushes[r : r + n]):
            # Rows of this run are inputs by now: who reads them again reads these, not partial sums.
            known = (n - 1 - i) // s
            if known < len(out):
                out[known:].addcmul_(rho[known:], source)
        state.clock, state.paid, state.row = state.clock + n, state.clock + n - 1, r + n
        if state.row == state.block:
            self._flush(state)
        return n

    def mix(self, state: StackState, m: int, y: Tensor) -> Tensor:
        """Outputs z [B, N, D] of convolution m for its inputs y [B, N, D] at the positions that `begin` opened."""
        N, lanes = y.shape[1], self.lanes[m]
        if state.clock < state.last_start:
            y = y * self.alive(state, N)[..., None].to(y.dtype)
        if state.staged:
            r = state.row
            state.inputs[r, :, lanes] = y[:, 0]
            z = torch.addcmul(state.partial[r, :, lanes], self.diagonal[lanes], state.inputs[r, :, lanes])
            return z[:, None].to(y.dtype)
        slot = self._slot(state, state.clock)
        column = state.history[lanes, :, slot : slot + N]
        dtype = y.dtype
        y = y.permute(2, 0, 1).to(self.filter.rho.dtype).contiguous()
        z = column.to(self.filter.rho.dtype, copy=True)
        triangle_conv(y.permute(2, 1, 0), self.filter, out=z.permute(2, 1, 0), channels=lanes)
        z.addcmul_(self.skip[lanes, None, None], y)
        column.copy_(y)
        return z.permute(1, 2, 0).to(dtype)

    def alive(self, state: StackState, n: int) -> Tensor:
        """[B, n]: whether each of the next n positions has begun, by the rows' starts."""
        return torch.arange(state.clock, state.clock + n, device=state.start.device) >= state.start[:, None]

    def commit(self, state: StackState, n: int) -> None:
        """Closes a step of n positions: their inputs are known, and the pairs inside their base block are paid."""
        if state.staged:
            if state.pushes:
                out, rho, y = state.pushes[state.row]
                out.addcmul_(rho, y)
            state.clock += 1
            state.row += 1
            if state.row == len(state.inputs):
                self._flush(state)
            return
        start, stop = state.clock, state.clock + n
        for item in state.tiling.span(start, n).after:
            self.apply(state, item, store=False)  # type: ignore[arg-type]
        state.clock, state.paid = stop, stop - 1
        if state.tiling.block > 1 and stop > state.tiling.origin and state.base < stop:
            sources = range(max(state.base, start), stop)
            self.apply(state, Rectangle(sources, range(stop, state.base + state.block)), store=False)
        self._clear(state)

    def rewound(self, state: StackState, clock: int, tiling: Tiling) -> StackState:
        """A new state at an earlier clock: the inputs before it, and one rectangle due that pays them forward.

        `tiling` begins after them (`Prompted(inner, clock)`). The same sums as before, in another order. Raises
        StateError for a clock to come, for a tiling that begins elsewhere, and for rings, whose old rows are reused.
        """
        if not 0 < clock <= state.clock or state.tiling.length is None:
            raise StateError(
                f"cannot go back to {clock} of {state.clock} positions of {state.tiling!r}; expected one of the "
                "positions known, of a tiling with a length."
            )
        if tiling.origin != clock:
            raise StateError(f"{tiling!r} begins at {tiling.origin}; expected Prompted(inner, {clock}).")
        back = self.init(len(state.start), tiling, dtype=state.history.dtype, start=state.start)
        known = range(clock)
        for offset, y in self.columns(state, known, slice(None), state.staged, state.inputs):
            for _, row in self.columns(back, range(offset, offset + len(y)), slice(None), False, back.inputs):
                row.copy_(y)
        back.clock, back.paid = clock, clock - 1
        return back

    def _before(self, state: StackState, n: int) -> Iterator[Rectangle | Share]:
        """What a chunk of the next n positions is owed before it is read, but for pairs that steps have paid inline."""
        first, stop = state.base, state.base + state.block
        inline = state.tiling.block > 1 and state.clock >= state.tiling.origin
        if inline and state.clock + n <= stop:
            return
        for item in state.tiling.span(state.clock, n).before:
            tile = item.tile if isinstance(item, Share) else item
            within = tile.sources.start >= first and tile.targets.stop <= stop  # type: ignore[union-attr]
            if not (inline and within):
                yield item  # type: ignore[misc]

    def _slot(self, state: StackState, clock: int) -> int:
        slot = clock - state.tiling.origin + _lead(state.tiling, state.block)
        return slot if state.tiling.length is not None else slot % state.history.shape[2]

    def columns(
        self, state: StackState, positions: range, channels: slice, staged: bool, staging: Tensor
    ) -> list[tuple[int, Tensor]]:
        """The state of a range of positions as (offset, [N, B, C] view) pieces: history, ring ends, and, if `staged`,
        the staged block, as `staging` (its inputs or its partial sums) holds it.
        """
        block = staging if staged else None
        pieces, clock, stop = [], positions.start, positions.stop
        rows, base = state.history.shape[2], stop if block is None else state.base
        while clock < stop:
            if block is not None and base <= clock < base + len(block):
                end = min(stop, base + len(block))
                view = block[clock - base : end - base, :, channels]
            else:
                slot = self._slot(state, clock)
                end = min(stop, clock + rows - slot, base if clock < base else stop)
                view = state.history[channels, :, slot : slot + end - clock].permute(2, 1, 0)
            pieces.append((clock - positions.start, view))
            clock = end
        return pieces

    def _stage(self, state: StackState) -> None:
        """Loads the block around the clock from history: partial sums, and the inputs known so far."""
        slot, r = self._slot(state, state.base), state.clock - state.base
        column = state.history[:, :, slot : slot + state.block].permute(2, 1, 0)
        state.inputs[:r] = column[:r]
        state.partial[r:] = column[r:]
        state.staged, state.row = True, r

    def _unstage(self, state: StackState) -> None:
        """Writes the staged block back to history: inputs where known, partial sums where not."""
        if not state.staged:
            return
        slot, r = self._slot(state, state.base), state.clock - state.base
        state.history[:, :, slot : slot + r] = state.inputs[:r].permute(2, 1, 0)
        state.history[:, :, slot + r : slot + state.block] = state.partial[r:].permute(2, 1, 0)
        state.staged = False

    def _flush(self, state: StackState) -> None:
        """Moves a completed block's inputs to history."""
        slot = self._slot(state, state.clock - state.block)
        state.history[:, :, slot : slot + state.block] = state.inputs.permute(2, 1, 0)
        state.staged = False
        self._clear(state)

    def _clear(self, state: StackState) -> None:
        """In a ring, zeroes the rows that may become targets before the next call: their old inputs are dead."""
        if state.tiling.length is not None:
            return
        rows = state.history.shape[2]
        until = _round_up(state.clock, state.block) + rows - _round_up(state.tiling.reach[0], state.block) - state.block
        while state.cleared < until:
            slot = self._slot(state, state.cleared)
            end = min(until, state.cleared + rows - slot)
            state.history[:, :, slot : slot + end - state.cleared] = 0
            state.cleared = end


def spaced(like: Tensor, channels: int, batch: int, rows: int) -> Tensor:
    """Zeros [channels, batch, rows] whose row starts lie an odd number of cache lines apart.

    A step touches the same few columns of every channel. At a power of two apart they would all fall into one set of
    the cache and evict each other. The first column is touched now: the system hands out pages when they are first
    written, which took the step that ended the first block 30 ms.
    """
    line = max(64 // like.itemsize, 1)
    stride = (-(-rows // line) | 1) * line
    made = roomy_zeros(like, channels, batch, stride)[..., :rows]
    made[..., :1].zero_()
    return made


def ring_rows(tiling: Tiling) -> int:
    """Rows of a ring in which sequences come and go: what joins is paid forward over up to `taps` positions at once."""
    if tiling.length is not None or tiling.taps is None:
        raise TilingError(f"{tiling!r} ends; rows that come and go need one without. Pass length=None and taps=.")
    block, (back, ahead) = tiling.block if tiling.block > 1 else STAGE, tiling.reach
    return _round_up(back, block) + _round_up(max(ahead, tiling.taps), block) + 3 * block


def check_tiling(tiling: Tiling, taps: int) -> None:
    """Raises TilingError unless the tiling pays every lag of a filter of `taps` taps, by rectangles."""
    needed = taps if tiling.length is None else min(taps, tiling.length)
    if tiling.taps is not None and tiling.taps < needed:
        raise TilingError(
            f"{tiling!r} pays lags below {tiling.taps}; {needed} taps are needed here. Build it with taps={needed}."
        )
    some = 4 if tiling.length is None else min(4, tiling.length)
    if any(isinstance(tile, Parallelogram) for t in range(some) for tile in tiling.after(t)):
        raise TilingError(
            f"{tiling!r} has parallelograms, for filters that become known with the sequence; this filter is known "
            "beforehand. Use Relaxed, Blocked or Separated."
        )


def _lanes(channels: int, width: int | Sequence[int]) -> list[slice]:
    """The channels of each convolution."""
    if isinstance(width, int):
        if channels % width:
            raise ShapeError(f"the filter has {channels} channels; expected a multiple of the width {width}.")
        width = [width] * (channels // width)
    if sum(width) != channels:
        raise ShapeError(
            f"the filter has {channels} channels; the convolutions' widths {list(width)} add up to {sum(width)}. "
            "Give one width for each convolution of the filter."
        )
    stops = list(accumulate(width))
    return [slice(stop - size, stop) for stop, size in zip(stops, width, strict=True)]


def _round_up(n: int, block: int) -> int:
    return -(-n // block) * block


def _lead(tiling: Tiling, block: int) -> int:
    """Rows before the first aligned block: the prompt's, rounded up so that blocks stay aligned."""
    return _round_up(tiling.origin, block)
