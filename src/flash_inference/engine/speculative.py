"""Speculative decoding: a drafter proposes tokens, and the model checks several of them in one tentative pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flash_inference.engine.decode import beside_blas, cores, default_tiling, prefill
from flash_inference.engine.drafters import Proposer
from flash_inference.engine.payer import Payer
from flash_inference.models.decoder import Decoder, ModelState
from flash_inference.tiling import Tiling

MOST = 31
SHARE, SAVED = 0.02, 48.0
TRIES = 3


@dataclass(frozen=True, slots=True)
class Price:
    """What a draft costs, in plain steps: `base`, and `each` for every token proposed.

    `first` tokens are proposed to begin with.
    """

    first: int
    base: float
    each: float

    def cost(self, proposed: int) -> float:
        """What a draft of so many tokens costs, in plain steps."""
        return self.base + self.each * proposed


MODULES = Price(8, 2.0, 0.1)
"""Steps run module by module, as drafts do."""
FUSED = Price(12, 4.0, 0.2)
"""Steps run fused over numpy, and so do drafts. Measured by `benchmarks/speculative.py`, case "price", on one core:
from 2.6 and 0.10 on a quiet host to 4.8 and 0.27 on a busy one."""


class Check(Protocol):
    """Chooses the token [1] behind logits [1, V], where `token` was proposed for it, drawn from `law` [V] if any."""

    def __call__(self, logits: Tensor, token: int | None = None, law: Tensor | None = None) -> Tensor: ...


class Pace:
    """How many tokens to propose: twice as many after all were accepted, few after some were not.

    A proposer that knows how many tokens s in a row it foretold is taken at its word: seen from anywhere inside it, a
    run goes on for j more tokens with a probability of about s / (s + j). So many are proposed that the last one is
    worth its price, s / (s + j) = `price.each`, if all of them together are worth the price of the draft.

    Drafts are paid from savings, in plain steps: one of k tokens costs `price.cost(k)` and saves one step for every
    token it yields. Each plain step puts `SHARE` aside, so where nothing is ever accepted drafts take this share of the
    time; savings end at `SAVED`, so that a good stretch is not spent on a bad one. Depends on what was accepted alone,
    not on any clock: a seed repeats a run. What the drafter takes for itself is not counted.
    """

    def __init__(self, price: Price = MODULES) -> None:
        self.price, self.length = price, price.first
        self.savings = TRIES * price.cost(price.first)

    def most(self, room: int, foretold: int | None = None) -> int:
        """The tokens to propose now, at most `room`; 0 while a draft could not gain, or if it fails not be paid."""
        if foretold is None:
            tokens = gain = min(self.length, room)
        else:
            tokens = max(min(int(foretold * (1 / self.price.each - 1)), MOST, room), 0)
            gain = foretold * math.log1p(tokens / foretold) if foretold else 0
        cost = self.price.cost(tokens)
        return tokens if gain + 1 > cost and self.savings >= cost - 1 else 0

    def stepped(self) -> None:
        """Takes notice of a plain step."""
        self.savings = min(self.savings + SHARE, SAVED)

    def drafted(self, proposed: int, accepted: int) -> None:
        """Takes notice of a draft."""
        self.savings = min(self.savings + accepted + 1 - self.price.cost(proposed), SAVED)
        self.length = min(2 * self.length, MOST) if accepted == proposed else self.price.first


def speculate(
    decoder: Decoder,
    prompt: Tensor,
    choose: Check,
    proposer: Proposer,
    *,
    max_new_tokens: int,
    tiling: Tiling | None = None,
    beside: bool | None = None,
    pace: Pace | None = None,
) -> Iterator[Tensor]:
    """As `decode`, for one row [1, P]: the same tokens, or tokens of the same law, with fewer passes.

    A pass reads the newest token and k proposed ones, and gives the logits behind each. Tokens are chosen from these
    in order, up to the first that is not the proposed one; those read in vain are forgotten. Where no proposal is worth
    it the pass is a plain step.
    """
    length, device = prompt.shape[1], decoder.model.embedding.weight.device
    state = decoder.init(1, tiling or default_tiling(max(max_new_tokens - 1, 1), length))
    logits = prefill(decoder, state, prompt.to(device)).cpu()
    pace = pace or Pace(FUSED if decoder.fused else MODULES)
    with Payer(decoder, state, cores() > 1 if beside is None else beside) as pay:
        token = choose(logits)
        proposer.see([int(token)])
        yield token
        left = max_new_tokens - 1
        while left:
            foretold = proposer.foretold
            most = 0 if foretold == 0 else pace.most(min(left, _inside(state)) - 1, foretold)
            proposed, laws = proposer.propose(most) if most else ([], None)
            pay(len(proposed))
            if not proposed:
                token = choose(decoder.extend(state, token[:, None].to(device)).cpu())
                pace.stepped()
                proposer.see([int(token)])
                left -= 1
                yield token
                continue
            draft = decoder.draft(state)
            with beside_blas(state, 1 + len(proposed)):
                behind = draft.extend(torch.tensor([[int(token), *proposed]], device=device)).cpu()
            accepted, chosen = 0, list[int]()
            for i, logits in enumerate(behind.unbind(1)):
                guess = proposed[i] if i < len(proposed) else None
                token = choose(logits, guess, None if laws is None or guess is None else laws[i])
                chosen.append(int(token))
                left -= 1
                yield token
                if int(token) != guess:
                    break
                accepted += 1
            if left:
                draft.commit(accepted + 1, pay)
            pace.drafted(len(proposed), accepted)
            proposer.see(chosen)


def _inside(state: ModelState) -> int:
    """Positions that a draft may have without computing tiles that steps would compute again.

    These are the positions left in the base block, where the tiling has blocks.
    """
    stack = state.stack
    if stack is None or stack.tiling.block == 1 or stack.clock < stack.tiling.origin:
        return MOST + 1
    return stack.base + stack.block - stack.clock
