"""A layout: how a family's published checkpoints are recognised, and how they become our models and back."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_inference.errors import CheckpointError, ModelError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.published.files import Weights
from flash_inference.models.published.settings import Settings
from flash_inference.models.tensors import assign, cast, shape, stored

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHOWN = 40
"""Faults that one message lists."""
FORMED = 32 * torch.finfo(torch.float32).eps
"""Relative error of what published code forms in float32: a power's exponent, rounded, and the power itself."""


@dataclass(frozen=True, slots=True)
class View:
    """How a published tensor lies over ours: `read` takes it to our shape, `write` brings it back."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]

    def then(self, inner: View) -> View:
        """First this view, then another on what it reads."""
        return View(lambda t: inner.read(self.read(t)), lambda t: self.write(inner.write(t)))


AS_IS = View(lambda t: t, lambda t: t)


def axes(before: int = 0, after: int = 0) -> View:
    """A published tensor with axes of length 1 before and after ours."""
    return View(
        lambda t: t.reshape(t.shape[before : t.ndim - after]),
        lambda t: t.reshape((1,) * before + tuple(t.shape) + (1,) * after),
    )


def swapped(outer: int, inner: int) -> View:
    """A first axis published as (outer, inner, rest) where ours is (inner, outer, rest)."""
    return View(
        lambda t: t.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2),
        lambda t: t.unflatten(0, (inner, outer, -1)).transpose(0, 1).flatten(0, 2),
    )


@dataclass(frozen=True, slots=True)
class Rename:
    """One tensor of ours and its published names; "{i}" in a name stands for every layer.

    The `published` names must all be there; those of `optional` may be; all must be equal. With none of the two,
    `build` makes the tensor, since the family does not publish it. `float32` allows that dtype in a checkpoint whose
    other tensors have 16 bits: a filter keeps it, others are rounded to the 16 bits unless a dtype is asked for.
    """

    ours: str
    published: tuple[str, ...]
    optional: tuple[str, ...] = ()
    view: View = AS_IS
    build: Callable[[], Tensor] | None = None
    float32: bool = False

    def layers(self, count: int) -> list[Rename]:
        """This rename for each layer."""
        if "{i}" not in self.ours:
            return [self]
        return [
            dataclasses.replace(
                self,
                ours=self.ours.replace("{i}", str(i)),
                published=tuple(name.replace("{i}", str(i)) for name in self.published),
                optional=tuple(name.replace("{i}", str(i)) for name in self.optional),
            )
            for i in range(count)
        ]


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which checkpoints are published.

    `recognise(config, names)` says whether a folder is one. `configure(settings, tensors)` takes all keys of the config
    and gives ours. `renames(config, names)` is the rename table for our config, in the spelling of the names that a
    folder uses. `rows(config, settings)` says, by the ends of our names, how a folder's rows lie. Names that match
    `ignored` hold nothing the model needs. Of the tensors that our model does not have, those of `derived(config,
    names)` may be there, and are then what the config makes them, to rounding; those of `constants(config, names)` must
    be there with one value, exactly. Another value is another model.
    """

    name: str
    about: str
    recognise: Callable[[Mapping[str, Any], Collection[str]], bool]
    configure: Callable[[Settings, Mapping[str, Tensor]], Any]
    renames: Callable[[Any, Collection[str]], list[Rename]]
    rows: Callable[[Any, Mapping[str, Any]], Mapping[str, View]] = lambda config, settings: {}
    derived: Callable[[Any, Collection[str]], Mapping[str, Tensor]] = lambda config, names: {}
    constants: Callable[[Any, Collection[str]], Mapping[str, Tensor]] = lambda config, names: {}
    ignored: re.Pattern[str] = re.compile(r".*\._extra_state")

    def table(self, config: Any, names: Collection[str], settings: Mapping[str, Any]) -> list[Rename]:
        """The rename table, layer by layer, for a folder with such names and such a config."""
        table = [rename for each in self.renames(config, names) for rename in each.layers(config.layers)]
        for end, view in self.rows(config, settings).items():
            table = [dataclasses.replace(r, view=view.then(r.view)) if r.ours.endswith(end) else r for r in table]
        return table


def read(
    layout: Layout,
    config: Mapping[str, Any],
    weights: Weights,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LanguageModel:
    """A published checkpoint as our model, in eval mode with gradients off; `notes` tell what was assumed.

    Raises CheckpointError for a setting that this library does not compute, and one for all tensors that are missing,
    unexpected, misshaped, of another dtype or not finite, by their published names.
    """
    settings = Settings({k: v for k, v in config.items() if k != "layout"}, str(weights.path.parent / "config.json"))
    ours = layout.configure(settings, weights.tensors)
    settings.finish()
    model = _skeleton(layout, ours, weights)
    table = layout.table(ours, weights.tensors, config)
    expected = stored(model)
    if lost := {rename.ours for rename in table} ^ set(expected):
        raise ModelError(f"the rename table of {layout.name} and the model disagree on {sorted(lost)}; this is a bug.")
    kept = {name: tensor for name, tensor in weights.tensors.items() if not layout.ignored.fullmatch(name)}
    others = {name: kind for name, kind in weights.others.items() if not layout.ignored.fullmatch(name)}
    derived, constants = layout.derived(ours, weights.tensors), layout.constants(ours, weights.tensors)
    given = {name: tensor for name, tensor in kept.items() if name not in derived and name not in constants}
    most = _dtype(table, given)
    faults = _faults(table, expected, given, most) + _derived_faults(derived, kept, most)
    faults += _wrong_constants(constants, kept)
    faults += [f"{name} is of type {kind}, expected a tensor" for name, kind in others.items()]
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise CheckpointError(
            f"the tensors of {weights.path} do not make the {layout.name} model of its config: "
            f"{'; '.join(faults[:SHOWN])}{more}. Fetch config and weights again, of one revision."
        )
    tensors = {rename.ours: _ours(rename, kept, most) for rename in table}
    if dtype is None:
        settings.notes += _round(tensors, most)
    assign(model, {name: cast(name, tensor, dtype, device) for name, tensor in tensors.items()})
    model.notes = (f"read as {layout.name}: {layout.about}", *settings.notes)
    return model.eval().requires_grad_(False)


def write(
    layout: Layout, model: LanguageModel, names: Collection[str] = (), settings: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """The tensors of a model under the published names of a layout, names that share one tensor all given.

    `names` and `settings` are those of the folder that it came from: the spelling to take where a layout has several,
    and the config that says how rows lie.
    """
    state, tensors = stored(model), dict[str, Tensor]()
    for rename in layout.table(model.config, names, settings or {}):
        for name in (*rename.published, *rename.optional):
            tensors[name] = rename.view.write(state[rename.ours].detach()).contiguous().clone()
    derived = {name: tensor.float() for name, tensor in layout.derived(model.config, names).items()}
    return tensors | derived | dict(layout.constants(model.config, names))


def _skeleton(layout: Layout, config: Any, weights: Weights) -> LanguageModel:
    """The model that a config describes, on the meta device: shapes without numbers."""
    for what, count in _parts(config).items():
        if count > len(weights.tensors):
            raise CheckpointError(
                f"the config of {weights.path.parent} asks for {count} {what}; {weights.path.name} has "
                f"{len(weights.tensors)} tensors in all. Fetch config and weights again, of one revision."
            )
    try:
        with torch.device("meta"):
            return LanguageModel(config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"the config of {weights.path.parent} makes no {layout.name} model: {error}. Check its sizes."
        ) from None


def _parts(config: Any) -> dict[str, int]:
    """How often a config repeats parts that have tensors of their own: a wrong number would build for ever."""
    filter = getattr(config, "filter", None)
    depth = 0 if filter is None else filter.options.get("layers", 0) if filter.options else filter.inner
    return {"layers": config.layers, "layers of the filter": depth}


def _faults(
    table: list[Rename], expected: Mapping[str, Tensor], got: Mapping[str, Tensor], dtype: torch.dtype
) -> list[str]:
    """All that is wrong with the tensors, each fault with its published name."""
    faults: list[str] = []
    known: set[str] = set()
    for rename in table:
        names = (*rename.published, *rename.optional)
        known.update(names)
        wanted = shape(rename.view.write(expected[rename.ours]))
        faults += [f"missing {name} {wanted}" for name in rename.published if name not in got]
        there = [name for name in names if name in got]
        for name in there:
            tensor = got[name]
            if shape(tensor) != wanted:
                faults.append(f"{name} is {shape(tensor)}, expected {wanted}")
            elif tensor.dtype != dtype and not (
                rename.float32 and tensor.dtype == torch.float32 and dtype.itemsize < 4
            ):
                faults.append(f"{name} is {tensor.dtype}, expected {dtype} as most are")
            elif not torch.isfinite(tensor).all():
                faults.append(f"{name} has NaN or infinity")
            elif got[there[0]].shape == tensor.shape and not torch.equal(got[there[0]], tensor):
                faults.append(f"{name} differs from {there[0]}; they are one tensor in this family")
    return faults + [f"unexpected {name} {shape(got[name])}" for name in got if name not in known]


def _derived_faults(derived: Mapping[str, Tensor], got: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Stored tensors that are not what the config says; float32 is allowed beside the dtype of the others."""
    faults: list[str] = []
    allowed = (torch.float32, dtype)
    for name, tensor in got.items():
        value = derived.get(name)
        if value is None:
            continue
        if shape(tensor) != shape(value):
            faults.append(f"{name} is {shape(tensor)}, expected {shape(value)}")
        elif tensor.dtype not in allowed:
            faults.append(
                f"{name} is {tensor.dtype}, expected {' or '.join(sorted({str(dtype) for dtype in allowed}))}"
            )
        elif not torch.allclose(tensor.double(), value, rtol=torch.finfo(tensor.dtype).eps + FORMED, atol=0):
            faults.append(f"{name} is not what the config makes it, {value.tolist()[:4]} ..")
    return faults


def _wrong_constants(constants: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    """What differs from the tensors that a layout has with one value."""
    faults = [f"missing {name} {shape(value)}" for name, value in constants.items() if name not in got]
    return faults + [
        f"{name} is {got[name].tolist()} ({got[name].dtype}), expected {value.tolist()} ({value.dtype})"
        for name, value in constants.items()
        if name in got and not (got[name].dtype == value.dtype and torch.equal(got[name], value))
    ]


def _round(tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Rounds the float32 tensors of a 16-bit checkpoint, filters aside; what to tell about it."""
    wider = [name for name, tensor in tensors.items() if tensor.itemsize > dtype.itemsize and ".filter." not in name]
    for name in wider:
        tensors[name] = tensors[name].to(dtype)
    return [f"{len(wider)} tensors stored in float32 were rounded to {dtype}, as the others are"] if wider else []


def _dtype(table: list[Rename], got: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most of the tensors; those that may be wider than the others count only where all may be."""
    either = {name for rename in table if rename.float32 for name in (*rename.published, *rename.optional)}
    counted = {name: tensor for name, tensor in got.items() if name not in either} or got
    counts = Counter(tensor.dtype for tensor in counted.values() if tensor.dtype in DTYPES)
    return counts.most_common(1)[0][0] if counts else torch.float32


def _ours(rename: Rename, got: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    if not rename.published:
        assert rename.build is not None
        return rename.build().to(dtype)
    return rename.view.read(got[rename.published[0]]).contiguous()
