"""Exact, near-linear-time generation from long convolution sequence models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flash_inference.engine.adapt import LongPart, ShortPart, adapt
    from flash_inference.engine.batch import Engine
    from flash_inference.engine.drafters import ModelDraft, PromptLookup
    from flash_inference.engine.embed import embed
    from flash_inference.engine.generate import Generation, generate, stream
    from flash_inference.engine.score import score
    from flash_inference.filters import ExplicitFilter, ImplicitFilter
    from flash_inference.mixers import LongConv, OnlineConvolution, ShortConv
    from flash_inference.models.backbone import LanguageModel
    from flash_inference.models.hyena import FilterConfig, HyenaConfig
    from flash_inference.models.weights import load, save

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "ExplicitFilter",
    "FilterConfig",
    "Generation",
    "HyenaConfig",
    "ImplicitFilter",
    "LanguageModel",
    "LongConv",
    "LongPart",
    "ModelDraft",
    "OnlineConvolution",
    "PromptLookup",
    "ShortConv",
    "ShortPart",
    "adapt",
    "embed",
    "generate",
    "load",
    "save",
    "score",
    "stream",
]

_HOMES = {
    "Engine": "flash_inference.engine.batch",
    "ExplicitFilter": "flash_inference.filters",
    "FilterConfig": "flash_inference.models.hyena",
    "Generation": "flash_inference.engine.generate",
    "HyenaConfig": "flash_inference.models.hyena",
    "ImplicitFilter": "flash_inference.filters",
    "LanguageModel": "flash_inference.models.backbone",
    "LongConv": "flash_inference.mixers",
    "LongPart": "flash_inference.engine.adapt",
    "ModelDraft": "flash_inference.engine.drafters",
    "OnlineConvolution": "flash_inference.mixers",
    "PromptLookup": "flash_inference.engine.drafters",
    "ShortConv": "flash_inference.mixers",
    "ShortPart": "flash_inference.engine.adapt",
    "adapt": "flash_inference.engine.adapt",
    "embed": "flash_inference.engine.embed",
    "generate": "flash_inference.engine.generate",
    "load": "flash_inference.models.weights",
    "save": "flash_inference.models.weights",
    "score": "flash_inference.engine.score",
    "stream": "flash_inference.engine.generate",
}
_PARTS = {"engine", "errors", "filters", "mixers", "models", "ops", "shapes", "tiling"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Imports a public name when it is first asked for: importing torch takes seconds, and `--help` needs none."""
        if name in _PARTS:
            return import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_PARTS})
