"""Who proposes the tokens that a model then checks: the text itself, or a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from flash_inference.engine.decode import default_tiling, prefill
from flash_inference.engine.prompts import check_room
from flash_inference.engine.sampling import Sampler, Sampling
from flash_inference.errors import ModelError, SettingError
from flash_inference.models.draft import Draft

if TYPE_CHECKING:
    from flash_inference.models.backbone import LanguageModel

APART = 0x5851F42D4C957F2D
"""Sets the seeds of proposals apart from those of choices, which must not depend on each other."""


class Proposal(NamedTuple):
    """Tokens that may come next, and the laws [k, V] that they were drawn from; None: none was drawn."""

    tokens: list[int]
    laws: Tensor | None = None


class Proposer(Protocol):
    """What a drafter keeps of one sequence."""

    @property
    def foretold(self) -> int | None:
        """How many of the last tokens in a row it would have proposed; None if it does not know."""
        ...

    def propose(self, most: int) -> Proposal:
        """At most so many tokens that may follow those seen; none is an answer too."""
        ...

    def see(self, tokens: Sequence[int]) -> None:
        """Takes notice of what did follow."""
        ...


class Drafter(Protocol):
    """A way of proposing tokens: a value, which any number of sequences share."""

    def check(self, model: LanguageModel, length: int, max_new_tokens: int) -> None:
        """Raises what forbids proposing to `model` after prompts of `length`."""
        ...

    def begin(self, prompt: Tensor, max_new_tokens: int, sampling: Sampling, row: int) -> Proposer:
        """The proposer of the sequence that begins with prompt [P], `row` among a caller's rows."""
        ...


@dataclass(frozen=True, slots=True)
class PromptLookup:
    """Proposes what followed the last time that the last `ngram` tokens stood in the text, prompt included.

    While that place foretells the text it is kept to, as a text may go on in several ways behind the same few tokens.
    Where it reaches the end of the text it goes on with what it proposes itself, so that a period shorter than the
    proposal is repeated. O(1) per token seen and proposed. Nothing is drawn: tokens, sampled ones too, are those of
    plain generation with the same seed.
    Source: Saxena, Prompt Lookup Decoding (2023); Yang et al., Inference with Reference (2023), arXiv 2304.04487.
    """

    ngram: int = 4

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise SettingError(f"ngram is {self.ngram}; expected at least 1 token.")

    def check(self, model: LanguageModel, length: int, max_new_tokens: int) -> None:
        """Any text will do."""

    def begin(self, prompt: Tensor, max_new_tokens: int, sampling: Sampling, row: int) -> Lookup:
        """An index of the prompt [P]."""
        lookup = Lookup(self.ngram)
        lookup.see([int(token) for token in prompt.numpy()])
        return lookup


class Lookup:
    """The text of one sequence, and where each run of `ngram` tokens was followed by something last.

    `source` is the place that has foretold the last tokens, `foretold` of them in a row.
    """

    def __init__(self, ngram: int) -> None:
        self.ngram, self.foretold = ngram, 0
        self.source: int | None = None
        self.text: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}

    def propose(self, most: int) -> Proposal:
        """What followed last time."""
        place = self.places.get(tuple(self.text[-self.ngram :])) if self.source is None else self.source
        if place is None:
            return Proposal([])
        period = len(self.text) - place
        return Proposal([self.text[place + i % period] for i in range(most)])

    def see(self, tokens: Sequence[int]) -> None:
        """Enters tokens into the text."""
        text, ngram, places = self.text, self.ngram, self.places
        for token in tokens:
            last = tuple(text[-ngram:])
            place = places.get(last) if self.source is None else self.source
            if place is not None and text[place] == token:
                self.source, self.foretold = place + 1, self.foretold + 1
            else:
                self.source, self.foretold = None, 0
            if len(text) >= ngram:
                places[last] = len(text)
            text.append(token)


@dataclass(frozen=True, slots=True, eq=False)
class ModelDraft:
    """Proposes what a smaller model of the same vocabulary draws, under the same sampling settings.

    The smaller model reads its proposals as drafts too, one position at a time, and takes back what is not accepted.
    """

    model: LanguageModel

    def check(self, model: LanguageModel, length: int, max_new_tokens: int) -> None:
        """Raises ModelError for another vocabulary and LengthError for a model that is too short."""
        ours, theirs = self.model.config.vocab_size, model.config.vocab_size
        if ours != theirs:
            raise ModelError(f"the draft model has {ours} tokens and the model {theirs}; expected one vocabulary.")
        check_room(self.model, length, max_new_tokens)

    def begin(self, prompt: Tensor, max_new_tokens: int, sampling: Sampling, row: int) -> Apprentice:
        """A state of the smaller model."""
        return Apprentice(self.model, prompt, max_new_tokens, sampling, row)


class Apprentice:
    """The smaller model's state of one sequence, and the tokens `unread` that it has not read yet."""

    foretold = None

    def __init__(self, model: LanguageModel, prompt: Tensor, max_new_tokens: int, sampling: Sampling, row: int) -> None:
        positions = max(max_new_tokens - 1, 1)
        self.decoder = model.decoder(len(prompt) + max_new_tokens)
        self.state = self.decoder.init(1, default_tiling(positions, len(prompt)))
        own = replace(sampling, seed=None if sampling.seed is None else (sampling.seed ^ APART) % 2**63)
        self.sampler = Sampler(own, 1, model.config.vocab_size, seen=[prompt], first_row=row)
        self.device = model.embedding.weight.device
        self.unread = [int(token) for token in prompt.numpy()]
        self.draft: Draft | None = None
        self.drafted: list[int] = []

    def propose(self, most: int) -> Proposal:
        """Tokens drawn one after another, with their laws unless they are the most likely ones."""
        with torch.no_grad():
            logits = prefill(self.decoder, self.state, self._tensor(self.unread))
            sampler, self.unread = self.sampler.fork(), []
            self.draft, self.drafted = self.decoder.draft(self.state), []
            tokens, laws = list[int](), list[Tensor]()
            for _ in range(most):
                if tokens:
                    logits = self.draft.extend(self._tensor(tokens[-1:]))[:, -1]
                    self.drafted.append(tokens[-1])
                laws.append(sampler.law(logits.cpu()))
                tokens.append(int(sampler.sample(laws[-1])))
        return Proposal(tokens, torch.cat(laws) if self.sampler.sampling.temperature else None)

    def see(self, tokens: Sequence[int]) -> None:
        """Accepts the drafts that came true."""
        self.sampler.remember(torch.tensor([tokens]))
        self.unread += tokens
        if self.draft is not None:
            true = 0
            while true < min(len(self.drafted), len(tokens)) and self.drafted[true] == tokens[true]:
                true += 1
            self.draft.commit(true)
            self.draft, self.unread = None, self.unread[true:]

    def _tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.device)
