"""How likely is a stretch of DNA? Bits per base under the shipped model: python examples/score_dna.py

The stretch comes from the part of the genome that the model was not trained on. A uniform guess costs 2 bits.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import flash_inference as fi

FASTA = Path(__file__).parent / "data" / "tuberculosis.fa"
COMPLEMENT = str.maketrans("ACGT", "TGCA")


def bits_of_letters(sequence: str) -> float:
    """The entropy of single letters: what a model that knows only their frequencies pays."""
    shares = [sequence.count(base) / len(sequence) for base in "ACGT"]
    return -sum(share * math.log2(share) for share in shares if share)


def main() -> None:
    """Scores a sequence, its other strand, and its letters in random order."""
    sequence = "".join(FASTA.read_text().splitlines()[1:])
    shuffled = "".join(random.Random(0).sample(sequence, len(sequence)))
    model = fi.load("tuberculosis")
    print(f"{len(sequence):,} bases; their letter frequencies alone: {bits_of_letters(sequence):.3f} bits per base")
    texts = {
        "as sequenced": sequence,
        "reverse complement": sequence.translate(COMPLEMENT)[::-1],
        "letters shuffled": shuffled,
    }
    for name, chances in zip(texts, fi.score(model, list(texts.values())), strict=True):
        print(f"{name:20s}{-chances.mean() / math.log(2):.3f} bits per base")


if __name__ == "__main__":
    main()
