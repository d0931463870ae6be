"""What the compiler makes of the step's kernels for an H100, read without one: no GPU is needed to compile.

A step is as fast as the little that each kernel does behind its wait, and that is easily lost without a wrong number:
by registers that spill, by a vector that is loaded anew for every row, by sums that wait at barriers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from flash_inference.ops.tile_conv.factors import Factor

FOUND = find_spec("triton")  # not imported: other tests want its interpreter, which is chosen at the import
pytestmark = [pytest.mark.slow, pytest.mark.skipif(FOUND is None, reason="needs Triton")]

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flash_inference.ops.decode_step import triton as one, triton_batch as many, triton_few as few
from flash_inference.ops.tile_conv import triton as tile, triton_circle as circle
from flash_inference.ops.tile_conv.factors import Factor
from triton.experimental.gluon._runtime import GluonASTSource

D, TYPES = 768, {"w": "*bf16", "clock": "*i64", "best_at": "*i32", "eps": "fp32"}
NUMBERS = ("offset", "lane", "C", "N", "V", "D", "source", "target", "S", "T", "taps", "start", "n", "position")
NUMBERS += ("first", "count", "wide", "sequences", "sources", "before", "ring", "R", "column", "size", "width")
NUMBERS += ("batch", "begin", "targets", "behind")
shapes, some = one.Shapes.fit(D, 4 * D), few.FewShapes.fit(D, 4 * D)

def made(kernel, warps, source_of=ASTSource, **constants):
    kinds = {
        name: "constexpr" if name in constants else TYPES.get(name, "i32" if name in NUMBERS else "*fp32")
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(kinds.items()) if kind[0] == "*" or name in ("N", "D", "C")
    }
    source = source_of(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps} | ({"launch_pdl": True} if "PDL" in constants else {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with open(sys.argv[1] + "/" + str(len(found)) + ".cubin", "wb") as file:
        file.write(compiled.asm["cubin"])
    found.append({"ptx": compiled.asm["ptx"]})

found = []
def cut(shape):
    return {"warps": shape[1], "ROWS": shape[0], "WARPS": shape[1], "PDL": True}

made(one.project_and_mix, D=D, ORDER=2, TAPS=3, BLOCK=16, **cut(shapes.mix))
made(one.add_product, N=D, **cut(shapes.out))
made(one.norm_expand, D=D, **cut(shapes.fc1))
made(one.add_product, N=4 * D, **cut(shapes.fc2))
made(one.head, D=D, **cut(shapes.head))
both = {"B": 3, "BATCH": 4, "D": D}
made(few.project_and_mix, ORDER=2, TAPS=3, BLOCK=16, **both, **cut(some.mix))
made(few.norm_expand, N=4 * D, **both, **cut(some.fc1))
made(few.head, **both, **cut(some.head))
for batch, bytes_each in ((8, 2), (32, 2), (8, 4)):
    TYPES["w"] = "*bf16" if bytes_each == 2 else "*fp32"
    tiles = many.BatchShapes.fit(batch, D, bytes_each)
    extra = {"SHARE": 16, "PROGRAMS": 64}
    def batched(kernel, shape, **constants):
        fixed = {"B": batch, "D": D, "BATCH": shape.batch, "ROWS": shape.rows, "WARPS": shape.warps, "PDL": True}
        made(kernel, shape.warps, **fixed, **constants)
    batched(many.project_and_mix, tiles.mix, ORDER=2, GROUPS=4, TAPS=3, BLOCK=16, **extra)
    batched(many.add_product, tiles.out, N=D, WHICH=1)
    batched(many.norm_expand, tiles.fc1, N=4 * D, **extra)
    batched(many.add_product, tiles.fc2, N=4 * D, WHICH=0)
    batched(many.head, tiles.head, **extra)
outs, ins, lanes = tile.shape_for(64)
made(tile._tile_rows, lanes // 32, OUTS=outs, INS=ins, LANES=lanes, TURNS=4, BATCH=1)
for size in (64, 128, 256):
    launch = dict(Factor(size).launch)
    def turning(kernel, **constants):
        made(kernel, launch["num_warps"], GluonASTSource, **{k: launch[k] for k in "ETL"}, **constants)
    turning(circle.across, WHOLE=True, MORE=False)
    turning(circle.across, WHOLE=False, MORE=False)
    turning(circle.inward, MORE=False)
    turning(circle.outward, MORE=False)
json.dump(found, sys.stdout)
"""
VECTORS = ("mix", "out", "fc1", "fc2", "head", "few mix", "few fc1", "few head")
KERNELS = ("mix", "out", "fc1", "fc2", "head")
BATCHES = tuple(f"{rows} {kernel}" for rows in ("eight", "many") for kernel in KERNELS)
WIDE = tuple(f"wide {kernel}" for kernel in KERNELS)
SIZES, PASSES = (64, 128, 256), ("whole", "across", "inward", "outward")
TILES = ("tile", *(f"{name} {size}" for size in SIZES for name in PASSES))
VECTOR = {"mix": 6, "out": 6, "fc1": 6, "fc2": 24, "head": 6, "few mix": 18, "few fc1": 18, "few head": 18}
"""Loads of 16 bytes that one warp needs for its vectors of 768 or 3,072, divided among the warps below."""
WARPS = {"out": 4, "fc2": 2}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("cubins")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    # Triton reads the source of what it compiles, so that must be a file.
    script = folder / "compile.py"
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert FOUND
    assert FOUND.origin
    tools = Path(FOUND.origin).parent / "backends/nvidia/bin"
    for number, kernel in enumerate(found):
        usage = [str(tools / "cuobjdump"), "-res-usage", str(folder / f"{number}.cubin")]
        shown = subprocess.run(usage, capture_output=True, text=True, check=False)
        kernel["usage"] = shown.stdout + shown.stderr
    return dict(zip((*VECTORS, *BATCHES, *WIDE, *TILES), found, strict=True))


@pytest.mark.parametrize("name", VECTORS + BATCHES + WIDE)
def test_a_kernel_spills_nothing(kernels: dict[str, dict[str, str]], name: str) -> None:
    found = re.search(r"STACK:(\d+)", kernels[name]["usage"])
    assert found
    assert int(found[1]) == 0


@pytest.mark.parametrize("name", VECTORS)
def test_a_kernel_loads_its_vector_once(kernels: dict[str, dict[str, str]], name: str) -> None:
    kernel = kernels[name]
    before, behind = kernel["ptx"].split("griddepcontrol.wait", 1)
    loads = len(re.findall(r"ld\.global\S*\.v4", behind))
    extra = 1 if name in ("out", "fc2") else 0  # the residual of the program's own rows
    assert loads <= VECTOR[name] / WARPS.get(name, 1) + 0.5 + extra
    assert "evict_first" in before
    if name not in WARPS:
        assert "bar.sync" not in kernel["ptx"]


@pytest.mark.parametrize("name", BATCHES)
def test_operands_go_straight_to_the_tensor_cores(kernels: dict[str, dict[str, str]], name: str) -> None:
    """From 16 bytes of memory a lane to products, without another lane or shared memory in between."""
    before, behind = kernels[name]["ptx"].split("griddepcontrol.wait", 1)
    assert "ld.global.v4" in before
    lines = behind.splitlines()
    products = [number for number, line in enumerate(lines) if "mma.sync" in line]
    between = "\n".join(lines[products[0] : products[-1]])
    assert not re.search(r"shfl|\.shared|bar\.sync", between)


@pytest.mark.parametrize(("name", "rows", "inputs", "warps"), [("eight fc1", 16, 768, 4), ("many out", 32, 768, 4)])
def test_products_are_three_a_term(
    kernels: dict[str, dict[str, str]], name: str, rows: int, inputs: int, warps: int
) -> None:
    """16 x 8 x 16 a time, one for each part of the activations."""
    assert len(re.findall(r"mma\.sync", kernels[name]["ptx"])) == rows // 16 * (inputs // warps // 16) * 3


def test_what_tiles_move_leaves_the_cache_first(kernels: dict[str, dict[str, str]]) -> None:
    """Else the weights that a step finds in the cache would never come back. The clock may stay."""

    def counted(name: str, what: str) -> tuple[int, int]:
        found = re.findall(rf"{what}\.global\S*", kernels[name]["ptx"])
        first = sum("evict_first" in one for one in found)
        return first, len(found) - first

    loads, others = counted("tile", "ld")
    assert loads > 0
    assert others == 1  # the clock
    assert counted("tile", "st")[1] == 0
    for size in SIZES:
        # The tables of turns, and when sequences began, are small and serve all: they may stay.
        for name in PASSES:
            assert counted(f"{name} {size}", "st")[1] == 0 < counted(f"{name} {size}", "st")[0]
        # A lane's share of sources, targets, and both parts of spectra: each is loaded once.
        share = size * Factor(size).channels // (32 * Factor(size).launch["num_warps"])
        assert counted(f"whole {size}", "ld")[0] == 4 * share


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PASSES)
def test_numbers_and_rows_change_places_in_one_pass(kernels: dict[str, dict[str, str]], name: str, size: int) -> None:
    """Real and imaginary parts pass through shared memory once an exchange: a barrier before each reads or writes it.

    All other arithmetic is between a lane's own numbers. A factor of 256 in scratch spills 8 bytes, since 512 threads
    may have no more registers: fewer threads, which spill nothing, were slower.
    """
    kernel = kernels[f"{name} {size}"]
    exchanges = 2 * (2 if name in ("whole", "across") else 1)
    assert len(re.findall(r"bar\.sync", kernel["ptx"])) == 2 * exchanges - 1
    assert "shfl" not in kernel["ptx"]
    found = re.search(r"STACK:(\d+)", kernel["usage"])
    assert found
    assert int(found[1]) <= (8 if (name, size) == ("across", 256) else 0)
