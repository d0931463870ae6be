"""verify: equal runs are equal, a broken tiling is caught at its first position, ties are listed and excused."""

import dataclasses

import pytest
import torch

from flash_inference.engine.verify import verify
from flash_inference.errors import LengthError, NumericsError, ShapeError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.hyena import FilterConfig, HyenaConfig
from flash_inference.tiling import Blocked, Lazy, Relaxed

TINY = HyenaConfig(32, 8, 2, 256, filter=FilterConfig(width=8), tied=False)


def build(config=TINY, dtype=torch.float32):
    torch.manual_seed(1)
    model = LanguageModel(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, std=0.5)
    torch.nn.init.normal_(model.embedding.weight)
    return model.to(dtype)


def test_float64_differs_by_less_than_float32_rounds():
    single, double = (verify(build(dtype=dtype), [3], tokens=50) for dtype in (torch.float32, torch.float64))
    assert 0 < double.rounding < single.rounding
    assert double.difference < single.rounding
    assert double.tokens == single.tokens


class Forgetful(Relaxed):
    """Relaxed that never pays after one position."""

    def after(self, position):
        return () if position == 31 else super().after(position)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4, 5]])
def test_cached_decoding_is_equal(dtype, prompt):
    steps = []
    report = verify(build(dtype=dtype), prompt, tokens=100, progress=steps.append)
    assert report.equal
    assert report.first is None
    assert report.prompt == len(prompt)
    assert len(report.tokens) == 100
    assert report.distinct == len(set(report.tokens)) > 1
    assert steps == list(range(1, 101))
    assert len(prompt) <= report.position < len(prompt) + 100


def test_a_tiling_that_forgets_a_tile_is_caught():
    report = verify(build(), [3], tokens=200, tiling=Forgetful(200))
    good = verify(build(), [3], tokens=200, tiling=Relaxed(200))
    assert good.equal
    assert not report.equal
    assert report.first.position > 32
    assert report.first.full_gap > report.first.bound
    assert not report.first.equal
    assert report.difference > report.rounding
    assert report.difference > good.difference


def test_ties_are_listed_and_excused():
    model = build()
    model.head.weight[1::2] = model.head.weight[::2]
    report = verify(model, [3], tokens=20, tiling=Lazy(20))
    assert report.equal
    assert [tie.position for tie in report.ties] == list(range(1, 21))
    assert all(tie.full_gap < tie.bound for tie in report.ties)


def test_one_word_vocabulary():
    report = verify(build(dataclasses.replace(TINY, vocab_size=1)), None, tokens=5, tiling=Blocked(5))
    assert report.equal
    assert report.tokens == (0,) * 5
    assert not report.ties


def test_training_mode_is_left_as_it_was():
    model = build(dataclasses.replace(TINY, dropout=0.5)).train()
    assert verify(model, [3], tokens=20).equal
    assert model.training


def test_errors():
    model = build()
    with pytest.raises(LengthError):
        verify(model, [3], tokens=256)
    with pytest.raises(ShapeError):
        verify(model, [[1], [2]], tokens=2)
    model.head.weight[0] = float("nan")
    with pytest.raises(NumericsError):
        verify(model, [3], tokens=2)
