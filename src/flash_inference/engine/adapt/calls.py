"""The calls of named parts that one forward makes, in order: what each extends, and by what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from flash_inference.engine.adapt.parts import LongPart, Place, ShortPart, Source
from flash_inference.engine.adapt.swap import swapped
from flash_inference.errors import FilterError, ModelError, ShapeError


@dataclass(frozen=True, slots=True)
class LongCall:
    """A long convolution as it was called: its filter [D, taps], its skip terms [D], its place in the stack."""

    place: Place
    taps: Tensor
    skip: Tensor
    results: int | None

    def lanes(self, x: Tensor, n: int) -> Tensor:
        """The input as [B, n, D]."""
        y = x.transpose(1, 2) if self.place.part.layout == "BDL" else x
        if y.ndim != 3 or y.shape[1:] != (n, len(self.taps)):
            raise ShapeError(
                f"{self.place.name} got {tuple(x.shape)} for {n} positions, but its filter has {len(self.taps)} "
                f"channels; expected {self.place.part.layout}. Name the other layout=, or give taps as [D, taps]."
            )
        return y

    def returned(self, z: Tensor) -> Any:
        """The output [B, N, D] as the part gives it: its layout, and None for what else it returns."""
        z = z.transpose(1, 2) if self.place.part.layout == "BDL" else z
        return z if self.results is None else (z, *[None] * (self.results - 1))


@dataclass(frozen=True, slots=True)
class ShortCall:
    """A short operation as it was called: it reads `reach` earlier positions, `zeros` of which the caller put before.

    `empty` [B, .., 0, ..] has the axes of its input, with no position.
    """

    place: Place
    reach: int
    zeros: int
    empty: Tensor

    @property
    def axis(self) -> int:
        """The input's time axis."""
        return self.place.part.layout.index("L")

    def past(self, batch: int) -> Tensor:
        """The inputs of an empty past."""
        shape = list(self.empty.shape)
        return self.empty.new_zeros([batch, *shape[1:]])

    def extend(self, past: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """Outputs of the new positions, and the last `reach` inputs. The original runs on real inputs alone."""
        axis, (x, *others) = self.axis, args
        new = x.narrow(axis, self.zeros, x.shape[axis] - self.zeros)
        window = torch.cat([past.to(new), new], dim=axis)
        given = torch.cat([torch.zeros_like(x.narrow(axis, 0, self.zeros)), window], dim=axis) if self.zeros else window
        out, known = self.place.own(given, *others, **kwargs), past.shape[axis]
        out = out.narrow(axis, known, out.shape[axis] - known)
        kept = min(self.reach, window.shape[axis])
        return out, window.narrow(axis, window.shape[axis] - kept, kept).clone()


Call = LongCall | ShortCall


def record(places: Sequence[Place], forward: Callable[[], Any], n: int) -> list[Call]:
    """The calls that one forward over n positions makes, each with the filter that it used.

    Raises ModelError, FilterError, ShapeError.
    """
    calls: list[Call] = []

    def see(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = place.own(*args, **kwargs)
        calls.append(_call(place, args, kwargs, out, n))
        return out

    with swapped(places, see):
        forward()
    seen = {call.place.name for call in calls}
    for place in places:
        if place.name not in seen:
            raise ModelError(
                f"{place.name} is named as a part, but the forward does not call it. Drop it, or name what is called; "
                "a function must be named in the module whose code looks it up."
            )
    return calls


def _call(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, n: int) -> Call:
    if not args or not isinstance(args[0], Tensor):
        raise ModelError(f"{place.name} is called without a tensor as its first argument; expected its input there.")
    x = args[0]
    if isinstance(place.part, ShortPart):
        if not isinstance(out, Tensor):
            raise ModelError(f"{place.name} returns a {type(out).__name__}; a ShortPart returns a tensor.")
        return _short(place, place.part, x)
    taps, skip = filter_of(place, place.part, args, kwargs)
    call = LongCall(place, taps, skip, len(cast("tuple[Any, ...]", out)) if isinstance(out, tuple) else None)
    call.lanes(x, n)
    return call


def filter_of(place: Place, part: LongPart, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The filter [D, taps] and the skip terms [D] of a long part."""
    taps = _look_up(place, part.taps, "taps", args, kwargs)
    while taps.ndim > 2 and taps.shape[0] == 1:
        taps = taps[0]
    if taps.ndim != 2 or taps.is_complex():
        raise FilterError(
            f"{place.name}: taps are {taps.dtype} of shape {tuple(taps.shape)}; expected real [D, taps], lag 0 first. "
            "Give taps= a function that returns them so."
        )
    if part.skip is None:
        return taps, taps.new_zeros(len(taps))
    skip = _look_up(place, part.skip, "skip", args, kwargs).reshape(-1)
    if len(skip) not in (1, len(taps)):
        raise FilterError(f"{place.name}: skip has {len(skip)} terms; expected one for each of {len(taps)} channels.")
    return taps, skip.to(taps).expand(len(taps))


def _look_up(place: Place, source: Source, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a part's `taps` or `skip` stands for."""
    try:
        if isinstance(place.owner, nn.Module):
            if isinstance(source, int):
                raise TypeError("a submodule's filter is no argument")
            found = attrgetter(source)(place.owner) if isinstance(source, str) else source(place.owner)
        elif isinstance(source, int):
            found = args[source]
        else:
            found = kwargs[source] if isinstance(source, str) else source(*args, **kwargs)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        wanted = "an attribute's path or a function of the submodule"
        if not isinstance(place.owner, nn.Module):
            wanted = "an argument's position or name, or a function of all arguments"
        raise ModelError(f"{place.name}: {what}={source!r} finds nothing ({error}); expected {wanted}.") from error
    if not isinstance(found, Tensor):
        raise ModelError(f"{place.name}: {what}={source!r} is a {type(found).__name__}; expected a tensor.")
    return found.detach()


def _short(place: Place, part: ShortPart, x: Tensor) -> ShortCall:
    reach, zeros = part.reach, 0
    if isinstance(place.owner, nn.Conv1d):
        reach, zeros = _conv_reach(place, place.owner)
    if reach is None:
        raise ModelError(f"{place.name} is no nn.Conv1d; say how many earlier positions it reads: ShortPart(reach=..).")
    axis = part.layout.index("L")
    return ShortCall(place, reach, zeros, x.detach().narrow(axis, 0, 0).clone())


def _conv_reach(place: Place, conv: nn.Conv1d) -> tuple[int, int]:
    """How many earlier positions an nn.Conv1d reads, and how many zeros its caller puts before the input."""
    edge = conv.dilation[0] * (conv.kernel_size[0] - 1)
    padding = conv.padding[0] if isinstance(conv.padding, tuple) else conv.padding
    if conv.stride[0] != 1 or conv.padding_mode != "zeros" or place.part.layout != "BDL":
        raise ModelError(
            f"{place.name} is {conv} in layout {place.part.layout}; expected stride 1, zero padding, layout BDL."
        )
    if padding == edge:
        return edge, 0
    if padding in (0, "valid"):
        return edge, edge
    raise ModelError(
        f"{place.name} is {conv}: padding {padding} reads later positions. Expected {edge} with the output's end cut "
        f"off, or 0 behind {edge} zeros on the left."
    )
