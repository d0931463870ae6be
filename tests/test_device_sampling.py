"""Rows that choose their tokens on the device: each by its own settings, from noise that depends on nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flash_inference.engine.device_sampling import DeviceSampler, cuts
from flash_inference.engine.sampling import Sampler, Sampling
from flash_inference.ops.noise import exponential, stream

CPU = torch.device("cpu")
SETTINGS = (
    {},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.3, "top_k": 5, "seed": 2},
    {"temperature": 1.0, "top_p": 0.6, "seed": 3},
    {"temperature": 0.9, "min_p": 0.2, "seed": 4},
    {"temperature": 1.1, "allowed": (3, 4, 9, 20), "repetition_penalty": 1.7, "seed": 5},
    {"repetition_penalty": 2.0, "allowed": tuple(range(4, 12))},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 0.6, "seed": 6},
)
RANKED = [row for row, settings in enumerate(SETTINGS) if "top_k" in settings or "top_p" in settings]
V = 23


def splitmix(state: int, count: int) -> list[int]:
    """The generator as its authors define it, one number after the other, in Python's own integers."""
    numbers, most = [], 2**64
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % most
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % most
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % most
        numbers.append(z ^ (z >> 31))
    return numbers


def samplers() -> list[Sampler]:
    return [Sampler(Sampling(**settings), 1, V, seen=[torch.tensor([1, 5, 9])]) for settings in SETTINGS]  # type: ignore[arg-type]


def logits_of(step: int, rows: int = len(SETTINGS)) -> Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize(("drawn", "count"), [(0, 7), (3, 7), (2**40, 5)])
def test_noise_is_the_generators(seed: int, drawn: int, count: int) -> None:
    state = (seed + drawn * count * 0x9E3779B97F4A7C15) % 2**64
    wanted = [-math.log1p(-((number >> 11) + 0.5) / 2**53) for number in splitmix(state, count)]
    got = exponential(torch.tensor([seed]), torch.tensor([drawn]), count)[0]
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=2e-7, atol=0)


def test_known_numbers() -> None:
    """The first three outputs from state 1234567, as published for this generator."""
    assert splitmix(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_streams_of_neighbouring_seeds_share_no_numbers() -> None:
    """Rows are seeded the generator's own step apart: unmixed, their streams would be shifted copies."""
    seeds = [(7 + 0x9E3779B97F4A7C15 * b) % 2**63 for b in range(4)]
    noise = exponential(torch.tensor([stream(seed) for seed in seeds]), torch.zeros(4, dtype=torch.long), 2000)
    assert len(noise.flatten().unique()) > 0.999 * noise.numel()
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 5 / math.sqrt(2000)


def test_noise_is_exponential() -> None:
    """Kolmogorov and Smirnov's distance of 200,000 variates, below what chance exceeds once in 10^6."""
    n = 200_000
    e = exponential(torch.tensor([stream(3)]), torch.zeros(1, dtype=torch.long), n)[0].double().sort().values
    distance = (1 - (-e).exp() - torch.arange(1, n + 1) / n).abs().max() + 1 / n
    assert distance < math.sqrt(-math.log(1e-6 / 2) / (2 * n))


@pytest.mark.parametrize("ranked", [True, False])
def test_rows_have_the_laws_of_their_samplers(ranked: bool) -> None:
    """Frequencies of 30,000 draws a row, within 6 standard deviations of what a Sampler's law says."""
    logits, draws, n = logits_of(0), 300, 100
    for row, sampler in enumerate(samplers()):
        if not ranked and cuts(sampler.sampling):
            continue
        chooser = DeviceSampler(n, V, CPU)
        for other in range(n):
            chooser.settle(other, sampler, drawn=1000 * other)
        counts = torch.zeros(V, dtype=torch.double)
        for _ in range(draws):
            chooser._seen[:] = sampler.seen_by(0)
            counts += torch.bincount(chooser.draw(logits[row].expand(n, V), ranked), minlength=V)
        law = sampler.law(logits[row : row + 1])[0]
        total = n * draws
        assert not counts[law == 0].any()
        assert ((counts - total * law).abs() <= 6 * (total * law * (1 - law)).sqrt() + 1e-9).all()


def test_a_row_draws_the_same_beside_any_neighbours() -> None:
    together = DeviceSampler(len(SETTINGS), V, CPU)
    alone = [DeviceSampler(1, V, CPU) for _ in SETTINGS]
    for row, sampler in enumerate(samplers()):
        together.settle(row, sampler)
        alone[row].settle(0, sampler)
    for step in range(40):
        logits = logits_of(step)
        tokens = together.draw(logits)
        for row, chooser in enumerate(alone):
            assert chooser.draw(logits[row], ranked=row in RANKED) == tokens[row]


def test_greedy_rows_are_a_samplers() -> None:
    """Without a temperature a row takes what a Sampler on the host takes, penalties and all."""
    for settings in SETTINGS[::6]:
        host = Sampler(Sampling(**settings), 1, V, seen=[torch.tensor([1, 5, 9])])  # type: ignore[arg-type]
        chooser = DeviceSampler.of(host, V, CPU)
        for step in range(60):
            logits = logits_of(step, 1)
            assert chooser.draw(logits) == host(logits)


def test_a_row_that_is_settled_anew_forgets() -> None:
    first, second = samplers()[5], samplers()[1]
    chooser, fresh = DeviceSampler(1, V, CPU), DeviceSampler(1, V, CPU)
    chooser.settle(0, first)
    for step in range(20):
        chooser.draw(logits_of(step, 1))
    chooser.settle(0, second)
    fresh.settle(0, second)
    for step in range(30):
        assert chooser.draw(logits_of(step, 1)) == fresh.draw(logits_of(step, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_told_and_disturbs_nobody(value: float) -> None:
    chooser, other = (DeviceSampler(len(SETTINGS), V, CPU) for _ in range(2))
    for row, sampler in enumerate(samplers()):
        chooser.settle(row, sampler)
        other.settle(row, sampler)
    for step in range(5):
        logits = logits_of(step)
        wanted = other.draw(logits)
        logits[2, 7] = value
        got = chooser.draw(logits)
        assert got[2] == -2
        assert torch.equal(got[[0, 1, 3, 4, 5, 6, 7]], wanted[[0, 1, 3, 4, 5, 6, 7]])
