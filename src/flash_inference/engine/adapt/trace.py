"""What every submodule and every named function does in a run, and the first of them that two runs disagree about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from flash_inference.engine.adapt.parts import submodules

Seen = tuple[Tensor | None, Tensor]
"""The input and the output of a call."""


@dataclass
class Trace:
    """The calls of a run in the order in which they ended, by name and number of the call; `logits` of the run."""

    seen: dict[tuple[str, int], Seen] = field(default_factory=dict[tuple[str, int], Seen])
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    counts: Counter[str] = field(default_factory=Counter[str])

    def see(self, name: str, x: Any, out: Any) -> None:
        """Takes note of a call."""
        given, made = first_tensor(x), first_tensor(out)
        if made is not None:
            self.seen[name, self.counts[name]] = None if given is None else _kept(given), _kept(made)
            self.counts[name] += 1

    @contextmanager
    def watching(self, model: nn.Module) -> Generator[None]:
        """While open, every call of a submodule is seen."""

        def hook(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
            def see(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                self.see(name, (args, kwargs), out)

            return see

        handles = [
            module.register_forward_hook(hook(name), with_kwargs=True) for name, module in submodules(model).items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, slots=True)
class Difference:
    """The first call whose output differs: by how much at most, first at which position, what was allowed.

    `inputs_agree`: its inputs did not differ. `previous` is the last call before it that agreed.
    """

    name: str
    size: float
    position: int
    allowed: float
    inputs_agree: bool
    previous: str | None


def first_difference(
    whole: Trace, pieces: Sequence[Trace], sizes: Sequence[int], tolerance: float, named: Collection[str]
) -> Difference | None:
    """Where a run over consecutive pieces first disagrees with the run over the whole.

    None if their logits agree and the outputs of `named` parts, which may be hidden behind weights that are zero.
    Outputs may differ by `tolerance` times the larger of 1 and the whole's largest output. Outputs without the batch
    axis, such as filters, do not count: what they change shows behind them.
    """
    batch, n = whole.logits.shape[:2]
    last = _compare((None, whole.logits), [(None, piece.logits) for piece in pieces], n, sizes, batch)
    assert last is not None
    allowed = tolerance * max(1.0, _largest(whole.logits))
    good = last.size <= allowed
    end = None if good else Difference("", last.size, last.beyond(allowed), allowed, False, None)
    previous = None
    for (name, call), seen in whole.seen.items():
        if good and name not in named:
            continue
        others = [piece.seen[name, call] for piece in pieces if (name, call) in piece.seen]
        found = _compare(seen, others, n, sizes, batch) if len(others) == len(pieces) else None
        if found is None:
            continue
        allowed = tolerance * max(1.0, _largest(seen[1]))
        if not found.size <= allowed:
            given = 0.0 if seen[0] is None else found.inputs
            scale = 1.0 if seen[0] is None else max(1.0, _largest(seen[0]))
            agree = given <= tolerance * scale
            return Difference(name, found.size, found.beyond(allowed), allowed, agree, previous)
        previous = name
    return None if end is None else replace(end, previous=previous)


@dataclass(frozen=True, slots=True)
class _Found:
    """How far apart the outputs are at each position, and the inputs at most."""

    outputs: Tensor
    inputs: float

    @property
    def size(self) -> float:
        return float(self.outputs.max())

    def beyond(self, allowed: float) -> int:
        """The first position that is further apart."""
        return int((~(self.outputs <= allowed)).nonzero()[0])


def _compare(whole: Seen, pieces: Sequence[Seen], n: int, sizes: Sequence[int], batch: int) -> _Found | None:
    """The differences of outputs and inputs; None if they are not comparable."""
    difference = _difference(whole[1], [out for _, out in pieces], n, sizes, batch)
    if difference is None:
        return None
    inputs = 0.0
    given = [x for x, _ in pieces if x is not None]
    if whole[0] is not None and len(given) == len(pieces):
        apart = [
            d.max() for end in (False, True) if (d := _difference(whole[0], given, n, sizes, batch, end)) is not None
        ]
        inputs = float(min(apart)) if apart else 0.0
    return _Found(difference, inputs)


def _difference(
    whole: Tensor, pieces: Sequence[Tensor], n: int, sizes: Sequence[int], batch: int, end: bool = False
) -> Tensor | None:
    """[positions]: the largest difference at each. Whole and pieces may carry equally many positions too many, which
    are left out at the end, or with `end` at the beginning. None without a batch axis and a time axis.
    """
    if whole.ndim < 2 or whole.shape[0] != batch or any(piece.ndim != whole.ndim for piece in pieces):
        return None
    for axis in range(1, whole.ndim):
        more = whole.shape[axis] - n
        if more < 0 or any(piece.shape[axis] - size != more for piece, size in zip(pieces, sizes, strict=True)):
            continue
        first = more if end else 0
        cut = [piece.narrow(axis, first, size) for piece, size in zip(pieces, sizes, strict=True)]
        joined, full = torch.cat(cut, dim=axis), whole.narrow(axis, first, sum(sizes))
        if joined.shape != full.shape:
            return None
        apart = (joined.double() - full.double()).abs().nan_to_num(nan=torch.inf)
        return apart.transpose(0, axis).flatten(1).amax(1) if apart.numel() else None
    return None


def _kept(x: Tensor) -> Tensor:
    return (torch.view_as_real(x) if x.is_complex() else x).detach().clone()


def _largest(x: Tensor) -> float:
    return float(x.double().abs().max()) if x.numel() else 0.0


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in what a call takes or gives, if there is one."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = list(cast("dict[Any, Any]", value).values())
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        return next((found for item in items if (found := first_tensor(item)) is not None), None)
    return None
