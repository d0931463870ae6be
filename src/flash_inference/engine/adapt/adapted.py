"""A module made ready to decode: its own forward on the new positions, what mixes along time in explicit state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from flash_inference.engine.adapt.calls import LongCall, ShortCall, record
from flash_inference.engine.adapt.parts import Key, Part, Place, find_places
from flash_inference.engine.adapt.swap import swapped
from flash_inference.engine.decode import default_tiling, run
from flash_inference.engine.prompts import check_tiling
from flash_inference.engine.sampling import Sampler, Sampling
from flash_inference.errors import LengthError, ModelError, ShapeError, TokenError
from flash_inference.mixers.stack import Stack, StackState
from flash_inference.ops.tile_conv import PreparedFilter
from flash_inference.tiling import Rectangle, Share, Tiling

Observe = Callable[[str, Tensor, Any], None]


@dataclass(slots=True)
class AdaptedState:
    """The past of a batch: the long convolutions' stack, and the last inputs [B, ..] of every short part."""

    stack: StackState
    windows: list[Tensor]

    @property
    def clock(self) -> int:
        """Positions known."""
        return self.stack.clock


class Adapted:
    """An nn.Module that generates in near-linear time; `fi.adapt` makes and verifies it.

    To extend by N positions the module's own forward runs on these N alone; the named parts, swapped for the time of
    the call, read and write explicit state. `init`, `extend`, `due`, `pay` are those of `Decoder`. The weights must
    stay as they are: adapt again after training. `tolerance` is what the check allowed, relative to the largest output;
    None before it.
    """

    def __init__(
        self, model: nn.Module, parts: Mapping[Key, Part], *, length: int, example: Tensor, positions: str | None = None
    ) -> None:
        self.model, self.length, self.positions = model, length, positions
        self.places: list[Place] = find_places(model, parts)
        self.vocab = vocabulary(model)
        with torch.no_grad():
            seen: list[Tensor] = []
            self.calls = record(self.places, lambda: seen.append(self.forward(example, 0)), example.shape[1])
        self.outputs = seen[0].shape[2]
        longs = [call for call in self.calls if isinstance(call, LongCall)]
        self.stack = _stack(longs, length)
        self.device = next((p.device for p in model.parameters()), example.device)
        self.tolerance: float | None = None
        self._version = _version(model)

    def init(self, batch: int, tiling: Tiling, *, dtype: torch.dtype | None = None) -> AdaptedState:
        """The state of an empty past. Raises ModelError if weights changed since the module was adapted."""
        if _version(self.model) != self._version:
            raise ModelError(
                f"the weights of {type(self.model).__name__} changed after it was adapted; its filters are prepared "
                "from the old ones. Call adapt again."
            )
        windows = [call.past(batch) for call in self.calls if isinstance(call, ShortCall)]
        return AdaptedState(self.stack.init(batch, tiling, dtype=dtype), windows)

    def due(self, state: AdaptedState) -> tuple[Rectangle | Share, ...]:
        """The tiles that became payable with the last position."""
        return self.stack.due(state.stack)

    def pay(self, state: AdaptedState, tile: Rectangle | Share) -> None:
        """Pays one tile for all long convolutions."""
        self.stack.pay(state.stack, tile)

    def take(self, state: AdaptedState) -> tuple[Rectangle | Share, ...]:
        """All that is due, now the caller's to `apply` before the tiles' targets are read."""
        return self.stack.take(state.stack)

    def apply(self, state: AdaptedState, tile: Rectangle | Share, *, staged: bool = True) -> None:
        """Pays a taken tile for all long convolutions, as `Stack.apply` does."""
        self.stack.apply(state.stack, tile, staged=staged)

    @torch.no_grad()
    def extend(
        self, state: AdaptedState, tokens: Tensor, *, every: bool = False, observe: Observe | None = None
    ) -> Tensor:
        """The next inputs [B, N, ..] -> logits [B, V] of the last position, or [B, N, V] of all with `every`.

        Exact anywhere in the sequence. `observe(name, input, output)` is told what named functions do.
        """
        if self.model.training:
            raise ModelError(f"{type(self.model).__name__} is in training mode. Call model.eval() first.")
        outputs, done = list[Tensor](), 0
        for size in self.stack.pieces(state.stack, tokens.shape[1]):
            outputs.append(self._piece(state, tokens[:, done : done + size], observe))
            done += size
        return torch.cat(outputs, dim=1) if every else outputs[-1][:, -1]

    def _piece(self, state: AdaptedState, tokens: Tensor, observe: Observe | None) -> Tensor:
        stack, n = self.stack, tokens.shape[1]
        stack.begin(state.stack, n)
        step = _Step(self, state, n, observe)
        with swapped(self.places, step):
            logits = self.forward(tokens, state.clock)
        step.finish()
        stack.commit(state.stack, n)
        return logits

    def forward(self, tokens: Tensor, start: int) -> Tensor:
        """The module's own forward on inputs whose first position is `start`: logits [B, N, V]."""
        batch, n = tokens.shape[:2]
        given = {}
        if self.positions is not None:
            given[self.positions] = torch.arange(start, start + n, device=tokens.device).expand(batch, n)
        logits = logits_of(self.model(tokens, **given))
        if logits.ndim != 3 or logits.shape[:2] != (batch, n):
            raise ShapeError(
                f"{type(self.model).__name__} gives {tuple(logits.shape)} for inputs {tuple(tokens.shape)}; expected "
                "[B, L, V], outputs of every position."
            )
        return logits

    def generate(self, prompt: Tensor | Sequence[Any], *, max_new_tokens: int, **settings: Any) -> Tensor:
        """New tokens [B, N], N <= max_new_tokens, those of a full recompute at each step; settings as for `stream`."""
        return torch.stack(list(self.stream(prompt, max_new_tokens=max_new_tokens, **settings)), dim=1)

    def stream(
        self,
        prompt: Tensor | Sequence[Any],
        *,
        max_new_tokens: int,
        stop_tokens: Sequence[int] = (),
        tiling: Tiling | None = None,
        **sampling: Any,
    ) -> Iterator[Tensor]:
        """Yields tokens [B] as they are made, from prompt ids [B, P] or [P].

        `sampling` are the fields of `Sampling`: temperature (0 is greedy), top_k, top_p, min_p, repetition_penalty,
        allowed, seed. Ended rows repeat their stop token; the stream ends when all have ended. The call itself raises
        what is wrong with the arguments: LengthError, TokenError, SamplingError, TilingError.
        """
        rows = self._rows(prompt)
        batch, longest = rows.shape
        if max_new_tokens < 1 or longest + max_new_tokens > self.length:
            raise LengthError(
                f"{longest} prompt tokens + {max_new_tokens} new tokens; expected at least 1 new one, and at most "
                f"{self.length} in all. Adapt with a larger length=, if the filters reach that far."
            )
        check_tiling(tiling, longest + max_new_tokens - 1)
        tiling = default_tiling(max(max_new_tokens - 1, 1), longest) if tiling is None else tiling
        allowed = sampling.pop("allowed", None)
        settings = Sampling(allowed=None if allowed is None else tuple(int(token) for token in allowed), **sampling)
        sampler = Sampler(settings, batch, self.outputs, seen=rows)
        stops = torch.tensor([int(token) for token in stop_tokens], dtype=torch.long)
        return self._stream(rows, sampler, stops, max_new_tokens, tiling)

    def _stream(self, rows: Tensor, sampler: Sampler, stops: Tensor, count: int, tiling: Tiling) -> Iterator[Tensor]:
        last, ended = rows[:, -1], torch.zeros(len(rows), dtype=torch.bool)

        def choose(logits: Tensor) -> Tensor:
            return torch.where(ended, last, sampler(logits))

        state = self.init(len(rows), tiling)
        for tokens in run(self, state, rows, choose, max_new_tokens=count, device=self.device):
            last, ended = tokens, ended | torch.isin(tokens, stops)
            yield tokens
            if bool(ended.all()):
                return

    def _rows(self, prompt: Tensor | Sequence[Any]) -> Tensor:
        rows = torch.as_tensor(prompt).cpu()
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or 0 in rows.shape or rows.is_floating_point() or rows.dtype == torch.bool:
            raise TokenError(f"the prompt is {rows.dtype} of shape {tuple(rows.shape)}; expected ids [B, P], P >= 1.")
        limit = self.vocab if self.vocab is not None else self.outputs
        if int(rows.min()) < 0 or int(rows.max()) >= limit:
            raise TokenError(f"the prompt has ids {int(rows.min())} .. {int(rows.max())}; expected 0 .. {limit - 1}.")
        return rows.long()


class _Step:
    """What the named parts do while one forward runs: each call extends its own past, in the recorded order."""

    def __init__(self, adapted: Adapted, state: AdaptedState, n: int, observe: Observe | None) -> None:
        self.adapted, self.state, self.n, self.observe = adapted, state, n, observe
        self.calls = 0
        self.longs = 0
        self.windows: list[Tensor] = []

    def __call__(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls = self.adapted.calls
        if self.calls >= len(calls) or calls[self.calls].place is not place:
            wanted = calls[self.calls].place.name if self.calls < len(calls) else "no more calls"
            raise ModelError(
                f"call {self.calls} of a step is {place.name}, but it was {wanted} when the module was adapted: its "
                "forward depends on the inputs or their length. It cannot be adapted."
            )
        call = calls[self.calls]
        self.calls += 1
        if isinstance(call, LongCall):
            z = self._mix(call, args[0])
            out = call.returned(z)
        else:
            out, window = call.extend(self.state.windows[len(self.windows)], args, kwargs)
            self.windows.append(window)
        if self.observe is not None and not isinstance(place.owner, nn.Module):
            self.observe(place.name, args[0], out)
        return out

    def _mix(self, call: LongCall, x: Tensor) -> Tensor:
        z = self.adapted.stack.mix(self.state.stack, self.longs, call.lanes(x, self.n))
        self.longs += 1
        return z

    def finish(self) -> None:
        """Keeps the windows, now that the forward is through."""
        if self.calls != len(self.adapted.calls):
            name = self.adapted.calls[self.calls].place.name
            raise ModelError(
                f"a step ended without its call {self.calls}, {name}, which was there when the module was adapted: its "
                "forward depends on the inputs or their length. It cannot be adapted."
            )
        self.state.windows = self.windows


def logits_of(output: Any) -> Tensor:
    """The logits in what a forward returns: a tensor, the first of a tuple, `.logits` or ["logits"]."""
    if isinstance(output, Mapping):
        output = cast("Mapping[str, Any]", output).get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list):
        output = cast("Sequence[Any]", output)[0]
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the forward returns a {type(output).__name__}; expected a tensor, a tuple that begins with one, or an "
            "object with .logits."
        )
    return output


def vocabulary(model: nn.Module) -> int | None:
    """The size of the first embedding, or None."""
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)


def _stack(longs: list[LongCall], length: int) -> Stack:
    """All long convolutions side by side, taps padded with zeros to the longest."""
    taps = min(length, max(call.taps.shape[1] for call in longs))
    rho = torch.cat([nn.functional.pad(call.taps[:, :taps], (0, max(taps - call.taps.shape[1], 0))) for call in longs])
    widths = [len(call.taps) for call in longs]
    return Stack(PreparedFilter(rho, own=True), widths, torch.cat([call.skip for call in longs]))


def _version(model: nn.Module) -> tuple[tuple[int, int], ...]:
    return tuple((tensor.data_ptr(), tensor._version) for tensor in (*model.parameters(), *model.buffers()))
