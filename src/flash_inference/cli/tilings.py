"""Tilings by name, with the options that each takes."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from flash_inference.cli.console import CommandError
from flash_inference.tiling import TILINGS, Prompted, Separated, Spread, Tiling

SPREAD = "spread"
NAMES = (*TILINGS, SPREAD)
"""What `build` knows; spread is separated, its far tiles cut into shares."""


def build(name: str, length: int, prompt: int = 0, every: int | None = None, **options: int | None) -> Tiling:
    """The tiling `name` of `length` positions, the first `prompt` of them known at the start; None is a default."""
    name = name.replace("-", "_").replace("separated+spread", SPREAD)
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise CommandError(f"tiling {name!r} is unknown. {hint}Known: {', '.join(NAMES)}.")
    if prompt and not 0 < prompt < length:
        raise CommandError(f"the prompt is {prompt} of {length} positions; expected 0 .. {length - 1}.")
    make: Any = Separated if name == SPREAD else TILINGS[name]
    known = {field.name for field in fields(make) if field.init} - {"length"}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in known:
            taken = ", ".join(f"--{option}" for option in sorted(known)) or "none"
            raise CommandError(f"tiling {name!r} takes no --{key}. Its options: {taken}.")
    if every is not None and name != SPREAD:
        raise CommandError(
            f"tiling {name!r} takes no --every, which cuts tiles that can wait. Use the tiling 'spread'."
        )
    inner = make(length - prompt, **given)
    if name == SPREAD:
        inner = Spread(inner) if every is None else Spread(inner, every)
    return Prompted(inner, prompt) if prompt else inner
