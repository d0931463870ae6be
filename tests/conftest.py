"""What holds for every test: fixed seeds, one hypothesis profile, no settings of the user's, nothing left behind."""

from __future__ import annotations

import os
import threading
import zlib

import pytest
from hypothesis import settings

# Tensors here are small, and threads that spin on busy cores slow such tests down a hundredfold: PyTorch's below,
# those of numpy's BLAS by what it reads when it is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

settings.register_profile("here", deadline=None, max_examples=25)
settings.register_profile("ci", parent=settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, as CI does")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.getoption("--slow") or "slow" in config.getoption("markexpr")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))
        if "slow" in item.keywords and not slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True, scope="session")
def _no_tuned_table(tmp_path_factory: pytest.TempPathFactory):
    """Implementations are chosen by the built-in table, not by one that `tune` left in the user's cache."""
    from flash_inference.ops.tile_conv import measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        measured.cache_clear()
        yield
        measured.cache_clear()


@pytest.fixture(autouse=True)
def _fixed_seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def nan_memory():
    """Fresh memory is NaN, so that what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert torch.empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """No test, and no code under test, changes a global setting of torch or leaves a thread of ours running."""
    before = _globals()
    yield
    assert _globals() == before
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("flash-inference")]


def _globals() -> dict[str, object]:
    return {
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
