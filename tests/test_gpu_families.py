"""Every family by its own modules, as a GPU's graphs hold them.

Kernels run through Triton's interpreter. A tape records what the positions of a graph launch, and runs it again at
others, as a graph does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import interpreted  # noqa: F401

# isort: split

import flash_inference as fi
from family_models import FAMILIES, family_model
from flash_inference.engine.device_sampling import DeviceSampler
from flash_inference.engine.graphs import GpuLoop, decode_gpu
from flash_inference.engine.sampling import Sampler, Sampling
from flash_inference.errors import ModelError, NumericsError
from flash_inference.mixers import Attention, AttentionConfig, Rotary
from flash_inference.mixers.mixer import Moment
from flash_inference.models import gpu, gpu_modules
from flash_inference.models.gpu import GRAPH, GpuDecoder, positions
from flash_inference.models.gpu_modules import ModuleStep
from flash_inference.ops.tile_conv.triton import mix_rows
from flash_inference.testing import greedy_differences
from flash_inference.testing.ties import FACTOR
from flash_inference.tiling import Blocked, Relaxed

EPS = torch.finfo(torch.float32).eps
NAN = float("nan")
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("nan_memory")


# ------------------------------------------------------------------------------------------------------------ the tape

aten = torch.ops.aten
ASKS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.unique_dim,
    aten._unique2, aten.lift_fresh, aten.lift_fresh_copy,
}  # fmt: skip
"""What a graph cannot hold: the host would wait for a value, or hand one over (`torch.tensor`)."""


class Tape(TorchDispatchMode):
    """Records operations on fixed memory while they run; `replay` runs them again, and none of the Python around them.

    An operation that returns new memory writes there again. Asking the device for a value is an error, as is Python's
    own use of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in ASKS:
            raise AssertionError(f"{func} cannot be captured")
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            assert all(t is None or t.dtype != torch.bool for t in args[1]), "a mask as an index asks for its count"
        return self.note(func, *args, **(kwargs or {}))

    def note(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs it now, and at every replay."""
        with _disable_current_modes():
            out = func(*args, **kwargs)
        self.launches.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        """Runs all launches again, each on the memory that it was recorded with."""
        for func, args, kwargs, out in self.launches:
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            fresh = [t.untyped_storage().data_ptr() not in given for t in made]
            if made and not any(fresh) and isinstance(func, torch._ops.OpOverload) and not func._schema.is_mutable:
                continue
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for new, old, own in zip(again, made, fresh, strict=True):
                if own:
                    old.copy_(new)


@pytest.fixture
def tape_kernels(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Kernels are noted on the tape that stands last in this list, like any operation."""
    tapes: list[Tape] = []
    for module, name in ((gpu_modules, "mix_rows"), (gpu_modules, "log_tokens")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, kernel=kernel: tapes[-1].note(kernel, *args))
    return tapes


class TapedLoop(GpuLoop):
    """A loop that runs Python for its first graph, and replays that for the others."""

    tapes: list[Tape]
    recorded: Tape | None = None

    def launch(self) -> None:
        n = self.launched * GRAPH
        self._boundary(n)
        if self.recorded is not None:
            self.recorded.replay()
        else:
            self.recorded = Tape()
            self.tapes.append(self.recorded)
            with self.recorded:
                positions(self.decoder, self.step, self.run, self.draw)
        self._behind(n + GRAPH)
        self.launched += 1


def test_the_tape_runs_again_what_was_launched() -> None:
    tape, x, out = Tape(), torch.arange(4.0), torch.zeros(2)
    with tape:
        out.copy_((2 * x).view(2, 2).sum(1))
    x += 1
    tape.replay()
    assert out.tolist() == [6, 14]


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 1],
        lambda x: torch.zeros(4)[: x.long()[1]],
        lambda x: x * torch.tensor([1.0, 2.0]),
    ],
    ids=["item", "branch", "mask", "slice", "constant"],
)
def test_the_tape_refuses_what_a_graph_cannot_hold(ask: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError), Tape():
        ask(torch.arange(2.0))


def test_the_tape_shows_a_clock_that_python_keeps() -> None:
    """The same steps with the host's clock are right when they run, and wrong when they are replayed."""
    attention = Attention(AttentionConfig(4, 2, rotary=Rotary()))
    x = torch.randn(1, 6, 4)
    exact = attention(x)
    for clock, leaks in ((torch.zeros(1, dtype=torch.long), False), (0, True)):
        past, tape, given = attention.init(1, 8), Tape(), x[:, :1].clone()
        with tape:
            z = attention.extend(past, given, Moment(clock))
        assert torch.allclose(z, exact[:, :1], atol=1e-6)
        for t in range(1, 6):
            if isinstance(clock, Tensor):
                clock += 1
            given.copy_(x[:, t : t + 1])
            tape.replay()
        assert torch.allclose(z, exact[:, 5:], atol=1e-6) != leaks


# ----------------------------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("width", "batch", "offset"), [(1, 1, 0), (70, 1, 15), (7, 3, 1), (33, 5, 9)])
def test_a_row_is_its_direct_sum(width: int, batch: int, offset: int, dtype: torch.dtype) -> None:
    """Rows of the block that are not known yet, and other channels, are NaN and stay so."""
    channels, lane, at, block = width + 5, 3, 4, 16
    history = torch.full((at + block + 2, channels * batch), NAN, dtype=dtype)
    near, diagonal = torch.full((block + 2, channels), NAN), torch.full((channels,), NAN)
    mine = history.unflatten(1, (channels, batch))[at : at + block, lane : lane + width]
    mine[: offset + 1] = torch.randn(offset + 1, width, batch).to(dtype)
    near[1 : offset + 1, lane : lane + width] = torch.randn(offset, width)
    diagonal[lane : lane + width] = torch.randn(width)
    y, whole = torch.randn(batch, width).to(dtype), history.clone()
    earlier, partial_sum = mine[:offset].double(), mine[offset].double()
    z = mix_rows(history, near, diagonal, y, torch.tensor([at, 99]), offset, lane, block)
    rho = near[1 : offset + 1, lane : lane + width].flip(0).double()
    own = diagonal[lane : lane + width, None].double() * y.T.double()
    exact = partial_sum + (earlier * rho[..., None]).sum(0) + own
    size = partial_sum.abs() + (earlier * rho[..., None]).abs().sum(0) + own.abs()
    # One rounding a product and an addition each, and one to the dtype of y.
    bound = (offset + 3) * EPS * size + torch.finfo(dtype).eps * exact.abs()
    assert ((z.T.double() - exact).abs() <= bound).all()
    assert torch.equal(mine[offset], y.T)
    mine[offset] = whole.unflatten(1, (channels, batch))[at + offset, lane : lane + width]
    assert torch.equal(history.nan_to_num(77.0), whole.nan_to_num(77.0))


# -------------------------------------------------------------------------------------------------------- the families


def prompt_of(length: int) -> Tensor:
    return (11 * torch.arange(length) + 7) % 29


def exact_model(model: fi.LanguageModel) -> fi.LanguageModel:
    twin = fi.LanguageModel(model.config).double().eval().requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    return twin


def check_greedy(model: fi.LanguageModel, prompt: Tensor, tokens: Tensor, distinct: int = 3) -> None:
    differences, _ = greedy_differences(model, prompt[None], tokens[None])
    assert not differences
    assert len(tokens.unique()) >= distinct


def check_tokens(model: fi.LanguageModel, prompt: Tensor, tokens: Tensor) -> None:
    """The full recompute's, and those of the CPU's own decode; two ways to sum may part at a tie."""
    check_greedy(model, prompt, tokens)
    host = fi.generate(model, prompt, max_new_tokens=len(tokens))[0]
    if not torch.equal(host, tokens):
        check_greedy(model, prompt, host)


def check_logits(model: fi.LanguageModel, sequence: Tensor, logits: Tensor) -> None:
    """The last position's [V] are as near the float64 forward's as a tie's gap."""
    exact = exact_model(model)(sequence[None])[0]
    bound = FACTOR * (model(sequence[None])[0].double() - exact).abs().max()
    assert (logits.double() - exact[-1]).abs().max() <= bound


def taped(tapes: list[Tape], decoder: GpuDecoder, prompt: Tensor | list[Tensor], new: int) -> TapedLoop:
    tapes.append(Tape())
    loop = TapedLoop(decoder, prompt, new)
    loop.tapes = tapes
    return loop


ALIKE = ("multi-hyena-modal", "sgconv", "stu-exact")
"""What runs as another family does, and differs in its filters alone."""


@torch.no_grad()
@pytest.mark.parametrize(
    "family", [name if name == "striped-hyena" else pytest.param(name, marks=slow) for name in FAMILIES]
)
def test_a_graph_replayed_at_other_positions_gives_the_cpus_tokens(family: str, tape_kernels: list[Tape]) -> None:
    """Five graphs behind a prompt that ends inside one: one recorded, squares, tiles by FFT of two sizes."""
    model, prompt, new = family_model(family), prompt_of(21), 81
    decoder = GpuDecoder(model, 101, near=16)
    assert isinstance(decoder.step, ModuleStep)
    loop = taped(tape_kernels, decoder, prompt, new)
    tokens = torch.tensor(list(loop))
    assert loop.launched == 5
    assert loop.recorded is not None
    check_tokens(model, prompt, tokens)
    check_logits(model, torch.cat([prompt, tokens[:-1]]), loop.step.logits[0])


@torch.no_grad()
@pytest.mark.parametrize("family", [pytest.param(name, marks=slow) if name in ALIKE else name for name in FAMILIES])
def test_rows_of_any_length_on_one_clock_give_the_cpus_tokens(family: str, tape_kernels: list[Tape]) -> None:
    """One of them twice, which is read once."""
    model, new = family_model(family), 49
    prompts = [prompt_of(n) for n in (40, 1, 3, 3)]
    loop = taped(tape_kernels, GpuDecoder(model, 88, near=16, batch=4), prompts, new)
    rows = torch.stack([torch.from_numpy(tokens.copy()) for tokens in loop], dim=1)
    for row, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True)):
        if row < 3:
            check_tokens(model, prompt, tokens)
        check_logits(model, torch.cat([prompt, tokens[:-1]]), loop.step.logits[row])
    assert torch.equal(rows[2], rows[3])


@torch.no_grad()
@pytest.mark.parametrize("family", ["s4d", *(pytest.param(name, marks=slow) for name in ("stu", "tnn", "h3-conv"))])
@pytest.mark.parametrize("latency", ["bounded", "relaxed"])
def test_python_run_at_every_position_gives_the_same(family: str, latency: str) -> None:
    model, prompt = family_model(family), prompt_of(5)
    decoder = GpuDecoder(model, 60, near=16, latency=latency)
    tokens = torch.tensor(list(GpuLoop(decoder, prompt, 49)))
    check_tokens(model, prompt, tokens)
    tiling = Blocked(60) if not decoder.channels else None if latency == "bounded" else Relaxed(60)
    chosen = decode_gpu(decoder, prompt[None], lambda logits: logits.argmax(-1), 49, tiling)
    assert torch.equal(torch.cat(list(chosen)), tokens)


@torch.no_grad()
def test_prompts_without_long_convolutions_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = family_model("striped-hyena"), prompt_of(37)
    decoder = GpuDecoder(model, 60)
    whole = decoder.prefill(decoder.init(37, 1), prompt)
    monkeypatch.setattr(gpu, "PIECE", 8)
    run = decoder.init(37, 1)
    check_logits(model, prompt, decoder.prefill(run, prompt))
    check_logits(model, prompt, whole)


@torch.no_grad()
@pytest.mark.parametrize("family", ["h3-conv", "striped-hyena"])
def test_half_models_run_in_their_own_dtype(family: str) -> None:
    """Logits are as near the float64 forward of the same numbers as the model's own forward is."""
    model, tokens = family_model(family).bfloat16(), prompt_of(28)
    exact, own = exact_model(model)(tokens[None])[0], model(tokens[None])[0].double()
    loop = GpuLoop(GpuDecoder(model, 40, near=16), tokens[None, :10], 19)
    assert loop.step.x.dtype == torch.bfloat16
    got = torch.cat([loop.logits, *(loop.advance(tokens[i : i + 1]).clone() for i in range(10, 28))])
    assert (got - exact[9:]).abs().max() <= FACTOR * (own - exact).abs().max()


@torch.no_grad()
def test_draws_happen_where_the_logits_are(tape_kernels: list[Tape]) -> None:
    model, prompt = family_model("s4d"), prompt_of(4)
    decoder = GpuDecoder(model, 60)

    def drawn(**settings: Any) -> list[int]:
        sampler = DeviceSampler.of(Sampler(Sampling(**settings), 1, 29, seen=prompt[None]), 29, torch.device("cpu"))
        return list(GpuLoop(decoder, prompt, 49, draw=sampler.draw))

    tape_kernels.append(Tape())
    greedy = list(GpuLoop(decoder, prompt, 49))
    assert drawn(temperature=0.7, top_k=1, seed=1) == greedy
    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1) != greedy


def test_logits_that_stop_being_finite() -> None:
    model, prompt = family_model("s4d"), prompt_of(4)
    tokens = list(GpuLoop(GpuDecoder(model, 40), prompt, 20))
    at = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and token not in prompt and i > 0)
    model.embedding.weight[tokens[at]] = NAN
    loop, got = GpuLoop(GpuDecoder(model, 40), prompt, 20), []
    with pytest.raises(NumericsError, match=f"row 0 behind position {at} after the prompt are not finite"):  # noqa: PT012
        for token in loop:
            got.append(token)
    assert got == tokens[: at + 1]


def test_a_decoder_is_kept_while_it_serves() -> None:
    model = family_model("s4d")
    kept = gpu.gpu_decoder(model, 30)
    assert gpu.gpu_decoder(model, 20) is kept
    model.head.weight[0, 0] += 1
    assert gpu.gpu_decoder(model, 20) is not kept


def test_a_mixer_that_cannot_be_captured_is_named() -> None:
    model = family_model("s4d")
    model.blocks[1].mixer.long.replays = False
    with pytest.raises(ModelError, match=r"no graph can hold this model: block 1 has a ModalConv"):
        gpu.gpu_decoder(model, 30)
