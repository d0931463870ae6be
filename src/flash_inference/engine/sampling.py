"""From logits to tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_inference.errors import NumericsError, SamplingError, TokenError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Filters apply in the order of the fields; temperature 0 takes the most likely token.

    repetition_penalty divides positive and multiplies negative logits of tokens already seen (prompt included);
    `allowed` restricts to a set of ids; temperature divides the logits; top_k keeps the k most likely, top_p the
    smallest set of at least that probability, min_p those of at least min_p times the largest probability.
    Row b draws from its own generator, seeded by (seed, b): a row's tokens do not depend on its neighbours.
    """

    repetition_penalty: float = 1.0
    allowed: tuple[int, ...] | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        checks: tuple[tuple[str, bool, str], ...] = (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a number >= 0 (0 is greedy)"),
            ("top_k", self.top_k is None or self.top_k >= 1, "an integer >= 1, or None"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a number in (0, 1], or None"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "a number in [0, 1], or None"),
            (
                "repetition_penalty",
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "a number > 0 (1 is none)",
            ),
            ("allowed", self.allowed is None or len(self.allowed) > 0, "at least one token id, or None"),
        )
        for name, good, wanted in checks:
            if not good:
                raise SamplingError(f"{name} is {getattr(self, name)!r}; expected {wanted}.")

    @property
    def plain(self) -> bool:
        """Greedy over all tokens with no penalty: the argmax of the logits."""
        return self.temperature == 0 and self.allowed is None and self.repetition_penalty == 1


class Sampler:
    """Draws the next token of every row, and remembers what a penalty needs."""

    def __init__(
        self, sampling: Sampling, rows: int, vocab: int, seen: Iterable[Tensor] = (), first_row: int = 0
    ) -> None:
        self.sampling = sampling
        if sampling.allowed is not None:
            for token in sampling.allowed:
                if not 0 <= token < vocab:
                    raise TokenError(f"allowed token id {token} is outside the vocabulary; expected 0 .. {vocab - 1}.")
        self._barred = None
        if sampling.allowed is not None:
            self._barred = torch.ones(vocab, dtype=torch.bool)
            self._barred[list(sampling.allowed)] = False
        self._seen = torch.zeros(rows, vocab, dtype=torch.bool)
        for row, tokens in enumerate(seen):
            self._seen[row, tokens] = True
        seed = torch.Generator().seed() if sampling.seed is None else sampling.seed
        self._generators = [
            torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * b) % 2**63)
            for b in range(first_row, first_row + rows)
        ]

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token [B] from logits [B, V]. Raises NumericsError if a row has no finite largest logit."""
        if self.sampling.plain:
            best = logits.max(-1)
            if not math.isfinite(float(best.values.sum())):
                check_finite(best.values)
            return best.indices
        scores = self.scores(logits)
        tokens = scores.argmax(-1) if self.sampling.temperature == 0 else self._draw(scores.softmax(-1))
        self.remember(tokens[:, None])
        return tokens

    def law(self, logits: Tensor) -> Tensor:
        """The probabilities [B, V] in float64 by which a call with these logits [B, V] draws."""
        scores = self.scores(logits).double()
        if self.sampling.temperature == 0:
            return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).double()
        return scores.softmax(-1)

    def sample(self, law: Tensor) -> Tensor:
        """Tokens [B] drawn by a law [B, V]."""
        tokens = self._draw(law)
        self.remember(tokens[:, None])
        return tokens

    def remember(self, tokens: Tensor) -> None:
        """Tokens [B, N] have been seen, for the penalty."""
        if self.sampling.repetition_penalty != 1:
            self._seen.scatter_(1, tokens, True)

    def fork(self) -> Sampler:
        """A sampler that has seen the same, and then sees for itself; both draw from the same generators."""
        branch = copy(self)
        branch._seen = self._seen.clone()
        return branch

    @property
    def rows(self) -> int:
        """How many rows it draws for."""
        return len(self._generators)

    @property
    def seeds(self) -> list[int]:
        """What each row's draws were seeded with."""
        return [generator.initial_seed() for generator in self._generators]

    def seen_by(self, row: int) -> Tensor:
        """Which tokens [V] a row has seen, for the penalty."""
        return self._seen[row]

    def _draw(self, law: Tensor) -> Tensor:
        draws = [torch.multinomial(row, 1, generator=g) for row, g in zip(law, self._generators, strict=True)]
        return torch.cat(draws)

    def scores(self, logits: Tensor) -> Tensor:
        """Logits [B, V] after penalty, allowed set, temperature and the three cuts: -inf where nothing is drawn."""
        check_finite(logits.max(-1).values)
        settings, scores = self.sampling, logits.to(torch.promote_types(logits.dtype, torch.float32))
        if settings.repetition_penalty != 1:
            penalty = settings.repetition_penalty
            punished = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self._seen, punished, scores)
        if self._barred is not None:
            scores = scores.masked_fill(self._barred, -math.inf)
        if settings.temperature == 0:
            return scores
        scores = scores / settings.temperature
        if settings.top_k is not None and settings.top_k < scores.shape[-1]:
            least = scores.topk(settings.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if settings.top_p is not None and settings.top_p < 1:
            ranked = scores.sort(dim=-1, descending=True)
            probabilities = ranked.values.softmax(-1)
            beyond = probabilities.cumsum(-1) - probabilities >= settings.top_p
            scores = scores.masked_fill(torch.zeros_like(beyond).scatter(-1, ranked.indices, beyond), -math.inf)
        if settings.min_p is not None and settings.min_p > 0:
            least = scores.max(-1, keepdim=True).values + math.log(settings.min_p)
            scores = scores.masked_fill(scores < least, -math.inf)
        return scores


def accepted_or_redrawn(p: Tensor, q: Tensor, token: int) -> Tensor:
    """The law [V] of the next token, where the law q [V] has proposed `token` and the law p [V] is wanted.

    It is the proposal with chance a = min(1, p/q), else a token by the residual: a 1[token] + (1 - a) r with
    r = max(p - q, 0) / sum of it. Averaged over proposals by q this is p. r gives `token` no chance where a < 1, so
    that the proposal is accepted exactly if it is what one draw from this law gives.
    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2023), arXiv 2211.17192.
    """
    accept, residual = min(float(p[token] / q[token]), 1.0), (p - q).clamp(min=0)
    total = float(residual.sum())
    if accept == 1 or total == 0:
        return torch.nn.functional.one_hot(torch.tensor(token), len(p)).to(p)
    law = residual * ((1 - accept) / total)
    law[token] = accept
    return law


def check_finite(best: Tensor) -> None:
    """Raises NumericsError naming the first row whose largest logit is NaN or infinite (torch's max passes NaN on)."""
    good = torch.isfinite(best)
    if not good.all():
        row = int((~good).nonzero()[0])
        raise NumericsError(
            f"the logits of row {row} are not finite (largest is {float(best[row])}). Check the weights and the filter "
            "for NaN or overflow: `flash-inference verify` names the first position where they differ."
        )
