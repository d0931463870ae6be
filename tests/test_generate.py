"""generate and stream, as users call them."""

from __future__ import annotations

import dataclasses
import gc
import threading

import pytest
import torch
from torch import Tensor

from flash_inference import Generation, LanguageModel, PromptLookup, generate, stream
from flash_inference.engine.decode import decode
from flash_inference.engine.generate import stream_steps
from flash_inference.errors import SettingError
from flash_inference.testing import greedy_differences, random_model

EXACT = 1e-10
N = 40


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model(3, dtype=torch.float64, length=200, vocab_size=256)


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(256, (2, 17))


def with_config(model: LanguageModel, **changes: object) -> LanguageModel:
    twin = LanguageModel(dataclasses.replace(model.config, **changes)).double().eval().requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    return twin


SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 3},
    "filtered": {"temperature": 1.3, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    "samples": {"temperature": 1.0, "seed": 5, "n": 3},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


@every_setting
def test_stream_is_generate(model: LanguageModel, prompt: Tensor, settings: dict) -> None:
    tokens = generate(model, prompt, max_new_tokens=N, **settings)
    columns = list(stream(model, prompt, max_new_tokens=N, **settings))
    assert tokens.shape == (2 * settings.get("n", 1), N)
    assert torch.equal(torch.stack(columns, dim=1), tokens)


@every_setting
def test_stream_is_generate_where_rows_stop(model: LanguageModel, prompt: Tensor, settings: dict) -> None:
    free = generate(model, prompt, max_new_tokens=N, **settings)
    stops = [int(free[0, 9]), int(free[1, 20])]
    tokens = generate(model, prompt, max_new_tokens=N, stop_tokens=stops, **settings)
    columns = list(stream(model, prompt, max_new_tokens=N, stop_tokens=stops, **settings))
    assert torch.equal(torch.stack(columns, dim=1), tokens)


def ended(free: Tensor, stops: list[int], pad: int) -> Tensor:
    """What stopping at `stops` makes of tokens [B, N] that ran freely."""
    rows = []
    for row in free.tolist():
        last = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
        rows.append(row[: last + 1])
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


@pytest.mark.parametrize("pad", [0, 77])
def test_stop_tokens(model: LanguageModel, prompt: Tensor, pad: int) -> None:
    model = with_config(model, pad_token=pad)
    free = generate(model, prompt, max_new_tokens=N)
    for stops in ([int(free[0, 5])], [int(free[0, 5]), int(free[1, 11])], [int(free[0, 0]), int(free[1, 0])]):
        got = generate(model, prompt, max_new_tokens=N, stop_tokens=stops)
        assert torch.equal(got, ended(free, stops, pad))


def test_the_models_own_stop_tokens(model: LanguageModel, prompt: Tensor) -> None:
    free = generate(model, prompt, max_new_tokens=N)
    stops = [int(free[0, 5]), int(free[1, 11])]
    own = with_config(model, stop_tokens=tuple(stops))
    assert torch.equal(generate(own, prompt, max_new_tokens=N), ended(free, stops, 0))
    assert torch.equal(generate(own, prompt, max_new_tokens=N, stop_tokens=()), free)
    other = [int(free[0, 7])]
    assert torch.equal(generate(own, prompt, max_new_tokens=N, stop_tokens=other), ended(free, other, 0))


def test_rows_that_have_ended_do_not_disturb_the_others(model: LanguageModel, prompt: Tensor) -> None:
    free = generate(model, prompt, max_new_tokens=N)
    stop = next(int(t) for t in free[0] if t not in free[1])
    got = generate(model, prompt, max_new_tokens=N, stop_tokens=[stop])
    assert torch.equal(got[1], free[1])


class Text:
    """A prompt and the bytes that a model makes of it, found so that the text is plain."""

    def __init__(self, model: LanguageModel) -> None:
        letters = list(range(97, 123))
        self.settings = {"max_new_tokens": N, "allowed": letters, "temperature": 1.0, "seed": 11}
        self.prompt = "once"
        self.text = model.tokens.decode(generate(model, self.prompt, **self.settings)[0].tolist())


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("several", [True, False], ids=["list", "one"])
def test_stop_strings(model: LanguageModel, length: int, several: bool) -> None:
    """A string that is spread over tokens stops the row at the token that completes it."""
    made = Text(model)
    string = made.text[12 : 12 + length]
    end = made.text.index(string) + length
    stop = ["NEVER", string] if several else string
    tokens = generate(model, made.prompt, stop=stop, **made.settings)
    assert model.tokens.decode(tokens[0].tolist()) == made.text[:end]
    streamed = [int(t) for t in stream(model, made.prompt, stop=stop, **made.settings)]
    assert streamed == tokens[0].tolist()


def test_a_stop_string_in_the_prompt_does_not_stop(model: LanguageModel) -> None:
    made = Text(model)
    string = "ce" + made.text[:1]
    assert string not in made.text
    tokens = generate(model, made.prompt, stop=string, **made.settings)
    assert tokens.shape[1] == N


def test_stop_strings_of_several_bytes_a_character(model: LanguageModel) -> None:
    """é is two tokens: the row stops after the second."""
    settings = {"max_new_tokens": 3, "seed": 1, "temperature": 1.0}
    first = generate(model, "x", allowed=[0xC3], stop="é", **settings)
    assert first.tolist() == [[0xC3] * 3]
    both = generate(model, "x", allowed=[0xC3, 0xA9], stop="é", max_new_tokens=N, seed=1, temperature=3.0)
    raw = bytes(both[0].tolist())
    assert raw.endswith("é".encode())
    assert "é" not in raw[:-1].decode(errors="replace")


def test_prompts_of_every_kind(model: LanguageModel) -> None:
    start = model.config.start_token
    ids = [start, *b"once"]
    expected = generate(model, torch.tensor([ids]), max_new_tokens=N)
    same = [ids, [ids], "once", ["once"], torch.tensor(ids), [torch.tensor(ids)], tuple(ids)]
    for prompt in same:
        assert torch.equal(generate(model, prompt, max_new_tokens=N), expected), prompt


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_prompts_of_any_integers_are_remembered_by_the_penalty(model: LanguageModel, dtype: torch.dtype) -> None:
    prompt = torch.randint(128, (2, 20))
    settings = {"max_new_tokens": N, "repetition_penalty": 1.5}
    expected = generate(model, prompt, **settings)
    assert torch.equal(generate(model, prompt.to(dtype), **settings), expected)


def test_empty_prompts_begin_with_the_start_token(model: LanguageModel) -> None:
    model = with_config(model, start_token=9)
    expected = generate(model, [[9]], max_new_tokens=N)
    for prompt in (None, "", [[]], [], torch.zeros(1, 0, dtype=torch.long), [""]):
        assert torch.equal(generate(model, prompt, max_new_tokens=N), expected)
    assert generate(model, [[], []], max_new_tokens=N).shape == (2, N)


@every_setting
def test_ragged_rows(model: LanguageModel, settings: dict) -> None:
    rows = [list(b"a longer prompt"), [], [5], list(b"another")]
    together = generate(model, rows, max_new_tokens=N, **settings)
    n = settings.get("n", 1)
    assert together.shape == (4 * n, N)
    if "seed" not in settings:
        for i, row in enumerate(rows):
            assert torch.equal(together[i : i + 1], generate(model, [row], max_new_tokens=N))
    others = [list(b"xyz"), *rows[1:]]
    assert torch.equal(generate(model, others, max_new_tokens=N, **settings)[n:], together[n:])


def test_ragged_rows_are_filled_to_the_longest(model: LanguageModel) -> None:
    model = with_config(model, pad_token=3)
    rows = [list(b"a longer prompt"), list(b"b")]
    free = generate(model, rows, max_new_tokens=N)
    stop = [int(free[0, 4])]
    got = generate(model, rows, max_new_tokens=N, stop_tokens=stop)
    assert torch.equal(got, ended(free, stop, 3))


@pytest.mark.parametrize("settings", [SETTINGS["sampled"], SETTINGS["filtered"], SETTINGS["samples"]])
def test_seeds_reproduce_and_do_not_see_neighbours(model: LanguageModel, prompt: Tensor, settings: dict) -> None:
    n = settings.get("n", 1)
    first = generate(model, prompt, max_new_tokens=N, **settings)
    assert torch.equal(generate(model, prompt, max_new_tokens=N, **settings), first)
    other = generate(model, prompt, max_new_tokens=N, **{**settings, "seed": 99})
    assert not torch.equal(other, first)
    changed = torch.cat([torch.randint(256, (1, 17)), prompt[1:]])
    assert torch.equal(generate(model, changed, max_new_tokens=N, **settings)[n:], first[n:])
    assert torch.equal(generate(model, prompt[:1], max_new_tokens=N, **settings), first[:n])
    assert torch.equal(generate(model, prompt[:1].expand(3, -1), max_new_tokens=N, **settings)[:n], first[:n])


def test_samples_differ_and_no_seed_is_no_seed(model: LanguageModel, prompt: Tensor) -> None:
    samples = generate(model, prompt[:1], max_new_tokens=N, temperature=1.0, seed=1, n=4)
    assert len({tuple(row) for row in samples.tolist()}) == 4
    one, two = (generate(model, prompt, max_new_tokens=N, temperature=1.0) for _ in range(2))
    assert not torch.equal(one, two)


@every_setting
def test_logprobs_are_those_of_the_full_forward(model: LanguageModel, prompt: Tensor, settings: dict) -> None:
    got = generate(model, prompt, max_new_tokens=N, logprobs=True, **settings)
    assert isinstance(got, Generation)
    rows = prompt.repeat_interleave(settings.get("n", 1), dim=0)
    full = model(torch.cat([rows, got.tokens], dim=1)[:, :-1])[:, 16:].log_softmax(-1)
    exact = full.gather(-1, got.tokens[..., None])[..., 0]
    assert (got.logprobs - exact).abs().max() <= EXACT
    assert torch.equal(got.tokens, generate(model, prompt, max_new_tokens=N, **settings))
    steps = list(stream_steps(model, prompt, max_new_tokens=N, logprobs=True, **settings))
    assert torch.equal(torch.stack([step.logprobs for step in steps], dim=1), got.logprobs)


def test_logprobs_of_rows_that_have_ended(model: LanguageModel, prompt: Tensor) -> None:
    free = generate(model, prompt, max_new_tokens=N, logprobs=True)
    stop = [int(free.tokens[0, 5])]
    got = generate(model, prompt, max_new_tokens=N, logprobs=True, stop_tokens=stop)
    tokens = ended(free.tokens, stop, 0)
    for row, own in enumerate(free.tokens.tolist()):
        length = next((i + 1 for i, token in enumerate(own) if token in stop), tokens.shape[1])
        assert torch.equal(got.logprobs[row, :length], free.logprobs[row, :length])
        assert not got.logprobs[row, length:].any()


def test_greedy_within_allowed(model: LanguageModel, prompt: Tensor) -> None:
    allowed = [3, 50, 51, 120, 200, 201]
    tokens = generate(model, prompt, max_new_tokens=N, allowed=allowed)
    logits = model(torch.cat([prompt, tokens], dim=1)[:, :-1])[:, 16:]
    best = torch.tensor(allowed)[logits[..., allowed].argmax(-1)]
    assert torch.equal(tokens, best)


def test_greedy_with_a_penalty(model: LanguageModel, prompt: Tensor) -> None:
    tokens = generate(model, prompt, max_new_tokens=N, repetition_penalty=1.7)
    sequence = torch.cat([prompt, tokens], dim=1)
    logits = model(sequence[:, :-1])[:, 16:]
    for b in range(2):
        for t in range(N):
            row = logits[b, t].clone()
            for token in set(sequence[b, : 17 + t].tolist()):
                row[token] = row[token] / 1.7 if row[token] > 0 else row[token] * 1.7
            assert int(row.argmax()) == int(tokens[b, t])


# --------------------------------------------------------------------------------------------------- modes and threads


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["requires-grad", "frozen"])
def test_gradient_modes(prompt: Tensor, mode: type, training: bool) -> None:
    model = random_model(3, length=200, vocab_size=256).requires_grad_(training)
    expected = generate(random_model(3, length=200, vocab_size=256), prompt, max_new_tokens=N, logprobs=True)
    with mode():
        inside = generate(model, prompt, max_new_tokens=N, logprobs=True)
        streamed = torch.stack(list(stream(model, prompt, max_new_tokens=N)), dim=1)
    after = generate(model, prompt, max_new_tokens=N, logprobs=True)
    for got in (inside, after):
        assert torch.equal(got.tokens, expected.tokens)
        assert torch.equal(got.logprobs, expected.logprobs)
        assert not got.logprobs.requires_grad
    assert torch.equal(streamed, expected.tokens)


def test_a_stream_crosses_gradient_modes(model: LanguageModel, prompt: Tensor) -> None:
    expected = generate(model, prompt, max_new_tokens=N)
    steps, tokens = stream(model, prompt, max_new_tokens=N), []
    for t in range(N):
        with torch.inference_mode(t % 2 == 0):
            tokens.append(next(steps))
    assert torch.equal(torch.stack(tokens, dim=1), expected)


def payers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flash-inference")]


LONG = 1200


def test_abandoned_streams_leave_nothing_behind() -> None:
    model = random_model(2, length=LONG + 20)
    before = threading.active_count()
    for used in (0, 1, 5, 200):
        steps = stream(model, [[1, 2, 3]], max_new_tokens=LONG)
        for _ in range(used):
            next(steps)
        del steps
        gc.collect()
        assert not payers()
    steps = stream(model, [[1, 2, 3]], max_new_tokens=LONG)
    next(steps)
    steps.close()
    assert threading.active_count() == before


def test_a_stream_that_fails_leaves_nothing_behind() -> None:
    model = random_model(2, length=LONG + 20)

    def choose(logits: Tensor) -> Tensor:
        if len(seen) == 100:
            raise KeyboardInterrupt
        seen.append(1)
        return logits.argmax(-1)

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        list(decode(model.decoder(), torch.tensor([[1]]), choose, max_new_tokens=LONG, beside=True))
    assert not payers()


def test_interleaved_streams_do_not_disturb_each_other() -> None:
    """Of one model, of different lengths, so that the model prepares itself anew between their steps."""
    model = random_model(3, length=LONG + 300)
    prompts = [torch.randint(64, (b, p)) for b, p in ((1, 5), (2, 40), (1, 200))]
    counts = [150, 400, LONG]
    expected = [generate(model, p, max_new_tokens=n) for p, n in zip(prompts, counts, strict=True)]
    streams = [stream(model, p, max_new_tokens=n) for p, n in zip(prompts, counts, strict=True)]
    got: list[list[Tensor]] = [[], [], []]
    for _ in range(LONG):
        for i, steps in enumerate(streams):
            token = next(steps, None)
            if token is not None:
                got[i].append(token)
    for i in range(3):
        assert torch.equal(torch.stack(got[i], dim=1), expected[i])


def test_two_threads_generate_at_once() -> None:
    model = random_model(2, length=700)
    prompts = [torch.randint(64, (1, 30)), torch.randint(64, (2, 50))]
    expected = [generate(random_model(2, length=700), p, max_new_tokens=500) for p in prompts]
    got: list[Tensor | None] = [None, None]

    def work(i: int) -> None:
        got[i] = generate(model, prompts[i], max_new_tokens=500)

    for _ in range(3):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def change_in_place(model: LanguageModel) -> None:
    with torch.no_grad():
        model.blocks[0].mixer.filter.out.weight.mul_(-2)


def change_by_loading(model: LanguageModel) -> None:
    model.load_state_dict(random_model(2, seed=1, length=200, vocab_size=256).state_dict())


def change_by_assigning(model: LanguageModel) -> None:
    state = random_model(2, seed=1, length=200, vocab_size=256).state_dict()
    model.load_state_dict(state, assign=True)


def change_by_replacing(model: LanguageModel) -> None:
    model.blocks[1].mixer.skip = torch.nn.Parameter(-model.blocks[1].mixer.skip)


def change_data(model: LanguageModel) -> None:
    model.blocks[0].mixer.filter.out.weight.data = -model.blocks[0].mixer.filter.out.weight.data


def change_by_training(model: LanguageModel) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randint(256, (1, 50))).square().mean().backward()
    optimizer.step()
    model.requires_grad_(False)


def change_dtype_and_back(model: LanguageModel) -> None:
    model.double()
    change_in_place(model)
    model.float()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place, change_by_loading, change_by_assigning, change_by_replacing, change_data, change_by_training,
        change_dtype_and_back,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_changed_weight_counts_at_once(prompt: Tensor, change) -> None:
    model = random_model(2, length=200, vocab_size=256)
    before = generate(model, prompt, max_new_tokens=N)
    assert model.decoder() is model.decoder()
    change(model)
    after = generate(model, prompt, max_new_tokens=N)
    assert greedy_differences(model, prompt, after)[0] == []
    assert not torch.equal(before, after)


def test_a_model_on_two_dtypes_makes_the_same_tokens(prompt: Tensor) -> None:
    single = random_model(2, length=200, vocab_size=256)
    tokens = generate(single, prompt, max_new_tokens=N)
    assert greedy_differences(single, prompt, tokens) == ([], [])
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_models_in_short_floats_run(prompt: Tensor, dtype: torch.dtype) -> None:
    model = random_model(2, length=200, vocab_size=256, dtype=dtype)
    got = generate(model, prompt, max_new_tokens=N, logprobs=True)
    assert got.tokens.shape == (2, N)
    assert torch.isfinite(got.logprobs.float()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_histories_are_stored_as_asked(dtype: torch.dtype) -> None:
    model, prompt = random_model(3, length=200, vocab_size=256), torch.tensor([[3, 1, 4, 1, 5]])
    settings = {"max_new_tokens": 150, "logprobs": True}
    wide, short = generate(model, prompt, **settings), generate(model, prompt, state_dtype=dtype, **settings)
    assert not torch.equal(wide.logprobs, short.logprobs)
    choose = lambda logits: logits.argmax(-1)  # noqa: E731
    tokens = list(decode(model.decoder(160), prompt, choose, max_new_tokens=150, dtype=dtype))
    assert torch.equal(torch.stack(tokens, dim=1), short.tokens)
    assert torch.equal(generate(model, prompt, max_new_tokens=150, state_dtype=torch.float32), wide.tokens)


def test_histories_of_other_types_are_refused(model: LanguageModel, prompt: Tensor) -> None:
    for dtype in (torch.int8, torch.float64):
        with pytest.raises(SettingError, match=f"state_dtype is {dtype}; expected torch.float32"):
            generate(model, prompt, max_new_tokens=2, state_dtype=dtype)
    with pytest.raises(SettingError, match="drafts keep histories"):
        generate(model, prompt, max_new_tokens=2, state_dtype=torch.bfloat16, draft=PromptLookup())
