"""A model's configuration as transformers keeps it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig  # type: ignore[import-not-found]

from flash_inference.errors import ModelError
from flash_inference.models.config import ModelConfig
from flash_inference.models.families import FAMILIES


class FlashInferenceConfig(PreTrainedConfig):
    """`family` names the model family, `settings` are the fields of its config as `to_dict` writes them.

    All else that transformers asks a config for is read off these, but for the special tokens, which may be given.
    """

    model_type = "flash_inference"

    family: str = "hyena"
    settings: dict[str, Any] | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    max_position_embeddings: int = 0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.settings is not None:
            config = self.flash()
            self.settings = config.to_dict()
            self.vocab_size, self.hidden_size = config.vocab_size, config.width
            self.num_hidden_layers, self.max_position_embeddings = config.layers, config.length
            self.tie_word_embeddings = config.tied
            self.bos_token_id = config.start_token if self.bos_token_id is None else self.bos_token_id
            self.pad_token_id = config.pad_token if self.pad_token_id is None else self.pad_token_id
            self.eos_token_id = list(config.stop_tokens) or None if self.eos_token_id is None else self.eos_token_id
        super().__post_init__(**kwargs)

    @classmethod
    def from_flash(cls, config: ModelConfig) -> FlashInferenceConfig:
        """The same configuration for transformers. Raises ModelError for a family that is not in FAMILIES."""
        family = next((name for name, kind in FAMILIES.items() if type(config) is kind), None)
        if family is None:
            raise ModelError(
                f"{type(config).__name__} is of no known family; expected one of {', '.join(FAMILIES)}. "
                "Add it to FAMILIES in models/families.py."
            )
        return cls(family=family, settings=config.to_dict())

    def flash(self) -> ModelConfig:
        """The same configuration for this library. Raises ModelError for an unknown family or setting."""
        if self.family not in FAMILIES:
            raise ModelError(f"family {self.family!r} is unknown; expected one of {', '.join(FAMILIES)}.")
        if self.settings is None:
            raise ModelError("the config has no settings of a model. Make it with FlashInferenceConfig.from_flash.")
        return FAMILIES[self.family].from_dict(self.settings)


AutoConfig.register(FlashInferenceConfig.model_type, FlashInferenceConfig)
