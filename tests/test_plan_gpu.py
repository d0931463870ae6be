"""Plans of runs on a GPU, made without one: what is told is what is allocated, and what cannot fit is refused."""

from __future__ import annotations

import weakref

import pytest
import torch

import flash_inference as fi
from flash_inference.engine.plan_gpu import plan_gpu
from flash_inference.errors import ModelError, PlanError, TilingError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.gpu_memory import GRAPH, NEAR, GpuRunShape, GpuShape, fitted, gpu_bytes, near_side
from flash_inference.models.stu import STUConfig
from flash_inference.ops.tile_conv.factors import scratch_numbers
from flash_inference.testing import random_model
from flash_inference.tiling import Blocked, Prompted, Relaxed, Staggered
from flash_inference.tiling.schedule import LEAST, Groups, Pricing

GIB = 1 << 30


def shapes_only(
    layers: int = 4, width: int = 256, length: int = 1 << 20, vocab: int = 1000, **more: object
) -> LanguageModel:
    """A model without numbers."""
    with torch.device("meta"):
        return LanguageModel(fi.HyenaConfig(vocab, width, layers, length, tied=False, **more))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("latency", ["bounded", "relaxed"])
@pytest.mark.parametrize(("prompt", "new", "batch"), [(1, 500, 1), (77, 300, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_parts_are_what_is_allocated(
    order: int, latency: str, prompt: int, new: int, batch: int, dtype: torch.dtype
) -> None:
    gpu = pytest.importorskip("flash_inference.models.gpu")
    model = random_model(order, length=1000)
    for p in model.parameters():
        p.copy_(p.bfloat16())
    length = prompt + new - 1
    decoder = gpu.GpuDecoder(model, length, near=32, latency=latency, batch=batch, dtype=dtype, prompt=prompt)
    made = decoder.plan
    assert made.kept == tuple(decoder.ffts)
    assert made.spectra == sum(0 if fft._spectra is None else fft._spectra.nbytes for fft in decoder.ffts.values()) > 0
    run = decoder.init(prompt, new - 1, batch)
    logs = run.tokens.nbytes + run.stamps.nbytes
    assert made.state == run.history.nbytes + run.pending.nbytes + logs
    assert made.filters == decoder.near.nbytes + decoder.step.diagonal.nbytes * 2
    assert made.own == sum(p.nbytes for p in model.parameters())
    streamed = [getattr(layer, name)[0] for layer in decoder.step.layers for name in ("mix", "out", "fc1", "fc2")]
    assert made.weights == sum(weight.nbytes for weight in [*streamed, decoder.step.head[0]])
    assert made.weights > 0


@pytest.mark.parametrize("spectra", [None, 0])
@pytest.mark.parametrize("latency", ["bounded", "relaxed"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_scratch_of_a_run_holds_its_largest_chunk(latency: str, batch: int, spectra: int | None) -> None:
    """Of every run that a decoder serves: as many rows or fewer, as long or shorter, spectra kept or made."""
    gpu = pytest.importorskip("flash_inference.models.gpu")
    pricing = Pricing(target=2.0, points=4096.0)
    settings = {"near": 16, "latency": latency, "batch": batch, "pricing": pricing, "spectra_bytes": spectra}
    decoder = gpu.GpuDecoder(random_model(2, length=5000), 5000, **settings)
    assert all((decoder.least(size) == LEAST) == (size in decoder.plan.kept) for size in (16, 2048))
    for rows in range(1, batch + 1):
        for new in (5000, 3000, 2049, 1000):
            run, groups = decoder.init(1, new, rows), decoder.groups(new)
            cuts = [piece for piece in decoder.pieces(rows)] if latency == "relaxed" else []
            used = [scratch_numbers(size, len(piece) * rows) for size in decoder.ffts for piece in cuts]
            for n in range(16, new, 16) if latency == "bounded" else ():
                for size, tile, some in groups.after(n):
                    chunks = pricing.cut(size, tile, some, GRAPH, rows, decoder.least(size))
                    used += [scratch_numbers(size, len(chunk.channels) * rows) for chunk in chunks]
            assert max(used) <= run.scratch.numel()
    assert decoder.plan.workspace > 4 * decoder.init(1, 5000, batch).scratch.numel() > 0


def test_a_decoder_that_no_longer_serves_is_freed_before_the_next() -> None:
    gpu = pytest.importorskip("flash_inference.models.gpu")
    model = random_model(2, length=1000)
    kept = weakref.ref(gpu.gpu_decoder(model, 600))
    assert gpu.gpu_decoder(model, 500, prompt=300) is kept()
    assert gpu.gpu_decoder(model, 700).length == 700
    assert kept() is None


def test_weights_that_bfloat16_cannot_hold_are_not_copied() -> None:
    assert GpuShape.of(random_model(2)).copies == 0
    half = random_model(2, dtype=torch.float16)
    assert GpuShape.of(half).copies >= 4 * sum(p.numel() for p in half.parameters())


@pytest.mark.parametrize("length", [100, 513, 1024, 1025, 40_000, 1 << 16])
def test_sides_are_those_of_the_tiling(length: int) -> None:
    bounded, relaxed = (GpuRunShape(length, near=256, bounded=bounded).sides for bounded in (True, False))
    assert bounded == Groups(length, 256, GRAPH, 64).sizes
    used = {len(tile.sources) for n in range(16, length, 16) for tile in Relaxed(length).after(n - 1)}
    assert {side for side in used if side > 256} <= set(relaxed)


def test_a_plan_adds_up_and_says_how_it_decodes() -> None:
    made = plan_gpu(shapes_only(), max_new_tokens=1 << 15, free=80 * GIB, narrow=True)
    parts = made.state + made.filters + made.spectra + made.workspace + made.weights + made.graphs
    assert made.total == parts
    assert made.tiling == Staggered((1 << 15) - 1, near=NEAR, block=GRAPH)
    assert made.state == pytest.approx(4 * (1 << 15) * 4 * 256, rel=0.02)
    assert {layer.decodes for layer in made.layers} == {"tiles", "FIR ring"}


def test_relaxed_keeps_one_spectrum_a_side() -> None:
    model, new = shapes_only(), 1 << 15
    bounded, relaxed = (
        plan_gpu(model, max_new_tokens=new, tiling=tiling, free=80 * GIB, narrow=True)
        for tiling in (None, Prompted(Relaxed(new - 1), 1))
    )
    assert relaxed.tiling == Relaxed(new - 1)
    assert relaxed.spectra == pytest.approx(bounded.spectra, rel=0.02)  # a side more, and one spectrum for two
    with pytest.raises(TilingError, match="or on Relaxed"):
        plan_gpu(model, max_new_tokens=new, tiling=Blocked(new), free=80 * GIB, narrow=True)


def test_spectra_take_what_is_left() -> None:
    model = shapes_only(18, 768)
    plenty, little = (plan_gpu(model, max_new_tokens=1 << 17, free=free * GIB, narrow=True) for free in (79, 12))
    assert plenty.spectra > little.spectra > 0
    assert plenty.state == little.state
    assert little.total <= 12 * GIB
    assert plan_gpu(model, max_new_tokens=1 << 17, free=int(7.7 * GIB), narrow=True).spectra == 0


def test_a_run_of_a_million_positions_fits_one_card() -> None:
    """18 layers of width 768 keep 54 GiB of history, half of it in 16 bits."""
    model = shapes_only(18, 768, vocab=50_304)
    made = plan_gpu(model, max_new_tokens=1 << 20, free=78 * GIB, narrow=True)
    assert made.total <= 78 * GIB
    half = plan_gpu(model, max_new_tokens=1 << 20, free=78 * GIB, narrow=True, state_dtype=torch.bfloat16)
    assert half.state == pytest.approx(made.state / 2, rel=0.01)


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    model = shapes_only(36, 768)
    with pytest.raises(
        PlanError, match=r"2 x 1,048,576 positions need \d+\.\d\d GiB .* 78\.00 GiB are free on H"
    ) as caught:
        plan_gpu(model, max_new_tokens=1 << 20, batch=2, free=78 * GIB, device="H", narrow=True)
    words = str(caught.value).replace(",", "").split("Would fit: ")[1].split()
    shape, near = GpuShape.of(model, narrow=True), near_side("H", 2, 36 * 768)
    assert fitted(shape, GpuRunShape(int(words[0]), batch=2, near=near), 78 * GIB).total <= 78 * GIB
    with pytest.raises(PlanError):
        fitted(shape, GpuRunShape(int(words[0]) + 1, batch=2, near=near), 78 * GIB)
    assert int(words[3]) > int(words[0])
    fitted(shape, GpuRunShape(int(words[3]), batch=2, near=near, dtype=torch.bfloat16), 78 * GIB)


def test_where_nothing_fits_it_is_said() -> None:
    with pytest.raises(PlanError, match="No length fits"):
        plan_gpu(shapes_only(), max_new_tokens=100, free=1 << 20, narrow=True)


def test_a_plan_grows_with_everything() -> None:
    shape = GpuShape.of(shapes_only(18, 768), narrow=True)
    base = GpuRunShape(1 << 15)
    totals = [
        gpu_bytes(shape, run, 0).total
        for run in (base, GpuRunShape(1 << 16), GpuRunShape(1 << 16, batch=4), GpuRunShape(1 << 16, 30_000, batch=4))
    ]
    assert totals == sorted(set(totals))


def test_other_models_and_unknown_devices_are_named() -> None:
    with pytest.raises(ModelError, match="tells no GPU's free bytes"):
        plan_gpu(random_model(2), max_new_tokens=10)
    stu = LanguageModel(STUConfig(vocab_size=20, width=8, layers=1, length=64))
    with pytest.raises(ModelError, match="Hyena"):
        plan_gpu(stu, max_new_tokens=10, free=GIB)


@pytest.mark.parametrize(
    ("lives", "near"), [(1, 16), (17, 16), (18, 16), (100, 16), (257, 256), (258, 256), (8000, 256)]
)
def test_a_ring_holds_what_tiles_read_and_write(lives: int, near: int) -> None:
    """All that is read or written while a tile waits for a near-block, and a row's own life."""
    run = GpuRunShape(16_000, near=near, lives=lives)
    assert not run.ring % near
    assert run.ring >= lives + near * bool(run.top)
    for n in range(near, 4 * max(run.top, near), near):
        tiles = [tile for _, tile, _ in run.groups(None, 2048).after(n)]
        assert all(tile.targets.stop - tile.sources.start + near <= run.ring for tile in tiles)
        assert (run.top > 0) == bool(tiles)
