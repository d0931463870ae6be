"""`flash-inference plan`: the memory and the work of a run, before it runs."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flash_inference.cli.console import CommandError, Meter, size, write, write_json, write_table
from flash_inference.cli.options import Json, Model, StateDtype, Tokens, state_dtype_of
from flash_inference.cli.tilings import SPREAD, build

if TYPE_CHECKING:
    from flash_inference.engine.plan import LayerPlan, Plan
    from flash_inference.models.backbone import LanguageModel
    from flash_inference.tiling import Cost, Tiling

COMPARED = ("lazy", "eager", "epoched", "relaxed", "blocked", SPREAD)
PARTS = ("state", "filters", "spectra", "workspace", "activations", "total")
GPU_PARTS = ("state", "weights", "filters", "spectra", "workspace", "graphs", "total")


def plan(
    model: Model,
    tokens: Tokens = 1024,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, the start token among them.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Sequences side by side.")] = 1,
    tiling: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"{', '.join(COMPARED)}, separated. Default: the best for the length."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: one GPU, which need not be there with --free.")] = "cpu",
    free: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Memory to plan for, the model's own included. Default: what is free."),
    ] = None,
    state_dtype: StateDtype = None,
    json: Json = False,
) -> None:
    """Tell how a model decodes, and the memory and the work of a run, before anything is allocated.

    Each part of a block decodes in its own way: by tiles, by a recurrence, from a ring or a cache. The memory is by
    purpose, beside the model's weights. The work is modelled, for every tiling: multiply-adds per
    channel of the tiles, in all and in the dearest step, a tile being summed directly or by FFT, whichever is less.
    On a GPU a run that cannot fit is refused, and what would fit is said.

    \b
    Examples:
      flash-inference plan shakespeare --prompt 1000 --tokens 60000 --batch 4
      flash-inference plan shakespeare --tokens 60000 --device cuda --free 80
    """
    from flash_inference.engine.plan import free_memory, work
    from flash_inference.engine.prompts import check_room
    from flash_inference.models.weights import load

    language_model = load(model)
    check_room(language_model, prompt, tokens)
    chosen = None if tiling is None else _tiling(tiling, prompt, tokens)
    room = free_memory() if free is None else int(free * 1e9)
    if device == "cuda":
        room = _free_on_gpu() if free is None else room
    planned = _planned(
        language_model, device, room, state_dtype, prompt=prompt, max_new_tokens=tokens, batch=batch, tiling=chosen
    )
    costs: dict[str, Cost] = {}
    with Meter("work", len(COMPARED) * tokens) as meter:
        for name in COMPARED:
            meter.label(f"work of {name}")
            costs[name] = work(_tiling(name, prompt, tokens))
            meter.add(tokens)
    if json:
        write_json(_values(model, planned, room, costs))
    else:
        _print(planned, room, costs)


def _planned(model: LanguageModel, device: str, room: int | None, state_dtype: str | None, **settings: Any) -> Plan:
    import torch

    from flash_inference.engine.plan import plan as memory
    from flash_inference.engine.plan_gpu import plan_gpu

    settings["state_dtype"] = state_dtype_of(state_dtype)
    if device == "cpu":
        return memory(model, **settings)
    if device != "cuda":
        raise CommandError(f"device {device!r} cannot be planned for; expected cpu or cuda.")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "the GPU"
    own = sum(p.nbytes for p in model.parameters())
    return plan_gpu(model, free=max(0, (room or 0) - own), device=name, **settings)


def _free_on_gpu() -> int:
    import torch

    if not torch.cuda.is_available():
        raise CommandError("there is no GPU here whose free memory could be asked for. Pass --free GB.")
    return torch.cuda.mem_get_info()[0]


def _tiling(name: str, prompt: int, tokens: int) -> Tiling:
    """The tiling as generation would use it: the last new token is never read."""
    from flash_inference.engine.decode import BLOCK, NEAR, turn

    options: dict[str, Any] = {
        "blocked": {"block": BLOCK},
        "separated": {"near": NEAR, "block": BLOCK},
        SPREAD: {"near": NEAR, "block": BLOCK, "every": turn()},
    }.get(name, {})
    return build(name, prompt + max(tokens - 1, 1), prompt, **options)


def _values(model: str, planned: Plan, free: int | None, costs: dict[str, Cost]) -> dict[str, Any]:
    lazy = costs["lazy"].total
    return {
        "model": model,
        "positions": planned.positions,
        "batch": planned.batch,
        "tiling": repr(planned.tiling),
        "layers": [dataclasses.asdict(layer) for layer in planned.layers],
        "bytes": {part: getattr(planned, part) for part in _parts(planned)},
        "free": free,
        "fits": None if free is None else planned.total <= free,
        "work": {
            name: {
                "total": cost.total,
                "worst": cost.worst,
                "worst_at": cost.worst_at,
                "of_lazy": cost.total / (lazy or 1),
            }
            for name, cost in costs.items()
        },
    }


def _parts(planned: Plan) -> tuple[str, ...]:
    return GPU_PARTS if planned.graphs else PARTS


def _print(planned: Plan, free: int | None, costs: dict[str, Cost]) -> None:
    lazy = costs["lazy"].total or 1
    write(f"{planned.batch} x {planned.positions:,} positions, {planned.tiling!r}\n\n")
    write_table(
        ["blocks", "part", "decodes by", "past of a row", "why"],
        [
            [_ranges(numbers), layer.part, layer.decodes, size(layer.bytes), layer.why]
            for layer, numbers in _alike(planned.layers)
        ],
        left=True,
    )
    write("\n")
    rows = [[part, size(getattr(planned, part))] for part in _parts(planned)]
    rows.append(["free", "unknown" if free is None else size(free)])
    write_table(["memory", "bytes"], rows)
    if free is not None and planned.total > free:
        write("This does not fit.\n")
    write("\n")
    write_table(
        ["work per channel", "total", "of lazy", "dearest step", "after"],
        [
            [name, f"{cost.total:,.0f}", f"{cost.total / lazy:.2%}", f"{cost.worst:,.0f}", f"{cost.worst_at:,}"]
            for name, cost in costs.items()
        ],
    )
    write("\nModelled multiply-adds of the tiles; pairs inside a block, and the prompt's own forward, are not in it.\n")


def _alike(layers: tuple[LayerPlan, ...]) -> list[tuple[LayerPlan, list[int]]]:
    """Parts that differ in nothing but their block, with the numbers of their blocks."""
    found: dict[LayerPlan, list[int]] = {}
    for layer in layers:
        found.setdefault(dataclasses.replace(layer, block=0), []).append(layer.block)
    return list(found.items())


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers, neighbours joined: 0-3, 7."""
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b > a + 1), len(numbers)]
    parts = [numbers[first:stop] for first, stop in pairwise(breaks)]
    return ", ".join(f"{part[0]}-{part[-1]}" if part[-1] > part[0] else str(part[0]) for part in parts)
