"""The past of a batch as transformers' `generate` handles it: extended, rolled back, and its rows rearranged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin  # type: ignore[import-not-found]

from flash_inference.engine.decode import default_tiling, prefill
from flash_inference.engine.plan import check_memory
from flash_inference.errors import LengthError, ShapeError, StateError
from flash_inference.integrations.transformers.mask import starts
from flash_inference.integrations.transformers.rows import copy_rows, select_rows
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.decoder import Decoder, ModelState


class FlashInferenceCache(Cache):
    """What `past_key_values` is for these models: one layer that stands for all.

    `length` is the number of positions to make room for at once; a longer past is read anew into twice the room.
    `copy.deepcopy` forks it.
    """

    def __init__(self, model: LanguageModel, length: int = 0) -> None:
        super().__init__(layers=[PastLayer(model, length)])

    def extend(self, tokens: Tensor, mask: Tensor | None, keep: int) -> Tensor:
        """The next tokens [B, N] -> logits [B, keep, V] of the last `keep` positions. See PastLayer."""
        return self.layers[0].extend(tokens, mask, keep)


class PastLayer(CacheLayerMixin):
    """The tokens [B, P] so far, the clock `start` [B] at which each row begins, and the state that they leave.

    The tokens are what counts: the state follows when it is needed. While `record_past` holds, `anchor` keeps a copy of
    the state from before the tokens that `crop` may take back, so that these alone are run again. Without an anchor,
    or when room, starts or rows were changed beyond what the state can follow, it is made anew from the tokens, at the
    cost of reading them as a prompt: exact always. `slots[b]` is the row of the state that holds row b.
    """

    is_croppable = True
    is_compileable = False
    is_sliding = False

    def __init__(self, model: LanguageModel, length: int = 0) -> None:
        super().__init__()
        check_length(model, length)
        self.model, self.length = model, length
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forgets the past."""
        self.tokens: Tensor | None = None
        self.start: Tensor | None = None
        self._decoder: Decoder | None = None
        self._state: ModelState | None = None
        self._anchor: ModelState | None = None
        self._slots: list[int] = []

    # ------------------------------------------------------------------------------------------------------- extending

    def extend(self, tokens: Tensor, mask: Tensor | None, keep: int) -> Tensor:
        """The next tokens [B, N], N >= 1 -> logits [B, keep, V] of the last `keep` positions.

        `mask` [B, P + N] or None has zeros where a row is padded, on the left only. Raises TokenError, ShapeError,
        LengthError or PlanError before anything is run.
        """
        tokens = self.model.check_tokens(tokens)
        (B, N), P = tokens.shape, self.get_seq_length()
        if not N:
            raise ShapeError("input_ids has no positions; expected at least 1. Begin with the model's start token.")
        if self.tokens is not None and len(self.tokens) != B:
            raise ShapeError(f"input_ids has {B} rows; the cache holds {len(self.tokens)}. Use a cache for this batch.")
        check_length(self.model, P + N)
        start = starts(mask, tokens, P)
        known = tokens[:, :0] if self.tokens is None else self.tokens
        decoder, state = self._follow(known, start, P + N, prompt=P or N)
        self._state = None  # A step that is interrupted leaves none behind, and the next one reads the tokens again.
        order = torch.tensor(self._slots, device=tokens.device)
        by_slot = tokens[order.argsort()]
        if self.record_past and self._anchor is None:
            if keep < N:
                prefill(decoder, state, by_slot[:, :-keep])
            self._anchor = decoder.clone(state)
            by_slot = by_slot[:, -keep:]
        logits = read(decoder, state, by_slot, keep)[order]
        self.tokens, self.start, self.is_initialized = torch.cat([known, tokens], dim=1), start, True
        self._state = state
        return logits

    def _follow(self, known: Tensor, start: Tensor, length: int, prompt: int) -> tuple[Decoder, ModelState]:
        """The state behind the tokens `known` [B, P], with room for `length` positions and these starts."""
        P, state, decoder = known.shape[1], self._state, self._decoder
        if self._anchor is not None and state is not None and state.clock > P >= self._anchor.clock:
            state, self._anchor = self._anchor, None
        same = self.start is not None and torch.equal(self.start, start)
        if decoder is None or state is None or not same or state.clock > P or state.room < length:
            if self.length < length:
                self.length = min(2 * length, self.model.config.length)
            new = max(self.length - prompt, 1)
            check_memory(self.model, len(known), prompt, new)
            decoder = self.model.decoder(self.length)
            state = decoder.init(len(known), default_tiling(new, prompt), start=start)
            self._decoder, self._slots = decoder, list(range(len(known)))
            if self._anchor is not None:
                self._catch_up(decoder, state, known[:, : self._anchor.clock])
                self._anchor = decoder.clone(state)
        self._catch_up(decoder, state, known)
        return decoder, state

    def _catch_up(self, decoder: Decoder, state: ModelState, known: Tensor) -> None:
        """Runs those of the tokens `known` [B, P] that the state does not have yet."""
        if state.clock < known.shape[1]:
            self._state = None
            order = torch.tensor(self._slots, device=known.device).argsort()
            prefill(decoder, state, known[order, state.clock :])

    # --------------------------------------------------------------------------------------------------- going back

    def activate_past_recording(self) -> None:
        """From now on the positions behind each `crop` can be taken back without reading the rest again."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove positions, exactly; 0 accepts all of them."""
        P = self.get_seq_length()
        if not -P <= tokens_to_remove <= 0:
            raise LengthError(
                f"crop({tokens_to_remove}) was asked of {P} positions; expected a negative number of positions to take "
                f"back, from {-P}, or 0."
            )
        if self.tokens is not None:
            self.tokens = self.tokens[:, : P + tokens_to_remove]
        if self._state is not None and self._state.clock == self.get_seq_length():
            self._anchor = None

    # ----------------------------------------------------------------------------------------------------------- rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b continues what row `beam_idx[b]` was: rows of the state change names, and only doubles are copied."""
        self._take(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        if self.tokens is not None:
            self._take([row for row in range(len(self.tokens)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows `indices` (numbers, or a mask), in that order."""
        if self.tokens is not None:
            self._take(torch.arange(len(self.tokens))[indices.cpu()].tolist())

    def _take(self, rows: Sequence[int]) -> None:
        if self.tokens is None or self.start is None:
            return
        index = torch.tensor(rows, device=self.tokens.device)
        self.tokens, self.start, self._anchor = self.tokens[index], self.start[index], None
        if self._state is None or self._decoder is None:
            return
        slots = [self._slots[row] for row in rows]
        if len(rows) != self._state.batch:
            self._state = select_rows(self._decoder, self._state, slots)
            self._slots = list(range(len(rows)))
            return
        free = sorted(set(range(len(rows))) - set(slots))
        taken, sources, targets = set[int](), list[int](), list[int]()
        for row, slot in enumerate(slots):
            if slot in taken:
                sources.append(slot)
                targets.append(free.pop())
                slots[row] = targets[-1]
            taken.add(slot)
        copy_rows(self._state, sources, targets)
        self._slots = slots

    def __deepcopy__(self, memo: dict[int, Any]) -> PastLayer:
        """An independent past of the same model."""
        copy = PastLayer(self.model, self.length)
        copy.record_past, copy.is_initialized, copy._slots = self.record_past, self.is_initialized, list(self._slots)
        copy.tokens, copy.start, copy._decoder = self.tokens, self.start, self._decoder
        if self._decoder is not None and self._state is not None:
            copy._state = self._decoder.clone(self._state)
        return copy

    # -------------------------------------------------------------------------------------------- what generate asks

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first tokens."""
        return -1 if self.tokens is None else len(self.tokens)

    def get_seq_length(self) -> int:
        """Positions so far, padding among them."""
        return 0 if self.tokens is None else self.tokens.shape[1]

    def get_max_length(self) -> int:
        """The filter's length: no more positions can be run."""
        return self.model.config.length

    def get_max_cache_shape(self) -> int:
        """As `get_max_length`."""
        return self.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All positions so far and the next `query_length`, from 0."""
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raises StateError."""
        self.update(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raises StateError."""
        raise StateError(
            "a FlashInferenceCache keeps no keys and values; it belongs to FlashInferenceForCausalLM. "
            "Give other models a cache of their own."
        )


def read(decoder: Decoder, state: ModelState, tokens: Tensor, keep: int) -> Tensor:
    """The next tokens [B, N] -> logits [B, keep, V] of the last `keep` positions; no others are computed."""
    if keep == 1:
        return prefill(decoder, state, tokens)[:, None]
    if tokens.shape[1] > keep:
        prefill(decoder, state, tokens[:, :-keep])
    return decoder.extend(state, tokens[:, -keep:], every=True)


def check_length(model: LanguageModel, positions: int) -> None:
    """Raises LengthError if a model cannot run so many positions."""
    if positions > model.config.length:
        raise LengthError(
            f"{positions} positions were asked for, padding, new tokens and drafts included; this model's filter has "
            f"{model.config.length} taps, the most it can run. Shorten the prompt, or ask for fewer new tokens."
        )
