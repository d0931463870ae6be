"""transformers' `generate` over our models: every feature gives the tokens and logits of a full recompute.

`make test-transformers` runs this file against two versions of transformers.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flash_inference as fi
from flash_inference.errors import (
    CheckpointError,
    FlashInferenceError,
    LengthError,
    ModelError,
    SettingError,
    ShapeError,
    StateError,
)
from flash_inference.models.decoder import Decoder
from flash_inference.models.families import FAMILIES
from flash_inference.testing import greedy_differences, model_oracle, random_model
from test_families import LENGTH, PATTERNS, ToyConfig, toy

# Nothing is fetched, and nobody is asked, by folders and models of our own.
os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; make test-transformers runs this file against two versions"
)

from flash_inference.integrations.transformers import (  # noqa: E402
    FlashInferenceCache,
    FlashInferenceConfig,
    FlashInferenceForCausalLM,
)

EXACT = 1e-9
MODEL = random_model(seed=1, dtype=torch.float64)
MODELS = {"hyena": MODEL, "order-3": random_model(3, seed=2, dtype=torch.float64)}
MODELS |= {name: toy(pattern) for name, pattern in PATTERNS.items()}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


@pytest.fixture(autouse=True)
def _toys_have_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", ToyConfig)


def wrapped(model: fi.LanguageModel = MODEL) -> Any:
    return FlashInferenceForCausalLM.from_flash(model)


def prompt(model: fi.LanguageModel, rows: int, length: int) -> Tensor:
    return torch.randint(1, model.config.vocab_size, (rows, length))


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows side by side, padded on the left with tokens that would be seen, and the mask that says so."""
    longest = max(map(len, rows))
    tokens = torch.stack([torch.cat([torch.full((longest - len(row),), 7), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return tokens, mask


# ------------------------------------------------------------------------------------------------- ways to generate


@models
@pytest.mark.parametrize("length", [1, 37])
def test_greedy_tokens_are_ours(model: fi.LanguageModel, length: int) -> None:
    tokens = prompt(model, 2, length)
    got = wrapped(model).generate(tokens, max_new_tokens=60, do_sample=False)
    assert torch.equal(got[:, :length], tokens)
    assert torch.equal(got[:, length:], fi.generate(model, tokens, max_new_tokens=60))


@pytest.mark.parametrize("length", [1, 257])
def test_greedy_tokens_in_float32_are_ours(length: int) -> None:
    model = random_model(seed=5, length=1024)
    tokens = prompt(model, 2, length)
    got = wrapped(model).generate(tokens, max_new_tokens=300, do_sample=False)[:, length:]
    assert torch.equal(got, fi.generate(model, tokens, max_new_tokens=300))
    assert not greedy_differences(model, tokens, got)[0]


def test_a_shipped_model_writes_what_it_writes_natively() -> None:
    model = fi.load("shakespeare")
    tokens = torch.tensor([[model.config.start_token, *model.tokens.encode("ROMEO.")]])
    got = wrapped(model).generate(tokens, max_new_tokens=100, do_sample=False)[:, tokens.shape[1] :]
    assert torch.equal(got, fi.generate(model, "ROMEO.", max_new_tokens=100))


@pytest.mark.parametrize("settings_", [{"num_return_sequences": 3}, {"top_k": 5}, {"top_p": 0.7, "temperature": 2.0}])
def test_sampled_tokens_come_from_the_logits_of_the_full_recompute(settings_: dict[str, Any]) -> None:
    tokens, hf = prompt(MODEL, 2, 11), wrapped()
    draw = {"max_new_tokens": 40, "do_sample": True, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    got = hf.generate(tokens, **draw, **settings_)
    torch.manual_seed(0)
    plain = hf.generate(tokens, **draw, **settings_, use_cache=False)
    rows = 2 * settings_.get("num_return_sequences", 1)
    assert got.sequences.shape == (rows, 51)
    assert torch.equal(got.sequences, plain.sequences)
    assert len({tuple(row) for row in got.sequences.tolist()}) == rows
    # transformers rounds logits to float32.
    exact = model_oracle(MODEL, got.sequences[:, :-1])[:, 10:]
    assert torch.allclose(torch.stack(got.logits, 1), exact.float(), rtol=2e-7, atol=EXACT)


@pytest.mark.parametrize("how", [{"do_sample": True}, {"num_return_sequences": 3}], ids=["drawn", "three"])
@pytest.mark.parametrize("model", [MODEL, MODELS["every-mixer"]], ids=["hyena", "every-mixer"])
def test_beams_are_those_of_the_full_recompute(model: fi.LanguageModel, how: dict[str, Any]) -> None:
    rows = [prompt(model, 1, n)[0] for n in (9, 4)]
    tokens, mask = padded(rows)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        out = wrapped(model).generate(
            tokens, attention_mask=mask, num_beams=4, max_new_tokens=30, use_cache=use_cache, **how
        )
        found.append(out)
    assert torch.equal(*found)


def test_beams_wide_enough_find_the_likeliest_continuation_of_all() -> None:
    model = random_model(seed=4, dtype=torch.float64, vocab_size=4)
    tokens = prompt(model, 1, 5)
    got = wrapped(model).generate(tokens, num_beams=64, max_new_tokens=4, do_sample=False)[0, 5:]
    every = torch.tensor(list(itertools.product(range(4), repeat=4)))
    logits = model_oracle(model, torch.cat([tokens.expand(256, -1), every], 1)[:, :-1])[:, 4:]
    chance = logits.log_softmax(-1).gather(-1, every[..., None]).sum((1, 2))
    assert torch.equal(got, every[chance.argmax()])


@models
def test_assisted_decoding_is_greedy_decoding(model: fi.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    init = Decoder.init
    monkeypatch.setattr(Decoder, "init", lambda self, *args, **kw: made.append(self) or init(self, *args, **kw))
    tokens = prompt(model, 1, 30)
    ours = fi.generate(model, tokens, max_new_tokens=60)
    assistant = copy.deepcopy(model)
    assistant.head.weight += 0.3 * torch.randn_like(assistant.head.weight)
    hf, smaller = wrapped(model), wrapped(assistant)
    made.clear()
    lookup = hf.generate(tokens, max_new_tokens=60, do_sample=False, prompt_lookup_num_tokens=5)
    assert torch.equal(lookup[:, 30:], ours)
    # Drafts are taken back without reading the prompt again.
    assert [decoder.model for decoder in made] == [model]
    made.clear()
    assisted = hf.generate(tokens, max_new_tokens=60, do_sample=False, assistant_model=smaller)
    assert torch.equal(assisted[:, 30:], ours)
    assert [decoder.model for decoder in made].count(model) == 1
    assert [decoder.model for decoder in made].count(assistant) == 2


def test_drafts_behind_a_long_prompt_are_taken_back() -> None:
    model = random_model(seed=8, dtype=torch.float64, length=1024)
    tokens = prompt(model, 1, 300)
    ours = fi.generate(model, tokens, max_new_tokens=60)
    got = wrapped(model).generate(tokens, max_new_tokens=60, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(got[:, 300:], ours)
    got = wrapped(model).generate(tokens, max_new_tokens=60, do_sample=False, assistant_model=wrapped(model))
    assert torch.equal(got[:, 300:], ours)


def test_assisted_sampling_runs_and_is_reproducible() -> None:
    tokens, hf, assistant = (
        prompt(MODEL, 1, 30),
        wrapped(),
        wrapped(random_model(seed=1, dtype=torch.float64, layers=1)),
    )
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(hf.generate(tokens, max_new_tokens=40, do_sample=True, assistant_model=assistant))
    assert torch.equal(*found)
    assert found[0].shape == (1, 70)


@models
@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 3}, {"use_cache": False}], ids=["steps", "chunks", "whole"])
def test_rows_padded_on_the_left_are_what_they_are_alone(model: fi.LanguageModel, how: dict[str, Any]) -> None:
    rows = [prompt(model, 1, n)[0] for n in (1, 37, 5, 36)]
    tokens, mask = padded(rows)
    got = wrapped(model).generate(tokens, attention_mask=mask, max_new_tokens=40, do_sample=False, **how)
    for row, out in zip(rows, got, strict=True):
        assert torch.equal(out[37:], fi.generate(model, row[None], max_new_tokens=40)[0])


def test_without_a_mask_the_pad_token_is_a_token() -> None:
    """A model's start token may be its pad token."""
    tokens = torch.tensor([[0, 5, 0, 9]])
    assert MODEL.config.pad_token == 0
    got = wrapped().generate(tokens, max_new_tokens=20, do_sample=False)[:, 4:]
    assert torch.equal(got, fi.generate(MODEL, tokens, max_new_tokens=20))


# ------------------------------------------------------------------------------------------- what generate is given


def test_stopping_criteria_end_rows_and_pad_them() -> None:
    tokens, hf = prompt(MODEL, 3, 8), wrapped()
    plain = hf.generate(tokens, max_new_tokens=50, do_sample=False)
    stop = int(plain[0, 8 + 20])
    ours = fi.generate(MODEL, tokens, max_new_tokens=50, stop_tokens=[stop])
    got = hf.generate(tokens, max_new_tokens=50, do_sample=False, eos_token_id=stop)[:, 8:]
    assert torch.equal(got, ours)
    assert (got[0] == MODEL.config.pad_token).any()

    class Seventh(transformers.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] == 8 + 7)

    criteria = transformers.StoppingCriteriaList([Seventh()])
    got = hf.generate(tokens, max_new_tokens=50, do_sample=False, stopping_criteria=criteria)
    assert torch.equal(got, plain[:, : 8 + 7])


def test_logits_processors_see_and_change_logits() -> None:
    tokens = prompt(MODEL, 2, 8)

    class Even(transformers.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            odd = torch.arange(scores.shape[1]) % 2 == 1
            return scores.masked_fill(odd, -torch.inf)

    processors = transformers.LogitsProcessorList([Even()])
    got = wrapped().generate(tokens, max_new_tokens=30, do_sample=False, logits_processor=processors)[:, 8:]
    assert torch.equal(got, fi.generate(MODEL, tokens, max_new_tokens=30, allowed=range(0, 64, 2)))
    got = wrapped().generate(tokens, max_new_tokens=30, do_sample=False, repetition_penalty=1.5)[:, 8:]
    assert torch.equal(got, fi.generate(MODEL, tokens, max_new_tokens=30, repetition_penalty=1.5))


def test_streamers_get_the_prompt_and_each_token() -> None:
    tokens, seen = prompt(MODEL, 1, 8), []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value: Tensor) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            seen.append("end")

    got = wrapped().generate(tokens, max_new_tokens=20, do_sample=False, streamer=Streamer())
    assert seen == [*got[0].tolist(), "end"]


def test_a_cache_goes_on_where_it_was_and_forks() -> None:
    hf, tokens = wrapped(), prompt(MODEL, 2, 10)
    whole = hf.generate(tokens, max_new_tokens=90, do_sample=False)
    first = hf.generate(tokens, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, FlashInferenceCache)
    assert (cache.get_seq_length(), cache.get_max_length(), cache.batch_size) == (29, 512, 2)
    fork = copy.deepcopy(cache)
    for past in (cache, fork):
        rest = hf.generate(first.sequences, past_key_values=past, max_new_tokens=70, do_sample=False)
        assert torch.equal(rest, whole)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(hf.generate(tokens, past_key_values=cache, max_new_tokens=90, do_sample=False), whole)


def test_a_pipeline_writes_text(tmp_path) -> None:
    tokenizer = letters()
    hf = wrapped(random_model(seed=1))
    pipe = transformers.pipeline("text-generation", model=hf, tokenizer=tokenizer)
    texts = ["HELLO", "BCD"]
    ours = [
        text + tokenizer.decode(fi.generate(hf.model, tokenizer(text)["input_ids"], max_new_tokens=20)[0])
        for text in texts
    ]
    got = pipe(texts, max_new_tokens=20, do_sample=False, batch_size=2)
    assert [row[0]["generated_text"] for row in got] == ours
    pipe.save_pretrained(tmp_path)
    again = transformers.pipeline("text-generation", model=str(tmp_path))
    assert again("HELLO", max_new_tokens=20, do_sample=False)[0]["generated_text"] == ours[0]


def letters() -> Any:
    """A tokenizer of one id a character: 0 is padding, "!" is 1."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    table = {"<pad>": 0} | {chr(32 + i): i for i in range(1, 64)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")


def test_the_documentation_runs(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "transformers.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out.startswith("ROMEO.")
    assert (tmp_path / "folder" / "config.json").exists()


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_models_come_back_as_they_were(tied: bool, dtype: torch.dtype, tmp_path) -> None:
    model = random_model(seed=6, dtype=dtype, tied=tied, stop_tokens=(3,), start_token=2, pad_token=1)
    wrapped(model).save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is FlashInferenceForCausalLM
    assert not back.training
    assert back.model.config == model.config == transformers.AutoConfig.from_pretrained(tmp_path).flash()
    for (name, got), (_, expected) in zip(back.model.state_dict().items(), model.state_dict().items(), strict=True):
        assert got.dtype == expected.dtype, name
        assert torch.equal(got, expected), name
    assert (back.model.head.weight is back.model.embedding.weight) == tied
    special = back.generation_config
    assert (special.bos_token_id, special.eos_token_id, special.pad_token_id) == (2, [3], 1)
    tokens = prompt(model, 1, 9)
    assert torch.equal(
        back.generate(tokens, max_new_tokens=30, do_sample=False)[:, 9:], fi.generate(model, tokens, max_new_tokens=30)
    )


def test_filters_stay_in_float32_where_the_rest_has_16_bits(tmp_path) -> None:
    wrapped(random_model(seed=6)).save_pretrained(tmp_path)
    back = FlashInferenceForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, weight in back.model.named_parameters():
        assert weight.dtype == (torch.float32 if ".filter." in name else torch.bfloat16), name


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    wrapped().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.blocks.0.mixer.skip"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing model\.blocks\.0\.mixer\.skip\. Save config and tensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_configs_of_no_known_model_are_refused(tmp_path) -> None:
    wrapped().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ModelError, match=r"family 'hyaena' is unknown; expected one of hyena"):
        FlashInferenceConfig(**{**values, "family": "hyaena"})
    with pytest.raises(ModelError, match=r"unknown key 'widht' for HyenaConfig\. Did you mean 'width'"):
        FlashInferenceConfig(**{**values, "settings": {**values["settings"], "widht": 3}})
    with pytest.raises(ModelError, match=r"the config has no settings of a model"):
        FlashInferenceForCausalLM(FlashInferenceConfig())
    with pytest.raises(ModelError, match=r"a Linear was given; expected a LanguageModel"):
        FlashInferenceForCausalLM.from_flash(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    FAMILIES.pop("toy")
    with pytest.raises(ModelError, match=r"ToyConfig is of no known family"):
        wrapped(MODELS["every-mixer"])


# -------------------------------------------------------------------------------------------------- forward and cache


@models
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_every_history_of_a_cache_gives_the_logits_of_its_rows(model: fi.LanguageModel, data: st.DataObject) -> None:
    """Chunks, roll-backs, forks and rows that are permuted, doubled, dropped: each row is as if run alone."""
    V, batch = model.config.vocab_size, data.draw(st.integers(1, 3))
    past = FlashInferenceCache(model, data.draw(st.sampled_from([0, 20, LENGTH])))
    start = torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=batch, max_size=batch)))
    tokens = torch.zeros(batch, 0, dtype=torch.long)
    if data.draw(st.booleans()):
        past.activate_past_recording()
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(
            st.sampled_from(["extend", "extend", "extend", "crop", "reorder", "repeat", "select", "fork"])
        )
        B, P = tokens.shape
        if action == "extend":
            new = torch.randint(V, (B, data.draw(st.sampled_from([1, 1, 2, 5, 11]))))
            tokens = torch.cat([tokens, new], 1)
            mask = (torch.arange(tokens.shape[1]) >= start[:, None]).long()
            keep = data.draw(st.integers(1, new.shape[1]))
            logits = past.extend(new, mask, keep)
            assert logits.shape == (B, keep, V)
            for row in range(B):
                first = int(start[row])
                if first < tokens.shape[1]:
                    exact = model(tokens[row : row + 1, first:])[0, -keep:]
                    assert (logits[row, -len(exact) :] - exact).abs().max() <= EXACT
        elif action == "crop":
            back = data.draw(st.integers(0, P))
            past.crop(-back)
            tokens = tokens[:, : P - back]
        elif action == "repeat" and B < 4 and P:
            past.batch_repeat_interleave(2)
            tokens, start = tokens.repeat_interleave(2, 0), start.repeat_interleave(2)
        elif action in ("reorder", "select") and P:
            size = B if action == "reorder" else data.draw(st.integers(1, B))
            rows = torch.tensor(data.draw(st.lists(st.integers(0, B - 1), min_size=size, max_size=size)))
            (past.reorder_cache if action == "reorder" else past.batch_select_indices)(rows)
            tokens, start = tokens[rows], start[rows]
        elif action == "fork":
            other, past = past, copy.deepcopy(past)
            other.reset()
        if P and past.get_seq_length():
            assert (past.batch_size, past.get_seq_length()) == tuple(tokens.shape)


def test_a_step_that_was_interrupted_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    hf, tokens = wrapped(), prompt(MODEL, 1, 30)
    cache = FlashInferenceCache(MODEL)
    hf(tokens[:, :20], past_key_values=cache)
    block = type(MODEL.blocks[1])
    with monkeypatch.context() as patch:
        patch.setattr(block, "extend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hf(tokens[:, 20:25], past_key_values=cache)
    assert cache.get_seq_length() == 20
    logits = hf(tokens[:, 20:], past_key_values=cache).logits
    assert (logits - model_oracle(MODEL, tokens)[:, 20:]).abs().max() <= EXACT


def interrupted(*_: Any) -> Tensor:
    raise KeyboardInterrupt


def test_the_whole_filter_can_be_used() -> None:
    model = random_model(seed=7, dtype=torch.float64, length=64)
    hf, tokens = wrapped(model), prompt(model, 2, 64)
    exact = model_oracle(model, tokens)
    assert (hf(tokens, use_cache=True).logits - exact).abs().max() <= EXACT
    assert (hf(tokens, use_cache=False).logits - exact).abs().max() <= EXACT
    cache = hf(tokens[:, :40], use_cache=True).past_key_values
    for t in range(40, 64):
        logits = hf(tokens[:, t : t + 1], past_key_values=cache).logits
        assert (logits[:, 0] - exact[:, t]).abs().max() <= EXACT
    with pytest.raises(LengthError, match=r"65 positions were asked for.*filter has 64 taps"):
        hf(tokens[:, :1], past_key_values=cache)


def test_logits_are_kept_where_they_are_asked_for() -> None:
    hf, tokens = wrapped(), prompt(MODEL, 2, 21)
    exact = model_oracle(MODEL, tokens)
    places = torch.tensor([0, 7, 20])
    for use_cache in (True, False):
        for keep, expected in ((0, exact), (1, exact[:, -1:]), (4, exact[:, -4:]), (places, exact[:, places])):
            out = hf(tokens, use_cache=use_cache, logits_to_keep=keep)
            assert out.logits.shape == expected.shape
            assert (out.logits - expected).abs().max() <= EXACT
    assert len(hf(tokens, use_cache=False, return_dict=False)) == 1


@pytest.mark.parametrize("right", [False, True], ids=["left", "both-ends"])
def test_training_on_padded_rows_has_the_gradients_of_each_row_alone(right: bool) -> None:
    model = copy.deepcopy(MODEL).requires_grad_()
    hf = wrapped(model).train()
    rows = [prompt(model, 1, n)[0] for n in (5, 12, 9)]
    tokens, mask = padded(rows)
    if right:
        tokens, mask = (torch.nn.functional.pad(x, (0, 3), value=v) for x, v in ((tokens, 9), (mask, 0)))
    out = hf(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))
    assert out.past_key_values is None
    out.loss.backward()
    got = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    losses = [torch.nn.functional.cross_entropy(model(row[None])[0, :-1], row[1:], reduction="sum") for row in rows]
    loss = sum(losses) / sum(len(row) - 1 for row in rows)
    loss.backward()
    assert abs(out.loss.item() - loss.item()) <= 1e-6  # transformers computes losses in float32
    for grad, weight in zip(got, model.parameters(), strict=True):
        assert torch.allclose(grad, weight.grad, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["static", "quantized", "offloaded", "paged"])
def test_other_caches_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=r"no keys and values|batches of its own"):
        wrapped().generate(prompt(MODEL, 1, 3), max_new_tokens=3, cache_implementation=name)


REFUSED: dict[str, tuple[Callable[[Any], Any], type[FlashInferenceError], str]] = {
    "drafts beyond the filter": (
        lambda hf: hf.generate(prompt(MODEL, 1, 5), max_new_tokens=504, prompt_lookup_num_tokens=4),
        LengthError,
        r"513 positions were asked for",
    ),
    "too many new tokens": (
        lambda hf: hf.generate(prompt(MODEL, 1, 5), max_new_tokens=508),
        LengthError,
        r"513 positions were asked for, padding, new tokens and drafts included; this model's filter has 512 taps",
    ),
    "padding on the right": (
        lambda hf: hf(torch.ones(2, 3).long(), attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])),
        ShapeError,
        r"attention_mask pads row 1 on the right; with a cache .*padding_side = 'left'",
    ),
    "a torn row": (
        lambda hf: hf(torch.ones(1, 3).long(), attention_mask=torch.tensor([[1, 0, 1]]), use_cache=False),
        ShapeError,
        r"a 0 between the ones of row 0",
    ),
    "a mask of another shape": (
        lambda hf: hf(torch.ones(1, 3).long(), attention_mask=torch.ones(1, 4)),
        ShapeError,
        r"attention_mask has shape \[1, 4\]; expected \[1, 3\]",
    ),
    "no tokens": (
        lambda hf: hf(torch.ones(1, 0).long()),
        ShapeError,
        r"input_ids has no positions",
    ),
    "another batch": (
        lambda hf: hf(torch.ones(2, 1).long(), past_key_values=hf(torch.ones(1, 3).long()).past_key_values),
        ShapeError,
        r"input_ids has 2 rows; the cache holds 1",
    ),
    "a cache of another kind": (
        lambda hf: hf(torch.ones(1, 3).long(), past_key_values=transformers.DynamicCache()),
        ShapeError,
        r"past_key_values is a DynamicCache; expected a FlashInferenceCache",
    ),
    "taking back more than there is": (
        lambda hf: hf(torch.ones(1, 3).long()).past_key_values.crop(-4),
        LengthError,
        r"crop\(-4\) was asked of 3 positions",
    ),
    "another model's layer": (
        lambda hf: FlashInferenceCache(MODEL).update(torch.ones(1), torch.ones(1), 0),
        StateError,
        r"keeps no keys and values",
    ),
    "more words": (lambda hf: hf.resize_token_embeddings(70), ModelError, r"the vocabulary of a model is fixed"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_said(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(wrapped())
