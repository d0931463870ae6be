"""The making of an Adapted: step by step must equal the module's own full forward, or it is refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flash_inference.engine.adapt.adapted import Adapted, AdaptedState, vocabulary
from flash_inference.engine.adapt.parts import Key, LongPart, Part, Place
from flash_inference.engine.adapt.swap import swapped
from flash_inference.engine.adapt.trace import Difference, Trace, first_difference
from flash_inference.errors import FlashInferenceError, LengthError, ModelError
from flash_inference.tiling import Blocked

CHECKED = 256
"""Positions that are compared."""
ROWS, BLOCK, SEED = 2, 16, 0
NARROW = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)
EXACT = 1e-9
"""What float64 runs may differ by, relative to the larger of 1 and the largest output."""


def adapt(
    model: nn.Module,
    parts: Mapping[Key, Part],
    *,
    length: int,
    positions: str | None = None,
    example: Tensor | None = None,
) -> Adapted:
    """An existing module that generates exactly and in near-linear time, for up to `length` positions.

    The forward maps inputs [B, L, ..] to logits [B, L, V] (a tensor, the first of a tuple, or `.logits`). `parts` names
    what mixes along time: submodules by name, with * for many, or functions as (Python module, "name"); each is a
    LongPart or a ShortPart. All else must act on every position by itself. `positions` is the forward's argument
    for position numbers [B, L], if it has one. `example` is a batch of inputs to check with; default: random tokens
    below the size of the module's first embedding. Filters are read once; a function's are those of one forward over
    `length` positions.

    The module's own forward is compared with itself over a prefix, and with runs in pieces and single steps, on a
    float64 copy, within 1e-9. Where the module computes in a lower precision all the same, or cannot be copied, the
    bound is (calls) * n * eps: for every named call, a sum of n terms, each rounded. `tolerance` of the result tells
    which it was.
    Raises ModelError, naming the first submodule that differs, and ShapeError, FilterError, LengthError.

    >>> fast = fi.adapt(model, {"layers.*.long": fi.LongPart(taps="filter")}, length=4096)
    >>> fast.generate(prompt, max_new_tokens=1000)
    """
    if model.training:
        raise ModelError(f"{type(model).__name__} is in training mode, where dropout draws. Call model.eval() first.")
    if length < 1:
        raise LengthError(f"length is {length}; expected the most positions to run, at least 1.")
    checked = min(length, CHECKED)
    by_functions = any(isinstance(key, tuple) and isinstance(part, LongPart) for key, part in parts.items())
    inputs = _inputs(model, example, length if by_functions else checked)
    adapted = Adapted(model, parts, length=length, example=inputs[:1], positions=positions)
    twin, tolerance = _twin(adapted, parts, inputs)
    compare(twin, _as(twin, inputs[:, :checked]), tolerance)
    adapted.tolerance = tolerance
    return adapted


def compare(adapted: Adapted, inputs: Tensor, tolerance: float) -> None:
    """Raises ModelError unless the own forward over `inputs` [B, n, ..] equals its prefixes, and pieces of any size."""
    whole, n = _whole(adapted, inputs), inputs.shape[1]
    name = type(adapted.model).__name__
    if not torch.isfinite(whole.logits).all():
        raise ModelError(f"the full forward of {name} gives outputs that are not finite. Check its weights.")
    named = {place.name for place in adapted.places}
    _check_dependence(adapted, inputs, whole, tolerance)
    prefix = 2 * n // 3
    if prefix:
        before = first_difference(whole, [_whole(adapted, inputs[:, :prefix])], [prefix], tolerance, named)
        if before is not None:
            raise ModelError(
                f"{name} cannot generate step by step: {_where(before)} when later inputs are cut off. It looks ahead, "
                "or depends on the length: a convolution that is not causal, a filter made for the length at hand, a "
                "norm over time. Make it causal."
            )
    sizes = _sizes(n)
    difference = first_difference(whole, _pieces(adapted, inputs, sizes), sizes, tolerance, named)
    if difference is not None:
        raise ModelError(
            f"{name} in pieces is not {name} as a whole: {_where(difference)}. {_remedy(adapted, difference)}"
        )


def _check_dependence(adapted: Adapted, inputs: Tensor, whole: Trace, tolerance: float) -> None:
    """Raises ModelError if outputs do not depend on what came before: then nothing could differ."""
    cut = inputs.shape[1] // 3
    other = torch.cat([inputs[:, :cut].flip(1), inputs[:, cut:]], dim=1)
    change = (_whole(adapted, other).logits - whole.logits)[:, cut:].abs()
    if (
        cut > 1
        and not torch.equal(other, inputs)
        and float(change.max()) <= tolerance * float(whole.logits.abs().max())
    ):
        raise ModelError(
            f"the outputs of {type(adapted.model).__name__} do not depend on earlier inputs, so a check would show "
            "nothing. Are output weights zero, as some initialisations make them? Load or train the weights first."
        )


def _whole(adapted: Adapted, inputs: Tensor) -> Trace:
    """The module's own forward, its submodules and the named functions watched."""
    trace = Trace()

    def watch(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = place.own(*args, **kwargs)
        trace.see(place.name, args, out)
        return out

    functions = [place for place in adapted.places if not isinstance(place.owner, nn.Module)]
    with torch.no_grad(), trace.watching(adapted.model), swapped(functions, watch):
        trace.logits = adapted.forward(inputs, 0)
    return trace


def _pieces(adapted: Adapted, inputs: Tensor, sizes: Sequence[int]) -> list[Trace]:
    state, traces = adapted.init(len(inputs), Blocked(inputs.shape[1], block=BLOCK)), list[Trace]()
    for size in sizes:
        traces.append(_piece(adapted, state, inputs[:, state.clock : state.clock + size]))
    return traces


def _piece(adapted: Adapted, state: AdaptedState, piece: Tensor) -> Trace:
    trace = Trace()
    try:
        with trace.watching(adapted.model):
            trace.logits = adapted.extend(state, piece, every=True, observe=trace.see)
    except FlashInferenceError:
        raise
    except Exception as error:
        raise ModelError(
            f"the forward of {type(adapted.model).__name__} fails on {piece.shape[1]} positions after {state.clock}, "
            f"with the named parts replaced: {type(error).__name__}: {error}. It must run on any number of positions."
        ) from error
    return trace


def _sizes(n: int) -> list[int]:
    """A split of n positions: single steps, small pieces and large ones."""
    draw, sizes = random.Random(SEED), list[int]()
    while (left := n - sum(sizes)) > 0:
        kind = len(sizes) % 3
        if kind == 1:
            sizes += [1] * min(left, 5)
        else:
            sizes.append(min(left, draw.randint(2, max(2, n // 3 if kind else n // 8))))
    return sizes


def _where(difference: Difference) -> str:
    name = repr(difference.name) if difference.name else "the output alone"
    return (
        f"the first submodule whose output differs is {name}, by {difference.size:.1e} at position "
        f"{difference.position} ({difference.allowed:.1e} is allowed)"
    )


def _remedy(adapted: Adapted, difference: Difference) -> str:
    parts = {place.name: place.part for place in adapted.places}
    if not difference.inputs_agree:
        behind = "at the beginning" if difference.previous is None else f"behind {difference.previous!r}"
        return (
            f"Its inputs differ already, so something {behind} mixes or counts positions: name a function as (module, "
            "'function'), pass the argument for position numbers as positions=."
        )
    part = parts.get(difference.name)
    if isinstance(part, LongPart):
        return (
            "It is named a LongPart, but is not the causal convolution of its input with these taps and skip. Taps "
            "are [D, taps], lag 0 first; see whether skip, a bias or an activation is missing."
        )
    if part is not None:
        return "It is named a ShortPart, but reads more than `reach` earlier positions, or later ones. Name its reach."
    return (
        "It gets the same inputs, so it mixes positions, and no part names it. Name it as a LongPart if it is a long "
        "convolution, as a ShortPart if it reads a few earlier positions. Attention and norms over time do not qualify."
    )


def _inputs(model: nn.Module, example: Tensor | None, n: int) -> Tensor:
    """Inputs [B, n, ..]: the example's, or random tokens of the first embedding."""
    if example is not None:
        if example.ndim < 2 or example.shape[1] < n:
            raise LengthError(f"the example has shape {tuple(example.shape)}; expected [B, L, ..] with L >= {n}.")
        return example[:, :n]
    vocab = vocabulary(model)
    if vocab is None:
        raise ModelError(f"{type(model).__name__} has no nn.Embedding to make tokens for. Pass example= [B, {n}, ..].")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.randint(vocab, (ROWS, n), generator=torch.Generator().manual_seed(SEED)).to(device)


def _twin(adapted: Adapted, parts: Mapping[Key, Part], inputs: Tensor) -> tuple[Adapted, float]:
    """What is compared, and how exactly: a float64 copy within 1e-9, where it computes in float64 throughout."""
    n = min(adapted.length, CHECKED)
    coarse = len(adapted.calls) * n * torch.finfo(torch.float32).eps
    try:
        model = copy.deepcopy(adapted.model).double()
        with _Narrow() as narrow, torch.no_grad():
            twin = Adapted(
                model, parts, length=adapted.length, example=_double(inputs[:1]), positions=adapted.positions
            )
    except (RuntimeError, TypeError, NotImplementedError):
        return adapted, coarse
    return twin, coarse if narrow.seen else EXACT


def _as(adapted: Adapted, inputs: Tensor) -> Tensor:
    double = any(p.dtype == torch.float64 for p in adapted.model.parameters())
    return _double(inputs) if double else inputs


def _double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


class _Narrow(TorchDispatchMode):
    """Sees whether any operation gives floating-point numbers below float64."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out: Any = func(*args, **(kwargs or {}))
        made = cast("Sequence[Any]", out) if isinstance(out, tuple | list) else (out,)
        self.seen = self.seen or any(isinstance(x, Tensor) and x.dtype in NARROW for x in made)
        return cast("Any", out)
