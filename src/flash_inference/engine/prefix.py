"""Prefix: tokens that are read once, in pieces, and that any number of requests begin with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_inference.errors import NumericsError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.decoder import Decoder, ModelState
from flash_inference.models.rows import lengthened, row_bytes
from flash_inference.tiling import Blocked


class Prefix:
    """The past of token ids [P], in memory of its own: what a prompt is until it joins a batch.

    `read` takes it in, `chunk` positions at a time: pieces begin at the same places whatever else runs, so that a
    prompt's numbers do not depend on its neighbours. When it is `ready`, `logits` [V] tell its next token. A prefix may
    stand on another, `base`, whose past it copies rather than computes.
    """

    def __init__(self, tokens: Tensor, chunk: int, base: Prefix | None = None) -> None:
        self.tokens = tokens if base is None else torch.cat([base.tokens, tokens])
        self.chunk, self.base = chunk, base
        self.state: ModelState | None = None
        self._told: tuple[Tensor, Any] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ready(self) -> bool:
        """Whether all of it is read."""
        return self.state is not None and self.state.clock == len(self)

    @property
    def logits(self) -> Tensor | None:
        """Those behind the last token [V], on the host; None before it is ready. Waits for a device that reads it."""
        if self._told is not None and self._told[1] is not None:
            self._told[1].synchronize()
            self._told = self._told[0].clone(), None
        return None if self._told is None else self._told[0]

    @property
    def error(self) -> NumericsError | None:
        """Why nothing can go on behind it. Waits as `logits` does."""
        logits = self.logits
        if logits is None or torch.isfinite(logits.max()):
            return None
        return NumericsError(
            f"the logits after a prompt of {len(self)} tokens are not finite. Check the weights, the filter and the "
            "prompt: `flash-inference verify` names the first position that differs."
        )

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now."""
        return 0 if self.state is None else self.state.nbytes

    def cost(self, model: LanguageModel) -> int:
        """Bytes that it will hold, those of its base included."""
        return row_bytes(model, len(self)) + (0 if self.base is None else self.base.cost(model))

    @property
    def held(self) -> int:
        """Bytes that it holds now, those of its base included."""
        return self.nbytes + (0 if self.base is None else self.base.held)

    def read(self, decoder: Decoder) -> int:
        """Takes in the next piece, of the base if that is not ready, and tells how many positions it had."""
        if self.base is not None and not self.base.ready:
            return self.base.read(decoder)
        if self.state is None:
            self.state = self._begin(decoder)
        first = self.state.clock
        last = min(len(self), first - first % self.chunk + self.chunk)
        device = decoder.model.embedding.weight.device
        logits = decoder.extend(self.state, self.tokens[None, first:last].to(device))
        if last == len(self):
            self._told = _to_host(logits[0])
        return last - first

    def _begin(self, decoder: Decoder) -> ModelState:
        if self.base is None:
            return decoder.init(1, Blocked(len(self)))
        assert self.base.state is not None
        past, self.base = self.base.state, None
        return lengthened(decoder, past, len(self))


def _to_host(logits: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, and an event behind which it is there; none if it is there now."""
    if not logits.is_cuda:
        return logits.clone(), None
    here = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
    here.copy_(logits, non_blocking=True)
    return here, torch.cuda.current_stream().record_event()
