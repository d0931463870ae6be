"""What holds for every published model: it is its definition, decodes as it reads, and goes back as it came.

A `Publication` says how to write a small one, and its logits by direct sums in float64, without the library. Every
function of LAWS holds for every Publication.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import flash_inference as fi
from flash_inference.engine.plan import plan
from flash_inference.engine.verify import verify
from flash_inference.models.published import to_published
from flash_inference.tiling import Blocked

LENGTH = 300
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Publication:
    """A model under its published names. `decodes` is how its layers decode, in the words of a plan."""

    id: str
    layout: str
    vocab: int
    decodes: tuple[str, ...]
    config: Callable[[int], dict[str, Any]]
    weights: Callable[[int], Arrays]
    logits: Callable[[Arrays, list[int]], np.ndarray]
    file: str = "model.safetensors"
    shared: tuple[str, ...] = ()


def publish(
    folder: Path, case: Publication, dtype: torch.dtype = torch.float64, length: int = LENGTH, **config: Any
) -> dict[str, Tensor]:
    """Writes the folder, and gives its tensors; `config` overrides keys."""
    weights = {name: torch.from_numpy(array.copy()) for name, array in case.weights(length).items()}
    weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config(length) | config))
    write(folder / case.file, weights)
    return weights


def write(path: Path, weights: dict[str, Tensor]) -> None:
    """A weight file as its suffix says."""
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"model": weights, "args": None} if path.suffix == ".pt" else weights, path)


def exact(case: Publication, weights: dict[str, Tensor], ids: list[int]) -> np.ndarray:
    """Logits [L, V] of the definition, from the numbers that were written."""
    arrays = {name: tensor.double().numpy() for name, tensor in weights.items() if tensor.is_floating_point()}
    return case.logits(arrays, ids)


def some_ids(case: Publication, length: int = LENGTH) -> list[int]:
    """The same random tokens at every call."""
    return torch.randint(case.vocab, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def close(got: Tensor | np.ndarray, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    """Equal up to a share of the largest number."""
    assert got.shape == expected.shape
    assert np.abs(np.asarray(got) - expected).max() <= tolerance * np.abs(expected).max()


def logits_are_those_of_the_definition(tmp_path: Path, case: Publication) -> None:
    weights, ids = publish(tmp_path, case), some_ids(case)
    close(fi.load(tmp_path)(torch.tensor([ids]))[0], exact(case, weights, ids))


def logits_in_float32(tmp_path: Path, case: Publication) -> None:
    weights, ids = publish(tmp_path, case, torch.float32), some_ids(case)
    got = fi.load(tmp_path)(torch.tensor([ids]))[0]
    assert got.dtype == torch.float32
    close(got, exact(case, weights, ids), 1e-4)


def sixteen_bits_load(tmp_path: Path, case: Publication) -> None:
    weights, ids = publish(tmp_path, case, torch.bfloat16), some_ids(case)
    close(fi.load(tmp_path, dtype=torch.float64)(torch.tensor([ids]))[0], exact(case, weights, ids))
    model = fi.load(tmp_path)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert all(weight.dtype == torch.float32 for name, weight in model.named_parameters() if ".filter." in name)


def state_dicts_round_trip(tmp_path: Path, case: Publication) -> None:
    weights = publish(tmp_path, case)
    model = fi.load(tmp_path)
    again = to_published(model, case.layout, names=weights)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert all(name.endswith(case.shared or ("?",)) for name in set(again) - set(weights))
    assert model.notes


def keeps_every_number(theirs: Path, ours: Path) -> None:
    """Our format gives back what a published folder holds."""
    model = fi.load(theirs)
    fi.save(model, ours)
    again = fi.load(ours)
    assert again.config == model.config
    kept, numbers = again.state_dict(), model.state_dict()
    assert kept.keys() == numbers.keys()
    assert all(torch.equal(kept[name], numbers[name]) for name in numbers)


def steps_are(model: fi.LanguageModel, ids: list[int], expected: np.ndarray) -> None:
    """Cached steps behind prompts of every length are the definition's logits [L, V] of these tokens."""
    decoder, tokens = model.decoder(len(ids)), torch.tensor([ids])
    for prompt in (*range(1, 41), 257):
        state = decoder.init(1, Blocked(len(ids)))
        got = [*decoder.extend(state, tokens[:, :prompt], every=True)[0]]
        got += [decoder.extend(state, tokens[:, prompt + n : prompt + n + 1])[0] for n in range(5)]
        close(torch.stack(got), expected[: prompt + 5])


def greedy_is_recompute(model: fi.LanguageModel, prompt: list[int]) -> None:
    """256 greedy tokens are those of a full forward, and not all the same."""
    report = verify(model, prompt, tokens=256)
    assert report.equal
    assert report.distinct > 3


def our_format_keeps_every_number(tmp_path: Path, case: Publication) -> None:
    publish(tmp_path / "theirs", case, torch.float32)
    keeps_every_number(tmp_path / "theirs", tmp_path / "ours")


def steps_equal_the_definition_after_prompts_of_every_length(tmp_path: Path, case: Publication) -> None:
    weights, ids = publish(tmp_path, case), some_ids(case)
    steps_are(fi.load(tmp_path), ids, exact(case, weights, ids))


def greedy_tokens_equal_full_recompute(tmp_path: Path, case: Publication) -> None:
    publish(tmp_path, case)
    greedy_is_recompute(fi.load(tmp_path), some_ids(case, 7))


def chunks_change_nothing(tmp_path: Path, case: Publication) -> None:
    weights, ids = publish(tmp_path, case), some_ids(case)
    model, tokens = fi.load(tmp_path), torch.tensor([ids])
    logits = exact(case, weights, ids)
    logp = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1)[:, None]
    expected, states = logp[np.arange(LENGTH - 1), ids[1:]], fi.embed(model, tokens)
    close(model.head(states)[0], logits)
    close(fi.score(model, tokens[:, :40], chunk=1)[0], expected[:39])
    for chunk in (*torch.randint(7, LENGTH, (4,)).tolist(), 4096):
        close(fi.score(model, tokens, chunk=chunk)[0], expected)
        close(fi.embed(model, tokens, chunk=chunk)[0], states[0].numpy())


def rows_begin_at_their_own_clocks(tmp_path: Path, case: Publication) -> None:
    weights, length, starts = publish(tmp_path, case), 90, [0, 33, 7, 61]
    rows = torch.randint(case.vocab, (4, length))
    decoder = fi.load(tmp_path).decoder()
    for sizes in ([1] * length, [40, 1, 1, 5, 20, 1, 22], [length]):
        state = decoder.init(4, Blocked(length, block=4), start=torch.tensor(starts))
        got = torch.cat([decoder.extend(state, piece, every=True) for piece in rows.split(sizes, 1)], 1)
        for row, start in enumerate(starts):
            close(got[row, start:], exact(case, weights, rows[row, start:].tolist()))


def the_plan_tells_how_layers_decode(tmp_path: Path, case: Publication) -> None:
    publish(tmp_path, case)
    model = fi.load(tmp_path)
    made = plan(model, prompt=40, max_new_tokens=200, batch=2)
    assert tuple(layer.decodes for layer in made.layers) == case.decodes
    assert made.state >= model.decoder(240).init(2, Blocked(240)).nbytes


LAWS: tuple[Callable[[Path, Publication], None], ...] = (
    logits_are_those_of_the_definition, logits_in_float32, sixteen_bits_load, state_dicts_round_trip,
    our_format_keeps_every_number, steps_equal_the_definition_after_prompts_of_every_length,
    greedy_tokens_equal_full_recompute, chunks_change_nothing, rows_begin_at_their_own_clocks,
    the_plan_tells_how_layers_decode,
)  # fmt: skip
