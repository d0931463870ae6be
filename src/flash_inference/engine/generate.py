"""Generation as users call it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_inference.engine.decode import decode, decoder_for
from flash_inference.engine.drafters import Drafter
from flash_inference.engine.plan import check_memory
from flash_inference.engine.prompts import Prompt, as_rows, check_room, check_tiling
from flash_inference.engine.sampling import Sampler, Sampling, accepted_or_redrawn
from flash_inference.engine.speculative import speculate
from flash_inference.errors import SamplingError, SettingError, TokenError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.decoder import Decoder
from flash_inference.models.fused import unfused
from flash_inference.tiling import Tiling


class Generation(NamedTuple):
    """New tokens [B, N] and the log-probabilities [B, N] that the model gave them before any sampling setting."""

    tokens: Tensor
    logprobs: Tensor


class Step(NamedTuple):
    """One step of a stream: tokens [B], their log-probabilities [B] if asked for, and which rows have ended [B]."""

    tokens: Tensor
    logprobs: Tensor | None
    ended: Tensor


def generate(
    model: LanguageModel,
    prompt: Prompt = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    allowed: Sequence[int] | None = None,
    seed: int | None = None,
    stop_tokens: Sequence[int] | None = None,
    stop: Sequence[str] | str = (),
    n: int = 1,
    logprobs: bool = False,
    tiling: Tiling | None = None,
    draft: Drafter | None = None,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """New tokens [B * n, N], N <= max_new_tokens, exactly those of a full recompute at each step.

    prompt: token ids [B, P] (tensor or lists, ragged lists are decoded row by row), text, or None to begin from the
    model's start token. `n` samples per prompt stand next to each other. Rows end after a stop token (`stop_tokens`;
    None takes the model's own, () never stops) or after a token that completes one of the strings `stop`; ended rows
    are filled with the model's pad token, and generation stops when all have ended. Temperature 0 is greedy; settings
    are those of `Sampling`. With `logprobs` the result is a `Generation(tokens, logprobs)`.
    `tiling` covers prompt + max_new_tokens - 1 positions; the default never waits for a large tile.
    `draft` (`PromptLookup()`, `ModelDraft(smaller)`) proposes tokens, of which the model checks several in a pass:
    greedy tokens stay the same, drawn ones keep their law; rows run one by one.
    `state_dtype` is how the mixers' history is stored. 16 bits halve the memory of a run, and round every input and
    partial sum of the long convolutions: tokens are then no longer exactly those of a full recompute (docs/theory.md).
    Cost per token: one pass over the weights, and O(log^2 L) per channel for the mixers.
    Raises LengthError, TokenError, SamplingError, NumericsError or PlanError, all but NumericsError before any compute.

    >>> model = flash_inference.load("shakespeare")
    >>> model.tokens.decode(flash_inference.generate(model, "ROMEO.", max_new_tokens=40)[0])
    """
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "allowed": allowed, "seed": seed, "stop_tokens": stop_tokens,
        "stop": stop, "logprobs": logprobs, "tiling": tiling, "draft": draft, "state_dtype": state_dtype,
    }  # fmt: skip
    if n < 1:
        raise SamplingError(f"n is {n}; expected at least 1 sample per prompt.")
    rows = as_rows(model, prompt)
    check_room(model, max(len(row) for row in rows), max_new_tokens)
    samples = [row for row in rows for _ in range(n)]
    together = n if len({len(row) for row in rows}) > 1 else len(samples)
    together = together if draft is None else 1
    parts: list[Generation] = []
    for first in range(0, len(samples), together):
        prompts = torch.stack(samples[first : first + together])
        steps = list(_steps(model, prompts, first_row=first, **settings))
        tokens = torch.stack([step.tokens for step in steps], dim=1)
        chances = [step.logprobs for step in steps if step.logprobs is not None]
        parts.append(Generation(tokens, torch.stack(chances, dim=1) if chances else torch.empty(0)))
    longest = max(part.tokens.shape[1] for part in parts)
    tokens = torch.cat([_fill(part.tokens, longest, model.config.pad_token) for part in parts])
    if not logprobs:
        return tokens
    return Generation(tokens, torch.cat([_fill(part.logprobs, longest, 0.0) for part in parts]))


def stream(model: LanguageModel, prompt: Prompt = None, *, max_new_tokens: int, **settings: Any) -> Iterator[Tensor]:
    """Yields tokens [B] as they are made: the columns of what `generate` returns, with the same settings.

    Rows of one length only. The call itself raises what is wrong with the arguments. Stopping early loses nothing.
    """
    steps = stream_steps(model, prompt, max_new_tokens=max_new_tokens, **settings)
    return (step.tokens for step in steps)


def stream_steps(
    model: LanguageModel, prompt: Prompt = None, *, max_new_tokens: int, first_row: int = 0, **settings: Any
) -> Iterator[Step]:
    """As `stream`, but yields `Step`s: tokens, log-probabilities if asked for, and which rows have ended.

    `first_row` numbers the first row among a caller's rows, for their random generators.
    """
    n = settings.pop("n", 1)
    if n < 1:
        raise SamplingError(f"n is {n}; expected at least 1 sample per prompt.")
    rows = as_rows(model, prompt)
    check_room(model, max(len(row) for row in rows), max_new_tokens)
    if len({len(row) for row in rows}) > 1:
        raise TokenError("a stream needs prompts of one length; stream ragged rows one by one, or use generate.")
    prompts = torch.stack([row for row in rows for _ in range(n)])
    return _steps(model, prompts, max_new_tokens=max_new_tokens, first_row=first_row, **settings)


def _steps(
    model: LanguageModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
    stop: Sequence[str] | str = (),
    logprobs: bool = False,
    tiling: Tiling | None = None,
    draft: Drafter | None = None,
    state_dtype: torch.dtype | None = None,
    first_row: int = 0,
    allowed: Sequence[int] | None = None,
    **settings: Any,
) -> Iterator[Step]:
    """Checks everything, then returns the iterator."""
    sampling = Sampling(allowed=None if allowed is None else tuple(int(token) for token in allowed), **settings)
    sampler = Sampler(sampling, prompt.shape[0], model.config.vocab_size, seen=prompt, first_row=first_row)
    stops = Stops(model, prompt.shape[0], stop_tokens, stop)
    check_tiling(tiling, prompt.shape[1] + max_new_tokens - 1)
    check_state_dtype(state_dtype, draft)
    rows, length = prompt.shape
    check_memory(model, rows, length, max_new_tokens, tiling, state_dtype)
    # Modules can draft on a GPU, and graphs cannot: what a graph has done is not taken back.
    if draft is not None and unfused(model) is not None:
        decoder = model.decoder(length + max_new_tokens)
    else:
        decoder = decoder_for(model, length + max_new_tokens, tiling, rows, prompt=length, dtype=state_dtype)
    if draft is not None:
        check_draft(draft, model, decoder, prompt, max_new_tokens)

    def run() -> Iterator[Step]:
        chances: list[Tensor | None] = [None]

        def choose(logits: Tensor, token: int | None = None, law: Tensor | None = None) -> Tensor:
            if token is None or law is None:
                tokens = sampler(logits)
            else:
                tokens = sampler.sample(accepted_or_redrawn(sampler.law(logits)[0], law, token)[None])
            if logprobs:
                chances[0] = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0].to(logits.dtype)
            return stops.fill(tokens)

        if draft is not None and isinstance(decoder, Decoder):
            proposer = draft.begin(prompt[0], max_new_tokens, sampling, first_row)
            source = speculate(decoder, prompt, choose, proposer, max_new_tokens=max_new_tokens, tiling=tiling)
        else:
            source = decode(decoder, prompt, choose, max_new_tokens=max_new_tokens, tiling=tiling, dtype=state_dtype)
        if not isinstance(decoder, Decoder) and not logprobs:
            from flash_inference.engine.graphs import stream_gpu

            source = stream_gpu(decoder, prompt, sampler, max_new_tokens, tiling)
        for tokens in source:
            chance = chances[0]
            if chance is not None:
                chance = chance.masked_fill(stops.ended, 0.0)
            stops.see(tokens)
            yield Step(tokens, chance, stops.ended.clone())
            if stops.all_ended:
                return

    return run()


def check_draft(draft: Drafter, model: LanguageModel, decoder: object, prompt: Tensor, max_new_tokens: int) -> None:
    """Raises SettingError where drafts cannot run, or what the drafter has against this model."""
    if prompt.shape[0] > 1:
        raise SettingError(f"a stream with draft= has one row, and this one {prompt.shape[0]}. Stream them one by one.")
    if not isinstance(decoder, Decoder):
        raise SettingError("the GPU's kernels do not draft. Move the model to the CPU, or leave draft out.")
    draft.check(model, prompt.shape[1], max_new_tokens)


def check_state_dtype(dtype: torch.dtype | None, draft: Drafter | None) -> None:
    """Raises SettingError for a type that no history is stored in, or where a draft reads it."""
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise SettingError(f"state_dtype is {dtype}; expected torch.float32, torch.bfloat16, torch.float16 or None.")
    if dtype is not None and draft is not None:
        raise SettingError("drafts keep histories in the model's own type. Leave state_dtype out, or draft.")


class Stops:
    """Which rows have ended: by a stop token, or by text that completes a stop string."""

    def __init__(
        self, model: LanguageModel, rows: int, stop_tokens: Sequence[int] | None, stop: Sequence[str] | str
    ) -> None:
        self.pad = model.config.pad_token
        chosen = model.config.stop_tokens if stop_tokens is None else stop_tokens
        self.ids = frozenset(int(token) for token in chosen)
        self.tokens = torch.tensor(sorted(self.ids), dtype=torch.long)
        for token in chosen:
            if not 0 <= token < model.config.vocab_size:
                raise TokenError(
                    f"stop token id {token} is outside the vocabulary; expected 0 .. {model.config.vocab_size - 1}."
                )
        self.strings = (stop,) if isinstance(stop, str) else tuple(stop)
        if any(not text for text in self.strings):
            raise SamplingError("a stop string is empty, which would stop at once; expected at least one character.")
        self.ended = torch.zeros(rows, dtype=torch.bool)
        self.all_ended = False
        self._decoders = [model.tokens.decoder() for _ in range(rows)] if self.strings else []
        self._tails = [""] * rows
        self._keep = max((len(text) for text in self.strings), default=1) - 1

    @property
    def idle(self) -> bool:
        """Whether nothing can ever stop a row."""
        return not self.strings and not len(self.tokens)

    def fill(self, tokens: Tensor) -> Tensor:
        """`tokens` [B] with the pad token where rows have ended."""
        return tokens if self.idle else tokens.masked_fill(self.ended, self.pad)

    def see(self, tokens: Tensor) -> None:
        """Takes notice of the newest tokens [B]."""
        if self.idle:
            return
        before = self.ended
        self.ended = before | torch.isin(tokens, self.tokens)
        for row, decoder in enumerate(self._decoders):
            if not before[row]:
                text = self._tails[row] + decoder.push(int(tokens[row]))
                if any(string in text for string in self.strings):
                    self.ended[row] = True
                self._tails[row] = text[-self._keep :] if self._keep else ""
        self.all_ended = bool(self.ended.all())


def _fill(rows: Tensor, length: int, value: float) -> Tensor:
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=value)
