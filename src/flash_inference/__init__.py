"""Exact, near-linear-time generation from long convolution sequence models."""

from __future__ import annotations

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
