"""Large tiles on time-major state, by transforms on circles; any sizes, kept spectra or spectra made when needed."""

# Triton gives its decorators, launches and ranges no types that a checker could follow.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flash_inference.errors import ShapeError
from flash_inference.ops.tile_conv.factors import Factor, factors, scratch_numbers
from flash_inference.ops.tile_conv.triton_circle import across, inward, outward


def _turns(rows: int, columns: int, circle: int, shift: float, device: torch.device) -> Tensor:
    """exp(-2 pi i row (column - shift) / circle) as real and imaginary parts [2, rows, columns], from float64."""
    row, column = (torch.arange(n, dtype=torch.float64, device=device) for n in (rows, columns))
    angles = -2 * math.pi / circle * row[:, None] * (column - shift)
    return torch.stack([angles.cos(), angles.sin()]).float()


class TileFFT:
    """Tiles of S sources and T targets that begin `lag` rows behind them, S + T <= 2 V, on circles of V complex places.

    Of y * rho', with rho' = rho[lag : lag + 2 V], the targets are the T numbers behind the sources' places. Modulo
    x^V = i a polynomial of 2 V real places is one of V complex ones, low + i high. Where S = T = V, y is real there,
    the targets are the product's imaginary parts, and what wraps around is real; in general what wraps around meets
    the sources' places only. So nothing is padded: polynomials are evaluated at the V roots of x^V = i,
    x = exp(-2 pi i (k - 1/4) / V), multiplied point by point, and interpolated. All of it runs on rows of the state,
    neighbouring channels in neighbouring lanes: one pass up to 256 places; above, V = R1 R2 and three passes, with 8 V
    bytes of scratch a channel (`triton_circle.py`).

    `taps(first, stop, channels)` gives rho as [c, stop - first], zeros past the end. `prepare` makes spectra that are
    kept, 8 V bytes a channel; others are made when needed. Float32; error about eps log2(V) ||y|| ||rho'||. Source: the
    tile is that of Oncescu et al., arXiv 2410.12982; roots of i, after Crandall and Fagin's weighted transforms (1994).
    """

    def __init__(self, size: int, taps: Callable[[int, int, range], Tensor], lag: int = 0) -> None:
        self.size, self.taps, self.lag = size, taps, lag
        self.outer, self.inner = factors(size)
        self._spectra: Tensor | None = None
        self._tables: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def prepare(self, channels: int, piece: int) -> None:
        """Keeps the spectra for all channels. Made `piece` at a time.

        They are transformed in float64 and rounded once, which takes a fifth off a tile's error.
        """
        for c in range(0, channels, piece):
            made = self._make(range(c, min(c + piece, channels)), torch.float64)
            if self._spectra is None:
                self._spectra = made.new_empty(2, self.size, channels)
            self._spectra[:, :, c : c + piece] = made

    @property
    def kept(self) -> bool:
        """Whether spectra are kept."""
        return self._spectra is not None

    def _make(self, channels: range, dtype: torch.dtype = torch.float32) -> Tensor:
        """rho' at the roots, over V, for some channels: parts [2, V, c], frequency k1 + R1 k2 in row k1 R2 + k2."""
        V, R = self.size, self.outer.size
        taps = self.taps(self.lag, self.lag + 2 * V, channels).to(dtype)
        angles = torch.arange(V, dtype=torch.float64, device=taps.device) * (math.pi / (2 * V))
        z = torch.complex(taps[:, :V], taps[:, V:])
        del taps
        z *= torch.polar(torch.ones_like(angles), angles).to(z.dtype)
        z = torch.fft.fft(z, norm="forward")
        return torch.view_as_real(z.view(-1, V // R, R)).permute(3, 2, 1, 0).float().reshape(2, V, -1).contiguous()

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The turns inside the outer factor, inside the inner one, and between them; when what always was began: 0."""
        if self._tables is None:
            V, R = self.size, self.outer.size

            def inside(factor: Factor, shift: float) -> Tensor:
                E, T = factor.numbers
                return _turns(T, E, factor.size, shift, device)

            self._tables = (
                inside(self.outer, 0.25),
                inside(self.inner, 0.25 if R == 1 else 0.0),
                _turns(V // R, R, V, 0.25, device),
                torch.zeros(1, dtype=torch.long, device=device),
            )
        return self._tables

    def pay(
        self, history: Tensor, sources: range, targets: range, channels: range, batch: int = 1,
        ring: int | None = None, since: Tensor | None = None, scratch: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Adds to targets what sources owe them; history [rows, C batch], `channels` are of the filter.

        With `ring` history holds position i in row i modulo it. With `since` [batch], sequence b begins at position
        since[b], and owes nothing from before. `scratch` is where it works, at least `scratch_numbers` of them.
        """
        S, T, V = len(sources), len(targets), self.size
        if targets.start - sources.stop != self.lag or S + T > 2 * V:
            raise ShapeError(
                f"sources {sources} and targets {targets} were given; expected {self.lag} rows between them and at "
                f"most {2 * V} in both. Take another TileFFT."
            )
        self._turn(history, sources, history, targets, channels, batch, ring, since, scratch)

    def owe(self, inputs: Tensor, out: Tensor, channels: range) -> None:
        """Adds to out [T, C] what inputs [S, C] owe the T positions that begin `lag` behind them."""
        self._turn(inputs, range(len(inputs)), out, range(len(out)), channels, 1)

    def _turn(
        self, given: Tensor, sources: range, out: Tensor, targets: range, channels: range, batch: int,
        ring: int | None = None, since: Tensor | None = None, scratch: Tensor | None = None, more: bool = False,
    ) -> None:  # fmt: skip
        """From rows of `given` to rows of `out`, both [rows, C batch]; `more`: by kernels that take S or T above V."""
        V, outer, inner = self.size, self.outer, self.inner
        around, within, between, always = self.tables(out.device)
        since = always if since is None else since
        first, lanes = channels.start * batch, len(channels) * batch
        spectrum, column = (self._make(channels), 0) if self._spectra is None else (self._spectra, channels.start)
        start, target = (some.start % ring if ring else some.start for some in (sources, targets))
        S, N = len(sources), len(targets)
        # Sources end where the circle does, but for more than it has places, or for more targets than that.
        end, more = max(S, min(V, 2 * V - N)), more or max(S, N) > V
        read = {
            "given": given, "since": since, "sequences": len(since), "start": start, "sources": S, "before": end - S,
            "position": sources.start, "first": first, "count": lanes, "ring": ring or 0, "wide": given.shape[1],
            "MORE": more,
        }  # fmt: skip
        add = {
            "history": out, "begin": target, "targets": N, "behind": end - V, "first": first, "count": lanes,
            "ring": ring or 0, "C": out.shape[1], "MORE": more,
        }  # fmt: skip
        whole = outer.size == 1
        if scratch is None:
            scratch = torch.empty(scratch_numbers(V, lanes), dtype=torch.float32, device=out.device)
        assert scratch.numel() >= scratch_numbers(V, lanes)
        if not whole:
            inward[(outer.programs(lanes), inner.size)](
                **read, scratch=scratch, table=around, turns=between, R=inner.size, **outer.launch
            )
        across[(inner.programs(lanes), outer.size)](
            **read | add | {"MORE": more and whole}, scratch=scratch, table=within, spectrum=spectrum, column=column,
            size=V, width=spectrum.shape[2], batch=batch, WHOLE=whole, **inner.launch,
        )  # fmt: skip
        if not whole:
            outward[(outer.programs(lanes), inner.size)](
                **add, scratch=scratch, table=around, turns=between, R=inner.size, **outer.launch
            )

    def warm(
        self, history: Tensor, channels: int, batch: int, scratch: Tensor | None = None, more: bool = False
    ) -> None:
        """Runs on a history of no worth all that `pay` runs, so that nothing is compiled later.

        `more`: also what tiles of more than V sources or targets run.
        """
        some = range(min(self.size, len(history)))
        for kind in (False, True) if more else (False,):
            self._turn(history, some, history, some, range(channels), batch, scratch=scratch, more=kind)
