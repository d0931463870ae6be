"""Cached decoding against the full recompute, on a user's own model and prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_inference.engine.decode import decode, decoder_for
from flash_inference.engine.plan import check_memory
from flash_inference.engine.prompts import Prompt, as_rows, check_room
from flash_inference.engine.sampling import check_finite
from flash_inference.errors import NumericsError, ShapeError
from flash_inference.models.backbone import LanguageModel
from flash_inference.tiling import Tiling

TIE = 8
"""A top-2 gap below this many times the rounding of its position's logits is a tie."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What both ways choose at one position (the prompt's first token is position 0), with their top-2 gaps.

    `bound` is the gap below which the position counts as a tie.
    """

    position: int
    cached: int
    full: int
    cached_gap: float
    full_gap: float
    bound: float

    @property
    def equal(self) -> bool:
        """Whether both ways choose the same token."""
        return self.cached == self.full


@dataclass(frozen=True, slots=True)
class Report:
    """The comparison of one greedy run: `tokens` are what cached decoding chose after `prompt` tokens.

    `difference` is the largest absolute difference of any logit, found at `position`; `rounding` is the largest
    rounding error of the full recompute's own logits, for scale. `first` is the first position where the tokens differ
    and no tie excuses it; `ties` are all positions whose two best tokens are too close to call.
    """

    prompt: int
    tokens: tuple[int, ...]
    dtype: str
    difference: float
    position: int
    rounding: float
    first: Choice | None
    ties: tuple[Choice, ...]

    @property
    def equal(self) -> bool:
        """Whether the tokens are those of the full recompute, ties aside."""
        return self.first is None

    @property
    def distinct(self) -> int:
        """How many different tokens the run holds: a run that repeats a few proves little."""
        return len(set(self.tokens))


def verify(
    model: LanguageModel,
    prompt: Prompt = None,
    *,
    tokens: int,
    tiling: Tiling | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Decodes `tokens` tokens greedily with the cache, then compares with one full forward over what was generated.

    The forward is teacher-forced: its logits at every position are those of a full recompute of that position. A tie is
    a top-2 gap of the full logits below 8 times their rounding at that position: the largest difference between the
    forward in the model's dtype and in float64 (for a float64 model: between float32 and float64, scaled by the ratio
    of their epsilons). `progress` is called with the number of tokens decoded so far.
    Cost: one generation and two full forwards; memory: their activations and logits.
    Raises LengthError, TokenError, ShapeError, PlanError, NumericsError.

    >>> verify(model, "ROMEO.", tokens=300).equal
    """
    rows = as_rows(model, prompt)
    if len(rows) != 1:
        raise ShapeError(f"the prompt has {len(rows)} rows; verify takes one. Call it once per row.")
    given = rows[0][None]
    length = given.shape[1]
    check_room(model, length, tokens)
    check_memory(model, 1, length, tokens, tiling)
    training = model.training
    model.eval()
    try:
        chosen, cached = _decode(model, given, tokens, tiling, progress)
        whole = torch.cat([given, chosen[None, :-1]], dim=1)
        full = _forward(model, whole, length)
        rounding = _rounding(model, whole, length, full)
    finally:
        model.train(training)
    return _compare(length, chosen, cached, full, rounding)


def _decode(
    model: LanguageModel, prompt: Tensor, tokens: int, tiling: Tiling | None, progress: Callable[[int], None] | None
) -> tuple[Tensor, Tensor]:
    """Greedy tokens [N] and the logits [N, V] that they were chosen from."""
    logits: list[Tensor] = []

    def choose(row: Tensor) -> Tensor:
        best = row.max(-1)
        check_finite(best.values)
        logits.append(row[0].clone())
        if progress is not None:
            progress(len(logits))
        return best.indices

    decoder = decoder_for(model, prompt.shape[1] + tokens, tiling, len(prompt), prompt=prompt.shape[1])
    chosen = [token.clone() for token in decode(decoder, prompt, choose, max_new_tokens=tokens, tiling=tiling)]
    return torch.cat(chosen), torch.stack(logits)


@torch.no_grad()
def _forward(model: LanguageModel, tokens: Tensor, prompt: int) -> Tensor:
    """Logits [N, V] of the full forward, from the prompt's last position on."""
    logits = model(tokens.to(model.embedding.weight.device))[0, prompt - 1 :].cpu()
    finite = torch.isfinite(logits).all(-1)
    if not finite.all():
        place = prompt + int((~finite).nonzero()[0])
        raise NumericsError(f"the full forward's logits for position {place} are not finite. Check weights and filter.")
    return logits


def _rounding(model: LanguageModel, tokens: Tensor, prompt: int, full: Tensor) -> Tensor:
    """The rounding error [N] of the full logits, as the largest over the vocabulary at each position."""
    other = torch.float32 if full.dtype == torch.float64 else torch.float64
    with torch.device("meta"):
        twin = type(model)(model.config)
    twin.load_state_dict({name: value.to(other) for name, value in model.state_dict().items()}, assign=True)
    difference = (full.double() - _forward(twin.eval(), tokens, prompt).double()).abs().amax(-1)
    if full.dtype == torch.float64:
        difference *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return difference


def _compare(prompt: int, chosen: Tensor, cached: Tensor, full: Tensor, rounding: Tensor) -> Report:
    best = full.argmax(-1)
    cached_gap, full_gap = _gaps(cached), _gaps(full)
    bounds = TIE * rounding
    difference = (cached.double() - full.double()).abs().amax(-1)

    def choice(n: int) -> Choice:
        gaps = float(cached_gap[n]), float(full_gap[n])
        return Choice(prompt + n, int(chosen[n]), int(best[n]), gaps[0], gaps[1], float(bounds[n]))

    tie = full_gap < bounds
    differ = _places((best != chosen) & ~tie)
    worst = int(difference.argmax())
    return Report(
        prompt=prompt,
        tokens=tuple(int(token) for token in chosen),
        dtype=str(full.dtype).removeprefix("torch."),
        difference=float(difference[worst]),
        position=prompt + worst,
        rounding=float(rounding.max()),
        first=choice(differ[0]) if differ else None,
        ties=tuple(choice(n) for n in _places(tie)),
    )


def _places(mask: Tensor) -> list[int]:
    return [int(n) for n in mask.nonzero()[:, 0]]


def _gaps(logits: Tensor) -> Tensor:
    """How far the best logit [N] stands above the second best."""
    if logits.shape[-1] < 2:
        return torch.full_like(logits[:, 0], math.inf).double()
    best = logits.double().topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]
