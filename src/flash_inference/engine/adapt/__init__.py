"""Modules that use none of the library's classes, made fast: the user says what mixes along time, a check decides."""

from __future__ import annotations

from flash_inference.engine.adapt.adapted import Adapted, AdaptedState
from flash_inference.engine.adapt.parts import LongPart, ShortPart
from flash_inference.engine.adapt.verified import adapt

__all__ = ["Adapted", "AdaptedState", "LongPart", "ShortPart", "adapt"]
