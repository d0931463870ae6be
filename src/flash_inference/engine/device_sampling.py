"""Tokens chosen on the device, inside graphs: for every row by settings of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_inference.engine.sampling import Sampler, Sampling
from flash_inference.ops.noise import exponential, stream


class DeviceSampler:
    """What a Sampler does, for `rows` rows with settings each, without looking at a value: a graph can capture it.

    The draw is the largest of p_i / e_i with e_i exponential, which takes token i with probability p_i. The e_i are a
    function of the row's seed, of how many draws the row has made, and of i (`ops.noise`): a row's tokens depend
    neither on its place nor on its neighbours, but are others than a host's for the same seed. Until `settle` gives
    them settings rows are greedy.
    """

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self.rows, self.vocab = rows, vocab
        with torch.inference_mode(False):
            self._reals = torch.tensor([1.0, 0.0, 2.0, -math.inf], device=device).repeat(rows, 1)
            self._counts = torch.tensor([0, 0, vocab], device=device).repeat(rows, 1)
            self._seen, self._barred = torch.zeros(2, rows, vocab, dtype=torch.bool, device=device)
        self._plain = [True] * rows

    @classmethod
    def of(cls, sampler: Sampler, vocab: int, device: torch.device) -> DeviceSampler:
        """The rows of a Sampler that has drawn nothing yet."""
        made = cls(sampler.rows, vocab, device)
        for row in range(sampler.rows):
            made.settle(row, sampler, row)
        return made

    def settle(self, row: int, sampler: Sampler, which: int = 0, drawn: int = 0) -> None:
        """A row goes on as row `which` of a Sampler, after `drawn` draws on the device. Waits for nothing."""
        sampling = sampler.sampling
        if sampling.plain and self._plain[row]:
            return
        self._plain[row] = sampling.plain
        share = 2.0 if sampling.top_p is None or sampling.top_p == 1 else sampling.top_p
        least = math.log(sampling.min_p) if sampling.min_p else -math.inf
        reals = sampling.repetition_penalty, sampling.temperature, share, least
        ranks = self.vocab if sampling.top_k is None else min(sampling.top_k, self.vocab)
        for places, numbers in (
            (self._reals, reals), (self._counts, (stream(sampler.seeds[which]), drawn, ranks))
        ):  # fmt: skip
            for place, number in enumerate(numbers):
                places[row, place].fill_(number)
        if sampling.repetition_penalty != 1:
            _copy(self._seen[row], sampler.seen_by(which))
        self._barred[row].zero_()
        if sampling.allowed is not None:
            barred = torch.ones(self.vocab, dtype=torch.bool)
            barred[list(sampling.allowed)] = False
            _copy(self._barred[row], barred)

    def draw(self, logits: Tensor, ranked: bool = True) -> Tensor:
        """Tokens [B] from logits [B, V], or [1] from [V]; -2 where a row's largest is not finite.

        `ranked` says that some row has a top_k or a top_p, which take a sort of the logits.
        """
        logits = logits.view(self.rows, -1)
        penalty, temperature, share, least = self._reals[:, None].unbind(-1)
        streams, drawn, ranks = self._counts.unbind(-1)
        scores = logits.float()
        punished = torch.where(scores > 0, scores / penalty, scores * penalty)
        scores = torch.where(self._seen & (penalty != 1), punished, scores).masked_fill(self._barred, -math.inf)
        scores = scores / torch.where(temperature > 0, temperature, 1)
        if ranked:
            scores = _cut(scores, ranks, share)
        scores = scores - scores.amax(-1, keepdim=True)
        scores = scores.masked_fill(scores < least, -math.inf)
        noise = exponential(streams, drawn, self.vocab).log()
        tokens = torch.where(temperature > 0, scores - noise, scores).argmax(-1)
        self._seen.scatter_(1, tokens[:, None], True)
        drawn += 1
        return torch.where(logits.amax(-1).isfinite(), tokens, -2)


def _cut(scores: Tensor, ranks: Tensor, share: Tensor) -> Tensor:
    """-inf below the ranks [B] most likely, and behind the smallest set of probability share [B, 1] among these."""
    ranked = scores.sort(dim=-1, descending=True)
    least = ranked.values.gather(1, ranks[:, None] - 1)
    chances = ranked.values.masked_fill(ranked.values < least, -math.inf).softmax(-1)
    beyond = chances.cumsum(-1) - chances >= share
    beyond = torch.zeros_like(beyond).scatter(-1, ranked.indices, beyond)
    return scores.masked_fill((scores < least) | beyond, -math.inf)


def cuts(sampling: Sampling) -> bool:
    """Whether its draws need ranks."""
    return sampling.temperature > 0 and (sampling.top_k is not None or sampling.top_p is not None)


def _copy(place: Tensor, values: Tensor) -> None:
    """Copies from the host, in the order of the stream; the host does not wait."""
    place.copy_(values.pin_memory() if place.is_cuda else values, non_blocking=True)
