"""Is a variant likelier than the reference? Log-likelihood ratios of whole sequences: python examples/variants.py

What precedes a variant is run once: a copy of that state reads each alternative. The table has VCF's columns.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import flash_inference as fi
from flash_inference.tiling import Blocked

DATA = Path(__file__).parent / "data"


class Variant(NamedTuple):
    """Bases `ref`, the first base of the sequence being 1, that give way to `alt`; neither is empty, as in VCF."""

    position: int
    ref: str
    alt: str


def read(path: Path, reference: str) -> list[Variant]:
    """The variants of a table by position, one for each alternative; raises unless they fit the reference."""
    rows = [line.split("\t") for line in path.read_text().splitlines() if line and not line.startswith("#")]
    found = sorted(Variant(int(row[1]), row[3], alt) for row in rows for alt in row[4].split(","))
    for position, ref, _ in found:
        if (there := reference[position - 1 : position - 1 + len(ref)]) != ref:
            raise ValueError(f"the table has {ref} at {position}, the reference {there}. Is it the same sequence?")
    return found


def ratios(model: fi.LanguageModel, reference: str, variants: list[Variant]) -> Iterator[float]:
    """log p(sequence with the variant) - log p(reference) in nats, for variants in the order of their positions."""
    tokens = torch.tensor([[model.config.start_token, *model.tokens.encode(reference)]])
    chances = fi.score(model, tokens)[0].double()
    length = tokens.shape[1] + max([0, *(len(alt) - len(ref) for _, ref, alt in variants)])
    decoder = model.decoder(length)
    state = decoder.init(1, Blocked(length))
    for position, ref, alt in variants:
        if state.clock < position:
            logits = decoder.extend(state, tokens[:, state.clock : position])[:, None]
        rest = torch.tensor([model.tokens.encode(alt + reference[position - 1 + len(ref) :])])
        later = decoder.extend(decoder.clone(state), rest, every=True)
        odds = torch.cat([logits, later[:, :-1]], dim=1).log_softmax(-1).gather(-1, rest[..., None])
        yield float(odds.double().sum() - chances[position - 1 :].sum())


if __name__ == "__main__":
    reference = "".join((DATA / "tuberculosis.fa").read_text().splitlines()[1:])
    variants = read(DATA / "variants.tsv", reference)
    print("position", "ref", "alt", "log_likelihood_ratio", sep="\t")
    for variant, ratio in zip(variants, ratios(fi.load("tuberculosis"), reference, variants), strict=True):
        print(*variant, f"{ratio:.3f}", sep="\t")
