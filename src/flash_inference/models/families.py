"""The families that are known by name: to add one, write its file and a line here."""

from __future__ import annotations

from flash_inference.models.config import ModelConfig
from flash_inference.models.h3 import H3Config
from flash_inference.models.h3_conv import H3ConvConfig
from flash_inference.models.hyena import HyenaConfig
from flash_inference.models.long_conv import LongConvConfig
from flash_inference.models.multi_hyena import MultiHyenaConfig
from flash_inference.models.s4d import S4DConfig
from flash_inference.models.striped_hyena import StripedHyenaConfig
from flash_inference.models.stu import STUConfig
from flash_inference.models.tnn import TNNConfig

CONFIGS: tuple[type[ModelConfig], ...] = (
    HyenaConfig,
    StripedHyenaConfig,
    H3Config,
    H3ConvConfig,
    S4DConfig,
    MultiHyenaConfig,
    LongConvConfig,
    STUConfig,
    TNNConfig,
)

FAMILIES: dict[str, type[ModelConfig]] = {config.family: config for config in CONFIGS}
