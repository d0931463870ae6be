"""Errors of the library: each message says what was got, what was expected, and the remedy."""

from __future__ import annotations


class FlashInferenceError(Exception):
    """Root of every error that the library raises on purpose."""


class TilingError(FlashInferenceError, ValueError):
    """A tiling breaks a law, or was built from numbers that make no tiling."""


class ShapeError(FlashInferenceError, ValueError):
    """A tensor has the wrong shape, dtype or device for the call."""


class FilterError(FlashInferenceError, ValueError):
    """A filter cannot be used: not finite, empty, or too short for what was asked."""


class LengthError(FlashInferenceError, ValueError):
    """More positions were asked for than the filter, the tiling or the state can hold."""


class TokenError(FlashInferenceError, ValueError):
    """A token or character that the model's vocabulary lacks."""


class SamplingError(FlashInferenceError, ValueError):
    """A sampling setting outside its range."""


class SettingError(FlashInferenceError, ValueError):
    """A setting of a task, such as a layer or a pooling, that there is none of."""


class ModelError(FlashInferenceError, ValueError):
    """A model name, configuration or checkpoint that cannot become a model."""


class CheckpointError(ModelError):
    """A model folder that is damaged, incomplete, or not ours."""


class StateError(FlashInferenceError, ValueError):
    """A saved state that is damaged or belongs to another model."""


class NumericsError(FlashInferenceError, ArithmeticError):
    """NaN or infinity appeared where a number is needed."""


class PlanError(FlashInferenceError, MemoryError):
    """The run needs more memory than there is."""
