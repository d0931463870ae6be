"""The families that are known by name: to add one, write its file and a line here."""

from __future__ import annotations

from flash_inference.models.config import ModelConfig
from flash_inference.models.hyena import HyenaConfig
from flash_inference.models.striped_hyena import StripedHyenaConfig

FAMILIES: dict[str, type[ModelConfig]] = {config.family: config for config in (HyenaConfig, StripedHyenaConfig)}
