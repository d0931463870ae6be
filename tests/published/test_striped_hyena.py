"""Published StripedHyena models load as what their definition says, decode as they read, and go back as they came."""

from __future__ import annotations

import io
import json
import random
import re
from functools import cache

import numpy as np
import pytest
import torch
from published_laws import keeps_every_number, steps_are
from safetensors.torch import save_file
from striped_reference import CASES, FIRST, SECOND, SH7B, Case, logits, random_weights, stored_frequencies

import flash_inference as fi
from flash_inference.engine.plan import plan
from flash_inference.engine.verify import verify
from flash_inference.errors import CheckpointError, LengthError, ModelError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.published import to_published
from flash_inference.models.published.settings import Settings
from flash_inference.models.published.striped_hyena import LAYOUTS
from flash_inference.models.striped_hyena import StripedHyenaConfig
from flash_inference.tiling import Blocked

LENGTH = 262
BY_ID = {case.id: case for case in CASES}
cases = pytest.mark.parametrize("case", CASES, ids=list(BY_ID))
main_cases = pytest.mark.parametrize("case", [BY_ID[name] for name in ("evo", "sh-7b", "evo2")], ids=lambda c: c.id)


def publish(folder, case: Case, dtype=torch.float64, weights=None, **config):
    """Writes a case's folder as it is published, and gives its weights."""
    weights = random_weights(case) if weights is None else weights
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    stored = weights | stored_frequencies(case)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config | config))
    if case.file.endswith("index.json"):
        where = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(stored)}
        for file in set(where.values()):
            save_file({name: stored[name] for name, at in where.items() if at == file}, folder / file)
        (folder / case.file).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    elif case.file.endswith(".safetensors"):
        save_file(stored, folder / case.file)
    else:
        torch.save(stored, folder / case.file)
    return weights


def some_ids(case: Case, length=LENGTH):
    return torch.randint(case.config["vocab_size"], (length,), generator=torch.Generator().manual_seed(1)).tolist()


@cache
def expected(case_id: str) -> np.ndarray:
    """The definition's logits of a case's ids."""
    case = BY_ID[case_id]
    return logits(case, random_weights(case), some_ids(case))


@cases
def test_logits_are_those_of_the_definition(tmp_path, case):
    publish(tmp_path, case)
    got = fi.load(tmp_path)(torch.tensor([some_ids(case)]))[0].numpy()
    assert np.abs(got - expected(case.id)).max() <= 1e-9 * np.abs(expected(case.id)).max()


@cases
def test_logits_in_float32(tmp_path, case):
    weights, ids = publish(tmp_path, case, torch.float32), some_ids(case, 100)
    definition = logits(case, weights, ids)
    got = fi.load(tmp_path)(torch.tensor([ids]))[0]
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - definition).max() <= 1e-4 * np.abs(definition).max()


@cases
def test_state_dicts_round_trip(tmp_path, case):
    weights = publish(tmp_path, case)
    model = fi.load(tmp_path)
    again = to_published(model, case.layout, names=weights, settings=case.config)
    stored = weights | stored_frequencies(case)
    assert all(torch.allclose(again[name], stored[name], rtol=1e-6 * name.endswith("inv_freq")) for name in stored)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert all(name.endswith(("inv_freq", "unembed.weight")) for name in set(again) - set(stored))


@main_cases
def test_our_format_keeps_every_number(tmp_path, case):
    publish(tmp_path / "theirs", case, torch.float32)
    keeps_every_number(tmp_path / "theirs", tmp_path / "ours")


@main_cases
def test_cached_steps_equal_the_definition_after_prompts_of_every_length(tmp_path, case):
    publish(tmp_path, case)
    steps_are(fi.load(tmp_path), some_ids(case), expected(case.id))


@main_cases
def test_greedy_tokens_equal_full_recompute(tmp_path, case):
    publish(tmp_path, case)
    report = verify(fi.load(tmp_path), some_ids(case, 7), tokens=256)
    assert report.equal
    assert not report.ties
    assert report.distinct > 3


@main_cases
def test_scores_and_states_do_not_depend_on_the_chunk(tmp_path, case):
    publish(tmp_path, case)
    model, tokens, rng = fi.load(tmp_path), torch.tensor([some_ids(case, 150)]), random.Random(case.id)
    log_p = torch.from_numpy(expected(case.id)[:149]).log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    states = fi.embed(model, tokens, chunk=1000)
    for chunk in rng.sample(range(1, 150), 3):
        assert (fi.score(model, tokens, chunk=chunk)[0] - log_p).abs().max() <= 1e-9
        assert (fi.embed(model, tokens, chunk=chunk) - states).abs().max() <= 1e-9


@main_cases
def test_rows_begin_at_their_own_clocks(tmp_path, case):
    publish(tmp_path, case)
    model, tokens, starts = fi.load(tmp_path), torch.tensor([some_ids(case, 200)]).expand(3, -1), [0, 9, 130]
    decoder, got = model.decoder(200), []
    state = decoder.init(3, Blocked(200), start=torch.tensor(starts))
    for size in (1, 7, 120, 1, 40, 1, 1, 29):
        got.append(decoder.extend(state, tokens[:, state.clock : state.clock + size], every=True))
    for row, start in enumerate(starts):
        alone = model(tokens[row : row + 1, start:])[0]
        assert (torch.cat(got, 1)[row, start:] - alone).abs().max() <= 1e-9 * alone.abs().max()


@pytest.mark.slow
@cases
def test_any_chunks_from_any_start_are_the_forward(tmp_path, case):
    publish(tmp_path, case)
    model, rng = fi.load(tmp_path), random.Random(case.id)
    decoder, tokens = model.decoder(LENGTH), torch.tensor([some_ids(case), some_ids(case)[::-1]])
    for _ in range(30):
        start = rng.randrange(LENGTH - 1)
        state, got = decoder.init(2, Blocked(LENGTH), start=torch.tensor([0, start])), []
        while state.clock < LENGTH:
            size = min(rng.choice([1, 2, 5, 50, 200]), LENGTH - state.clock)
            got.append(decoder.extend(state, tokens[:, state.clock : state.clock + size], every=True))
        for row, first in enumerate((0, start)):
            alone = model(tokens[row : row + 1, first:])[0]
            assert (torch.cat(got, 1)[row, first:] - alone).abs().max() <= 1e-9 * alone.abs().max()


def test_the_plan_tells_how_each_layer_decodes(tmp_path):
    publish(tmp_path, BY_ID["evo2"])
    made = plan(fi.load(tmp_path), prompt=20, max_new_tokens=80)
    ways = {"short": "FIR ring", "medium": "FIR ring", "long": "recurrence"}
    pattern = ("short", "medium", "long", "attention", "short")
    assert [(layer.block, layer.decodes) for layer in made.layers] == [
        (i, way)
        for i, kind in enumerate(pattern)
        for way in (["KV cache"] if kind == "attention" else ["FIR ring", ways[kind]])
    ]
    assert made.filters == made.spectra == 0


def evo2_7b() -> LanguageModel:
    """The shapes of Evo 2 7B in its dtypes, without numbers."""
    lists = {
        "attn_layer_idxs": [3, 10, 17, 24, 31], "hcl_layer_idxs": [2, 6, 9, 13, 16, 20, 23, 27, 30],
        "hcm_layer_idxs": [1, 5, 8, 12, 15, 19, 22, 26, 29], "hcs_layer_idxs": [0, 4, 7, 11, 14, 18, 21, 25, 28],
    }  # fmt: skip
    sizes = {
        "hidden_size": 4096, "num_filters": 4096, "num_layers": 32, "num_attention_heads": 32, "inner_mlp_size": 11264,
        "state_size": 16, "hcl_filter_groups": 4096, "hcm_filter_groups": 256, "hcs_filter_groups": 256,
        "max_seqlen": 1048576,
    }  # fmt: skip
    settings = Settings(SECOND | lists | sizes, "config.json")
    config = LAYOUTS[1].configure(settings, {})
    settings.finish()
    with torch.device("meta"):
        model = LanguageModel(config).bfloat16()
        for block in model.blocks:
            if hasattr(block.mixer, "inner") and hasattr(block.mixer.inner, "filter"):
                block.mixer.inner.filter.float()
    return model.eval()


def test_the_plan_of_evo2_7b_counts_its_bytes_without_allocating_it():
    model, length, D = evo2_7b(), 1_000_000, 4096
    block, conv, attention = 3 * D * 11264 + 2 * D, 4 * D * D + D + 9 * D, 4 * D * D + D
    filters = 256 * 7 + (256 * 128 + D) + (2 * 16 * D + D)
    numbers = 32 * block + 27 * conv + 5 * attention + 9 * filters + 512 * D + D
    assert sum(p.numel() for p in model.parameters()) == numbers
    made = plan(model, prompt=length - 1000, max_new_tokens=1000)
    ways = [(layer.block, layer.part, layer.decodes, layer.bytes) for layer in made.layers]
    features = ("FIR", "FIR ring", 2 * 3 * D * 2)
    assert ways[:7] == [
        (0, *features), (0, "FIR", "FIR ring", 6 * D * 2), (1, *features), (1, "FIR", "FIR ring", 127 * D * 2),
        (2, *features), (2, "ModalConv", "recurrence", D * 16 * 8),
        (3, "Attention", "KV cache", 2 * length * D * 2),
    ]  # fmt: skip
    row = 27 * 2 * 3 * D * 2 + 9 * (6 + 127) * D * 2 + 9 * D * 16 * 8 + 5 * 2 * length * D * 2
    assert sum(layer.bytes for layer in made.layers) == made.state == row
    assert all(p.device.type == "meta" for p in model.parameters())


UNSUPPORTED = [
    ({"smeared_gqa": True}, "smeared_gqa = True; expected False"),
    ({"final_norm": False}, "final_norm = False; expected True"),
    ({"num_filters": 4}, "num_filters = 4; expected 8"),
    ({"model_parallel_size": 2}, "model_parallel_size = 2; expected 1"),
    ({"long_fir_threshold": 4}, "long_fir_threshold = 4; expected None"),
    ({"num_attention_heads": 3}, "num_attention_heads = 3; expected a divisor of hidden_size, 8"),
    ({"mlp_activation": "relu"}, "mlp_activation = 'relu'; expected one of 'gelu', 'silu'"),
    ({"eps": -1}, "eps = -1; expected a finite number of at least 0"),
    ({"eps": "1e-6"}, "eps = '1e-6'; expected a finite number"),
    ({"rotary_emb_scale": 3}, "unknown key 'rotary_emb_scale'. Did you mean 'rotary_emb_base'?"),
    ({"rotary_emb_base": 0}, "base or an interpolation factor that is not positive"),
    ({"column_split_hyena": 1}, "column_split_hyena = 1; expected true or false"),
    ({"tie_embeddings": None}, "lacks 'tie_embeddings', which has no default"),
    ({"attn_layer_idxs": "1"}, "attn_layer_idxs = '1'; expected a list of different integers"),
    ({"attn_layer_idxs": [1, 1]}, "attn_layer_idxs = [1, 1]; expected a list of different integers"),
    ({"attn_layer_idxs": [0]}, "hyena_layer_idxs = [0, 2]; expected no layer of another list; [0] are in two"),
    ({"num_layers": 9}, "num_layers = 9; expected every layer in one of attn_layer_idxs, hyena_layer_idxs; 3 is in no"),
]  # fmt: skip
FIRST_ALONE = [
    ({"hyena_filter_groups": 8}, "hyena_filter_groups = 8; expected 1"),
    ({"proj_groups": 3}, "proj_groups = 3; expected a divisor of num_attention_heads, 2"),
    ({"proj_groups": 2, "column_split": True}, "column_split = True; expected False"),
]
SECOND_ALONE = [
    ({"hcs_filter_length": 128}, "hcs_filter_length = 128; expected less than 128"),
    ({"hcm_filter_length": 127}, "hcm_filter_length = 127; expected at least 128"),
    ({"hcm_filter_groups": 3}, "3 groups of filters for 8 channels; expected a divisor of 8"),
    ({"proj_groups": 2}, "proj_groups = 2; expected 1"),
    ({"interleave": "yes"}, "interleave = 'yes'; expected true or false"),
    ({"hyena_flip_x1x2": 0}, "hyena_flip_x1x2 = 0; expected true or false"),
    ({"column_split": 1}, "column_split = 1; expected true or false"),
    ({"evo2_style_activations": "gelu"}, "evo2_style_activations = 'gelu'; expected true or false"),
    ({"use_fp8_input_projections": 8}, "use_fp8_input_projections = 8; expected true or false"),
    ({"hcl_layer_idxs": [1, 2]}, "hcm_layer_idxs = [1]; expected no layer of another list; [1] are in two"),
    ({"hcs_layer_idxs": [0]}, "num_layers = 5; expected every layer in one of"),
    ({"qkv_proj_bias": None}, "lacks 'qkv_proj_bias', which has no default"),
]


@pytest.mark.parametrize(
    ("name", "setting", "told"),
    [
        *(("evo", *refused) for refused in UNSUPPORTED + FIRST_ALONE),
        *(("evo2", *refused) for refused in UNSUPPORTED[:-2] + SECOND_ALONE),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 5 else "",
)
def test_settings_that_mean_another_model_are_refused_by_name(tmp_path, name, setting, told):
    publish(tmp_path, BY_ID[name], torch.float32, **setting)
    with pytest.raises(CheckpointError, match=re.escape(told)):
        fi.load(tmp_path)


def test_frequencies_that_the_config_does_not_make_are_refused(tmp_path):
    case = BY_ID["evo"]
    name = "backbone.blocks.1.inner_mha_cls.rotary_emb.inv_freq"
    publish(tmp_path, case, rotary_emb_base=20000)
    with pytest.raises(CheckpointError, match=rf"{name} is not what the config makes it, \[1\.0, 0\.00707"):
        fi.load(tmp_path)


def test_more_positions_than_the_config_allows_are_refused(tmp_path):
    publish(tmp_path, BY_ID["evo"], max_seqlen=30)
    with pytest.raises(
        LengthError, match=r"31 positions were given; the config sets 30 .*`max_seqlen` in a published one"
    ):
        fi.load(tmp_path)(torch.zeros(1, 31, dtype=torch.long))


def test_sixteen_bits_with_poles_in_float32(tmp_path):
    """As the published code keeps a model: what else is in float32 it rounds, unless a dtype is asked for."""
    for name in ("evo", "evo2"):
        case, weights = BY_ID[name], random_weights(BY_ID[name])
        wide = ("poles", "residues", "filter.D")
        weights = {k: v.float() if k.endswith(wide) else v.bfloat16() for k, v in weights.items()}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(case.config))
        torch.save(weights, folder / "pytorch_model.bin")
        model, ids = fi.load(folder), some_ids(case, 60)
        assert any("tensors stored in float32 were rounded to torch.bfloat16" in note for note in model.notes)
        for name_, tensor in model.state_dict().items():
            assert tensor.dtype == (torch.float32 if ".filter." in name_ else torch.bfloat16)
        definition = logits(case, weights, ids)
        exact = fi.load(folder, dtype=torch.float64)(torch.tensor([ids]))[0].numpy()
        assert np.abs(exact - definition).max() <= 1e-9 * np.abs(definition).max()
        decoder, state = model.decoder(60), model.decoder(60).init(1, Blocked(60))
        cached = torch.cat([decoder.extend(state, torch.tensor([[token]]), every=True) for token in ids], 1)
        errors = [np.abs(x[0].float().numpy() - definition).max() for x in (cached, model(torch.tensor([ids])))]
        assert errors[0] <= 2 * errors[1]
        fi.save(model, tmp_path / "ours")
        again = fi.load(tmp_path / "ours").state_dict()
        assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())


def test_states_of_8_bit_layers_are_passed_over(tmp_path):
    case = BY_ID["evo2"]
    weights = publish(tmp_path, case)
    extra = {"blocks.0.projections._extra_state": io.BytesIO(b"fp8"), "blocks.1.projections._extra_state": None}
    torch.save(weights | extra, tmp_path / case.file)
    ids = torch.tensor([some_ids(case)])
    assert (fi.load(tmp_path)(ids)[0] - torch.from_numpy(expected(case.id))).abs().max() <= 1e-9


def test_text_is_bytes_where_there_are_512_ids(tmp_path):
    publish(tmp_path, BY_ID["evo2"], torch.float32)
    model = fi.load(tmp_path)
    assert model.tokens.encode("ACGT") == [65, 67, 71, 84]
    assert (model.config.start_token, model.config.stop_tokens, model.config.pad_token) == (0, (0,), 1)
    made = fi.generate(model, "ACGT", max_new_tokens=20, allowed=[65, 67, 71, 84], temperature=1.0, seed=0)
    assert set(model.tokens.decode(made[0].tolist())) <= set("ACGT")


def test_notes_tell_what_was_assumed(tmp_path):
    config = {k: v for k, v in SH7B.items() if k not in ("short_filter_bias", "eps")}
    case = Case("sh-7b", "stripedhyena", config=config | {"short_filter_bias": None}, head="unembed.weight")
    publish(tmp_path, case, weights=random_weights(BY_ID["sh-7b"]))
    told = "; ".join(fi.load(tmp_path).notes)
    assert "short_filter_bias is not given; the published default True" in told
    assert "eps is not given; 1e-05 was used" in told
    assert "name [4], beyond the last of 4" in told


def test_a_config_of_ours_names_its_faults():
    def config(**settings):
        given = {"pattern": ("modal", "attention"), "activations": ("gelu", "silu"), "inner": 8, "heads": 2} | settings
        return StripedHyenaConfig(32, 8, 2, 16, **given)

    for settings, told in (
        ({"pattern": ("modal",)}, r"pattern has 1 entries; expected one for each of 2 layers"),
        (
            {"pattern": ("modal", "hyena")},
            r"pattern\[1\] is 'hyena'; expected one of modal, long, medium, short, atten",
        ),
        ({"activations": ("gelu", "swish")}, r"activations\[1\] is 'swish'"),
        ({"norm_eps_place": "under"}, r"norm_eps_place = 'under' is out of range"),
        ({"heads": 3}, r"width 8 is no multiple of 3 heads"),
    ):
        with pytest.raises(ModelError, match=told):
            LanguageModel(config(**settings))
    again = StripedHyenaConfig.from_dict(json.loads(json.dumps(config().to_dict())))
    assert again == config()


def test_a_model_of_ours_needs_no_published_config_to_go_back(tmp_path):
    weights = publish(tmp_path, BY_ID["evo"])
    again = to_published(fi.load(tmp_path), "stripedhyena", names=weights)
    assert FIRST["column_split_hyena"]
    assert all(torch.equal(again[name], weights[name]) for name in weights)
