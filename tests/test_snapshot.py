"""States as values: cloned, saved, restored, refused when damaged."""

from __future__ import annotations

import random

import pytest
import torch

from flash_inference.engine.decode import default_tiling
from flash_inference.errors import StateError, TilingError
from flash_inference.mixers.mixer import tensors
from flash_inference.models.snapshot import load_state, save_state
from flash_inference.testing import random_model
from flash_inference.tiling import (
    Blocked,
    Eager,
    Epoched,
    Lazy,
    Prompted,
    Relaxed,
    Separated,
    Spread,
    TwiceRelaxed,
    describe,
    rebuild,
)

TILINGS = [
    Lazy(90),
    Eager(90),
    Relaxed(90),
    Relaxed(None, taps=16),
    Blocked(90, block=8),
    Epoched(90),
    Separated(90, near=8, block=4),
    TwiceRelaxed(90),
    Prompted(Spread(Separated(80, near=8, block=4), every=4), 10),
]


@pytest.mark.parametrize("tiling", TILINGS, ids=repr)
def test_tiling_as_values_comes_back_equal(tiling):
    assert rebuild(describe(tiling)) == tiling


def test_foreign_tiling_is_refused_by_name():
    class Mine(Relaxed):
        pass

    with pytest.raises(TilingError, match="Mine"):
        describe(Mine(8))


@pytest.fixture
def running():
    model = random_model(3, length=2200, dtype=torch.float64)
    decoder = model.decoder()
    tokens = torch.randint(0, model.config.vocab_size, (2, 2200))
    state = decoder.init(2, default_tiling(2100, 100))
    with torch.inference_mode():
        decoder.extend(state, tokens[:, :100])
        for t in range(100, 1317):
            decoder.extend(state, tokens[:, t : t + 1])
    return decoder, state, tokens


def test_clone_and_restored_state_go_on_bit_for_bit(running, tmp_path):
    decoder, state, tokens = running
    with torch.inference_mode():
        copy = decoder.clone(state)
        save_state(decoder, state, tmp_path / "state")
        back = load_state(decoder, tmp_path / "state")
    for t in range(1317, 1500):
        step = tokens[:, t : t + 1]
        logits = decoder.extend(state, step)
        assert torch.equal(logits, decoder.extend(copy, step))
        assert torch.equal(logits, decoder.extend(back, step))
    full = decoder.model(tokens[:, :1500])[:, -1]
    assert (logits - full).abs().max() <= 1e-10


def test_a_clone_is_independent(running):
    decoder, state, tokens = running
    copy = decoder.clone(state)
    decoder.extend(copy, tokens[:, :300].flip(1))
    logits = decoder.extend(state, tokens[:, 1317:1318])
    assert (logits - decoder.model(tokens[:, :1318])[:, -1]).abs().max() <= 1e-10


def test_no_inference_tensor_leaks_into_a_saved_state(running):
    decoder, state, _ = running
    with torch.inference_mode():
        copy = decoder.clone(state)
    saved = [copy.start, copy.stack.history, copy.stack.inputs, copy.stack.partial, copy.stack.start]
    saved += [tensor for pasts in copy.pasts for past in pasts for tensor in tensors(past).values()]
    assert len(saved) == 7
    assert not any(tensor.is_inference() for tensor in saved)


def test_every_damage_is_a_named_error(running, tmp_path):
    decoder, state, _ = running
    path = tmp_path / "state"
    save_state(decoder, state, path)
    whole, draw = path.read_bytes(), random.Random(0)
    for trial in range(100):
        damaged = bytearray(whole)
        if trial % 2:
            damaged = damaged[: draw.randrange(len(damaged))]
        else:
            damaged[draw.randrange(len(damaged) if trial % 4 else 400)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(StateError, match=r"damaged|does not begin"):
            load_state(decoder, path)


def test_another_models_state_is_refused(running, tmp_path):
    decoder, state, _ = running
    save_state(decoder, state, tmp_path / "state")
    other = random_model(3, length=2200, dtype=torch.float64, seed=1).decoder()
    with pytest.raises(StateError, match="another model"):
        load_state(other, tmp_path / "state")
    with pytest.raises(StateError, match="no file"):
        load_state(decoder, tmp_path / "missing")
