"""Published checkpoints become our models: the files, the layouts, and the choice of one for a folder."""

from __future__ import annotations

import difflib
import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_inference.errors import CheckpointError, ModelError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.published import h3, hyena, long_conv, multi_hyena, s4d, striped_hyena, stu, tnn
from flash_inference.models.published.files import Weights, read_config, read_weights
from flash_inference.models.published.layout import Layout, Rename, View, read, write
from flash_inference.models.tokenizer import read_tokenizer
from flash_inference.models.tokens import TOKENIZER

LAYOUTS: tuple[Layout, ...] = (
    *hyena.LAYOUTS,
    *striped_hyena.LAYOUTS,
    *h3.LAYOUTS,
    *s4d.LAYOUTS,
    *multi_hyena.LAYOUTS,
    *long_conv.LAYOUTS,
    *stu.LAYOUTS,
    *tnn.LAYOUTS,
)
"""Every layout that `load` recognises: a family adds its own here."""

__all__ = ["LAYOUTS", "Layout", "Rename", "View", "read_published", "to_published"]

log = logging.getLogger(__name__)


def read_published(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LanguageModel:
    """The model in a folder as its authors published it: config.json beside safetensors or pickled weights.

    `model.notes` tell what was assumed: defaults, tied heads. A key `"layout"` in config.json names the layout where
    config and names fit several. Raises CheckpointError.
    """
    folder = Path(folder)
    config, weights = read_config(folder), read_weights(folder)
    layout = _recognise(config, weights)
    model = read(layout, config, weights, dtype, device)
    if model.config.tokens == TOKENIZER:
        if (folder / TOKENIZER).is_file():
            model.table = read_tokenizer(folder / TOKENIZER)
        else:
            model.notes += (f"the folder has no {TOKENIZER}: put the family's there to use text, or use token ids",)
    for note in model.notes:
        log.info("%s: %s", folder, note)
    return model


def to_published(
    model: LanguageModel,
    layout: Layout | str,
    names: Collection[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """A model's tensors under the published names of a layout, given by itself or by its name: `read`'s way back.

    Names that share one tensor are all given. `names` are those of the folder that the model came from: where a layout
    has several spellings, theirs is taken. `settings` are that folder's config, which says how rows lie in some
    layouts. A model that the layout cannot hold raises ModelError.
    """
    if isinstance(layout, str):
        layout = _named(layout)
    try:
        return write(layout, model, names, settings)
    except (AttributeError, KeyError) as error:
        raise ModelError(
            f"layout {layout.name!r} has no room for this model: {error}. Choose the layout of its family."
        ) from None


def _named(name: Any) -> Layout:
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    near = difflib.get_close_matches(str(name), [layout.name for layout in LAYOUTS], 1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {_known()}."
    raise CheckpointError(f"layout {name!r} is unknown. {hint}")


def _recognise(config: Mapping[str, Any], weights: Weights) -> Layout:
    if "layout" in config:
        return _named(config["layout"])
    found = [layout for layout in LAYOUTS if layout.recognise(config, weights.tensors)]
    if len(found) == 1:
        return found[0]
    beginnings = Counter(name.split(".")[0] for name in weights.tensors).most_common(4)
    told = (
        f"{weights.path.parent}: its config has model_type {config.get('model_type')!r}, architectures "
        f"{config.get('architectures')!r} and the keys {', '.join(map(repr, list(config)[:12]))}; its tensors begin "
        f"with {', '.join(f'{name!r} ({count})' for name, count in beginnings) or 'nothing'}"
    )
    if found:
        names = " and ".join(repr(layout.name) for layout in found)
        raise CheckpointError(f'{told}. That fits {names}. Say which: add "layout" to config.json.')
    raise CheckpointError(
        f"{told}. That is no published layout that this release reads ({_known()}). If it is one of these all the "
        'same, add "layout" to config.json.'
    )


def _known() -> str:
    return ", ".join(layout.name for layout in LAYOUTS)
