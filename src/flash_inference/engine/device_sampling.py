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
            self._reals = torch.zeros(rows, 4, device=device)
            self._counts = torch.zeros(rows, 3, dtype=torch.long, device=device)
            self._seen, self._barred = torch.zeros(2, rows, vocab, dtype=torch.bool, device=device)
        for row in range(rows):
            self._set(row, Sampling(), 0, 0)

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
        self._set(row, sampling, stream(sampler.seeds[which]), drawn)
        if sampling.repetition_penalty != 1:
            _fill(self._seen[row], sampler.seen_by(which))
        if sampling.allowed is None:
            self._barred[row].zero_()
        else:
            barred = torch.ones(self.vocab, dtype=torch.bool)
            barred[list(sampling.allowed)] = False
            _fill(self._barred[row], barred)

    def _set(self, row: int, sampling: Sampling, seed: int, drawn: int) -> None:
        ranks = self.vocab if sampling.top_k is None else min(sampling.top_k, self.vocab)
        share = 2.0 if sampling.top_p is None or sampling.top_p == 1 else sampling.top_p
        least = math.log(sampling.min_p) if sampling.min_p else -math.inf
        _fill(self._reals[row], torch.tensor([sampling.repetition_penalty, sampling.temperature, share, least]))
        _fill(self._counts[row], torch.tensor([seed, drawn, ranks]))

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


def _fill(place: Tensor, values: Tensor) -> None:
    """Copies from the host, in the order of the stream; the host does not wait."""
    place.copy_(values.pin_memory() if place.is_cuda else values, non_blocking=True)
