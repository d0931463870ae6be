"""A model as transformers runs it."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel  # type: ignore[import-not-found]  # type: ignore[import-not-found]
from transformers.modeling_outputs import CausalLMOutputWithPast  # type: ignore[import-not-found]

from flash_inference.errors import CheckpointError, ModelError, SettingError, ShapeError
from flash_inference.integrations.transformers.cache import FlashInferenceCache, check_length
from flash_inference.integrations.transformers.config import FlashInferenceConfig
from flash_inference.integrations.transformers.mask import ranges
from flash_inference.models.backbone import LanguageModel


class FlashInferenceForCausalLM(PreTrainedModel, GenerationMixin):
    """A LanguageModel, `self.model`, with the interface of transformers' causal language models.

    `from_flash(model)` wraps a model of this library; `save_pretrained` and `from_pretrained` keep it as transformers
    does. `generate` decodes with exact state (FlashInferenceCache), on any device by PyTorch's operations.
    """

    config_class = FlashInferenceConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ("LanguageModel",)
    # Taps need float32, also where the rest of a model has 16 bits.
    _keep_in_fp32_modules_strict = ("filter",)
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: FlashInferenceConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.flash()) if model is None else model
        self.post_init()

    @classmethod
    def from_flash(cls, model: LanguageModel) -> Self:
        """The same model, weights shared, not copied. Raises ModelError for a family that is not in FAMILIES."""
        if not isinstance(model, LanguageModel):
            raise ModelError(f"a {type(model).__name__} was given; expected a LanguageModel, as `load` gives.")
        config = FlashInferenceConfig.from_flash(model.config)
        config.dtype = model.embedding.weight.dtype
        return cls(config, model).train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As PreTrainedModel's, but raises CheckpointError where that would make up tensors that are missing."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        faults = [f"{kind.removesuffix('_keys')} {', '.join(sorted(map(str, info[kind])))}"
                  for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]  # fmt: skip
        if faults:
            raise CheckpointError(
                f"the tensors of {args[0] if args else 'the checkpoint'} do not make the model of its config: "
                f"{'; '.join(faults)}. Save config and tensors from one and the same model."
            )
        return (model, info) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: FlashInferenceCache | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of input_ids [B, N] behind what `past_key_values` holds, which is advanced.

        attention_mask [B, past + N] has zeros at padding: on the left, or without a cache at both ends. Rows are
        computed as if they stood alone; logits at padding mean nothing. `logits_to_keep` is how many positions from
        the end get logits (0: all), or their indices. `use_cache` None: the config's, but not in training or with
        `labels` [B, N] (-100: not counted), for with a cache there are no gradients. Raises ShapeError, TokenError,
        LengthError.
        """
        if past_key_values is not None and not isinstance(past_key_values, FlashInferenceCache):
            raise ShapeError(
                f"past_key_values is a {type(past_key_values).__name__}; expected a FlashInferenceCache. "
                "Leave it out, and one is made."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        if past_key_values is None and use_cache:
            past_key_values = FlashInferenceCache(self.model)
        N = input_ids.shape[-1]
        keep = min(logits_to_keep, N) or N if isinstance(logits_to_keep, int) else N
        if past_key_values is None:
            logits = self._whole(input_ids, attention_mask)[:, N - keep :]
        else:
            logits = past_key_values.extend(input_ids, attention_mask, keep)
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        loss = None
        if labels is not None:
            if past_key_values is None:
                # A padded row's first token has nothing before it that could foretell it.
                first = ranges(attention_mask, input_ids)[0][:, None]
                labels = labels.masked_fill(torch.arange(N, device=labels.device) == first, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def _whole(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [B, L, V] of whole rows, differentiable: padded rows are turned so that they begin at position 0."""
        tokens = self.model.check_tokens(tokens)
        start, _ = ranges(mask, tokens)
        if not start.any():
            return self.model(tokens)
        L = tokens.shape[1]
        place = torch.arange(L, device=tokens.device)
        logits = self.model(tokens.gather(1, (place + start[:, None]) % L))
        back = (place - start[:, None]) % L
        return logits.gather(1, back[..., None].expand_as(logits))

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Puts our cache where `generate` looks for one, after all checks that need no compute."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise SettingError(
                f"cache_implementation is {generation_config.cache_implementation!r}; a model with long convolutions "
                "has no keys and values to keep that way. Leave cache_implementation out."
            )
        # Prompt lookup drafts past the end, up to its number of tokens; other drafts stay below it.
        longest = max_cache_length + 1 + (generation_config.prompt_lookup_num_tokens or 0)
        check_length(self.model, longest)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache:
            cache = FlashInferenceCache(self.model, longest)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache

    def _prepare_attention_mask_for_generation(self, inputs_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Ones: without a mask all tokens are real, the pad token's too, which may be a model's start token."""
        return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises SettingError: the pages of transformers' continuous batching hold keys and values."""
        raise SettingError("paged batches hold keys and values; this library has batches of its own. Use generate.")

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Raises ModelError: the vocabulary is part of the model's config."""
        raise ModelError("the vocabulary of a model is fixed. Make a LanguageModel of another vocab_size.")

    set_output_embeddings = set_input_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: LanguageModel has drawn its weights."""


AutoModelForCausalLM.register(FlashInferenceConfig, FlashInferenceForCausalLM)
