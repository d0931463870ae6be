"""Every example runs as its first line says, ends well, and says what it should. Those that need a model say so."""

from __future__ import annotations

import importlib
import math
import os
import random
import re
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch

from flash_inference import score
from flash_inference.models.weights import shipped
from flash_inference.testing import random_model

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
SOURCES = EXAMPLES.parent / "src"
LINES = 60


def run(name: str, *arguments: str) -> str:
    """What the example prints."""
    paths = [str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
    # One thread: OpenMP threads that spin on busy cores slow small tensors down a hundredfold.
    ours = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | ours, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def need(model: str) -> None:
    if model not in shipped():
        pytest.skip(f"the example needs the model {model}, which is not shipped")


def test_generate() -> None:
    need("shakespeare")
    text = run("generate")
    assert text.startswith("ROMEO.\n")
    assert re.search(r"^600 characters in \d+\.\d\d s: [\d,]+ a second$", text, re.MULTILINE)


def test_score_dna() -> None:
    need("tuberculosis")
    text = run("score_dna")
    bits = {name: float(value) for name, value in re.findall(r"^(\D+?) +(\d\.\d+) bits per base$", text, re.MULTILINE)}
    assert bits.keys() == {"as sequenced", "reverse complement", "letters shuffled"}
    assert max(bits["as sequenced"], bits["reverse complement"]) < bits["letters shuffled"]


def test_stream_audio(tmp_path: Path) -> None:
    text = run("stream_audio", str(tmp_path / "out.wav"))
    with wave.open(str(tmp_path / "out.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 44_100, 441_000)
    steps = re.search(r"^largest difference to a float64 sum: (\S+) of a 16-bit step$", text, re.MULTILINE)
    assert steps is not None
    assert float(steps.group(1)) < 0.5


def test_own_tiling() -> None:
    text = run("own_tiling")
    assert "both laws hold for 102 lengths" in text
    assert text.endswith("300 tokens by Ternary equal those by the default tiling: True\n")


def test_own_model() -> None:
    text = run("own_model")
    assert f"\n{'tile by tile! ' * 6}\n" in text
    assert text.endswith("every letter is the forward's choice too: True\n")


def test_own_layers() -> None:
    text = run("own_layers")
    assert text.endswith("every token is the forward's choice too: True\n")


def test_adapt_module() -> None:
    text = run("adapt_module")
    assert "every token is that of the module's own forward: True\n" in text
    assert re.search(r"^without the short convolution: .* '1\.short'.*no part names it", text, re.MULTILINE)


def test_own_mixer() -> None:
    text = run("own_mixer")
    found = differences(text, r"difference to the direct sum (\S+)$")
    assert len(found) == 4
    assert max(found) < 1e-9
    assert text.endswith("299 tiles instead of 44850 pairs\n")


def test_changing_filter() -> None:
    text = run("changing_filter")
    assert differences(text, r"after 500 steps: (\S+)$")[0] < 1e-9
    assert text.endswith("1956 tiles instead of 124750 pairs\n")


def differences(text: str, pattern: str) -> list[float]:
    """The numbers that a pattern finds, line by line."""
    return [float(number) for number in re.findall(pattern, text, re.MULTILINE)]


def test_variants() -> None:
    need("tuberculosis")
    header, *lines = run("variants").splitlines()
    assert header.split("\t") == ["position", "ref", "alt", "log_likelihood_ratio"]
    assert [line.split("\t")[0] for line in lines] == ["2000", "2000", "2000", "2901", "3333", "3400", "3700", "3950"]
    assert all(math.isfinite(float(line.split("\t")[3])) for line in lines)


def test_ratios_of_variants_are_those_of_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("variants")
    model = random_model(dtype=torch.float64, length=200, vocab_size=16, tokens="dna", start_token=2)
    reference = "".join(random.Random(0).choices("ACGT", k=150))
    places = [1, 1, 2, 31, 32, 33, 64, 64, 100, 149, 150]
    sizes = [(1, 1), (3, 1), (1, 4), (2, 2), (1, 1), (1, 9), (5, 1), (1, 1), (1, 33), (2, 1), (1, 1)]
    variants = [
        example.Variant(
            place, reference[place - 1 : place - 1 + old], "".join(random.Random(place).choices("ACGT", k=new))
        )
        for place, (old, new) in zip(places, sizes, strict=True)
    ]
    changed = [reference[: at - 1] + alt + reference[at - 1 + len(ref) :] for at, ref, alt in variants]
    base, *wholes = score(model, [reference, *changed], reduce="sum").tolist()
    got = list(example.ratios(model, reference, variants))
    assert max(abs(ratio - (whole - base)) for ratio, whole in zip(got, wholes, strict=True)) <= 1e-9


NAMES = ["generate", "score_dna", "stream_audio", "own_tiling", "own_model", "variants"]
OWN = ["own_layers", "adapt_module", "own_mixer", "changing_filter"]


@pytest.mark.parametrize("name", NAMES + OWN)
def test_examples_are_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < LINES
