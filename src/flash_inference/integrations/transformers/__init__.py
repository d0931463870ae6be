"""This library's models behind the interface of Hugging Face transformers.

`generate`, `pipeline`, `save_pretrained`. Importing it registers the model type "flash_inference" with the Auto
classes. It needs transformers 5.17 or newer; nothing else here does.
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401  # type: ignore[import-not-found]
except ImportError as error:
    raise ImportError(
        "flash_inference.integrations.transformers needs transformers: pip install 'flash-inference[transformers]'"
    ) from error

from flash_inference.integrations.transformers.cache import FlashInferenceCache
from flash_inference.integrations.transformers.config import FlashInferenceConfig
from flash_inference.integrations.transformers.model import FlashInferenceForCausalLM

__all__ = ["FlashInferenceCache", "FlashInferenceConfig", "FlashInferenceForCausalLM"]
