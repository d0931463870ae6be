"""Published H3, S4D and MultiHyena models load as what their definition says, decode as they read, and go back."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from corruptions import Target, survives
from gated_reference import CASES, VOCAB, Case, config_of, logits, random_weights
from published_laws import greedy_is_recompute, keeps_every_number, steps_are

import flash_inference as fi
from flash_inference.engine.plan import plan
from flash_inference.errors import CheckpointError, FlashInferenceError
from flash_inference.models.backbone import LanguageModel
from flash_inference.models.hyena import FilterConfig
from flash_inference.models.multi_hyena import MultiHyenaConfig
from flash_inference.models.published import h3, multi_hyena, s4d, to_published
from flash_inference.tiling import Blocked

LENGTH = 300
LAYOUTS = (*h3.LAYOUTS, *s4d.LAYOUTS, *multi_hyena.LAYOUTS)
cases = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
BY_ID = {case.id: case for case in CASES}
# What decodes as another case does, and differs in what is read alone.
ALIKE = ("safari-h3-heads-fused", "safari-h3-conv-hybrid", "safari-s4d", "multi-hyena-unnormed", "multi-hyena-bare")
distinct_cases = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.id, marks=[pytest.mark.slow] if case.id in ALIKE else []) for case in CASES],
)


def publish(folder, case: Case, dtype=torch.float64, length=LENGTH, weights=None, config=None):
    weights = random_weights(case, length) if weights is None else weights
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(case, length) if config is None else config))
    torch.save({"state_dict": weights} if case.outer else weights, folder / "pytorch_model.bin")
    return weights


def some_ids(length=LENGTH):
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@cases
def test_logits_are_those_of_the_definition(tmp_path, case):
    weights, ids = publish(tmp_path, case), some_ids()
    expected = logits(case, weights, ids)
    got = fi.load(tmp_path)(torch.tensor([ids]))[0].numpy()
    assert np.abs(got - expected).max() <= 1e-9 * np.abs(expected).max()


@cases
def test_logits_in_float32(tmp_path, case):
    weights, ids = publish(tmp_path, case, torch.float32), some_ids()
    expected = logits(case, weights, ids)
    got = fi.load(tmp_path)(torch.tensor([ids]))[0]
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


@cases
def test_the_far_past_counts(tmp_path, case):
    """What the other tests show of long filters would be little if these forgot at once."""
    publish(tmp_path, case)
    model, tokens = fi.load(tmp_path), torch.tensor([some_ids()])
    other = tokens.clone()
    other[0, 0] = (tokens[0, 0] + 1) % VOCAB
    assert (model(tokens) - model(other))[0, 150].abs().max() > 1e-4


def rounded(name):
    """Rotary frequencies go back in float32, in which they are published; all else bit for bit."""
    return 1e-6 if name.endswith("inv_freq") else 0


@cases
def test_state_dicts_round_trip(tmp_path, case):
    weights = publish(tmp_path, case)
    model = fi.load(tmp_path)
    again = to_published(model, case.layout, names=weights)
    assert again.keys() == weights.keys()
    assert all(torch.allclose(again[name].double(), weights[name], rtol=rounded(name), atol=0) for name in weights)
    assert model.notes


@cases
def test_our_format_keeps_every_number(tmp_path, case):
    publish(tmp_path / "theirs", case, torch.float32)
    keeps_every_number(tmp_path / "theirs", tmp_path / "ours")


@distinct_cases
def test_cached_steps_equal_the_definition_after_prompts_of_every_length(tmp_path, case):
    weights, ids = publish(tmp_path, case), some_ids()
    steps_are(fi.load(tmp_path), ids, logits(case, weights, ids))


@distinct_cases
def test_greedy_tokens_equal_full_recompute(tmp_path, case):
    publish(tmp_path, case)
    greedy_is_recompute(fi.load(tmp_path), some_ids(7))


@distinct_cases
def test_score_and_embed_do_not_depend_on_chunks(tmp_path, case):
    publish(tmp_path, case)
    model, tokens = fi.load(tmp_path), torch.tensor([some_ids()])
    exact = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    whole = fi.embed(model, tokens, chunk=LENGTH)
    assert (fi.score(model, tokens[:, :40], chunk=1) - exact[:, :39]).abs().max() <= 1e-9
    for chunk in random.Random(case.id).sample(range(7, LENGTH), 3):
        assert (fi.score(model, tokens, chunk=chunk) - exact).abs().max() <= 1e-9
        assert (fi.embed(model, tokens, chunk=chunk) - whole).abs().max() <= 1e-9 * whole.abs().max()


@distinct_cases
def test_rows_of_several_lengths_are_each_alone(tmp_path, case):
    weights = publish(tmp_path, case)
    decoder, tokens = fi.load(tmp_path).decoder(60), torch.tensor([some_ids(60), some_ids(120)[60:]])
    state = decoder.init(2, Blocked(60), start=torch.tensor([0, 23]))
    pieces = [decoder.extend(state, tokens[:, a:b], every=True) for a, b in ((0, 20), (20, 21), (21, 45), (45, 60))]
    got = torch.cat(pieces, 1).numpy()
    for row, start in ((0, 0), (1, 23)):
        expected = logits(case, weights, tokens[row, start:].tolist())
        assert np.abs(got[row, start:] - expected).max() <= 1e-9 * np.abs(expected).max()


WAYS = {
    "h3": [("ShiftSSM", "FIR ring"), ("ModalConv", "recurrence")],
    "h3-conv": [("SquashedFilter", "tiles"), ("SquashedFilter", "tiles")],
    "attention": [("Attention", "KV cache")],
    "s4d": [("ModalConv", "recurrence")],
    "multi-hyena": [("SharedFilter", "tiles"), ("ShortConv", "FIR ring")],
}


@cases
def test_the_plan_tells_how_each_part_decodes(tmp_path, case):
    publish(tmp_path, case)
    model = fi.load(tmp_path)
    made = plan(model, prompt=20, max_new_tokens=40)
    expected = [(i, *way) for i, operator in enumerate(case.operators) for way in WAYS[operator]]
    assert [(layer.block, layer.part, layer.decodes) for layer in made.layers] == expected
    assert {layer.why for layer in made.layers if layer.decodes == "recurrence"} <= {
        "a filter that is a short sum of exponentials"
    }
    state = model.decoder(60).init(1, Blocked(60))
    kept = [layer.bytes for layer in made.layers if layer.decodes != "tiles"]
    assert sum(kept) == sum(t.nbytes for pasts in state.pasts for past in pasts for t in tensors_of(past))


def tensors_of(past):
    return [getattr(past, name) for name in past.__dataclass_fields__]


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("case", "section", "setting"),
    [
        ("h3-hybrid", "ssm_cfg", {"mode": "nplr"}), ("h3-hybrid", "ssm_cfg", {"disc": "dss"}),
        ("h3-hybrid", "ssm_cfg", {"force_real": True}), ("h3-hybrid", "ssm_cfg", {"bandlimit": 0.5}),
        ("h3-hybrid", "ssm_cfg", {"real_type": "relu"}), ("h3-hybrid", "ssm_cfg", {"d_state": 7}),
        ("h3-hybrid", "ssm_cfg", {"head_dim": 3}), ("h3-hybrid", "ssm_cfg", {"n_ssm": 3}),
        ("h3-hybrid", "attn_cfg", {"causal": False}), ("h3-hybrid", "attn_cfg", {"rotary_emb_dim": 3}),
        ("h3-hybrid", "attn_cfg", {"softmax_scale": 0.1}), ("h3-hybrid", "attn_cfg", {"num_heads": 3}),
        ("safari-h3", "layer", {"_name_": "hyena"}), ("safari-h3", "layer", {"channels": 2}),
        ("safari-h3-conv", "layer", {"head_dim": 2}), ("safari-h3-conv", "layer", {"causal": False}),
        ("safari-h3-conv", "layer", {"smooth_freq": True}), ("safari-h3-conv", "layer", {"lam": -1}),
        ("safari-s4d", "layer", {"bidirectional": True}), ("safari-s4d", "layer", {"transposed": True}),
        ("safari-s4d", "layer", {"activation": "relu"}), ("safari-s4d", "layer", {"postact": "tanh"}),
        ("safari-s4d", "layer", {"channels": 2}), ("safari-s4d", "layer", {"n_ssm": 3}),
        ("multi-hyena", "", {"use_fast_heads": True}), ("multi-hyena", "", {"normalize_hyena_filters": True}),
        ("multi-hyena", "", {"hyena_filter_cls": "s4d"}), ("multi-hyena", "", {"hyena_pos_emb": "random_fourier"}),
        ("multi-hyena", "", {"postnorm": True}), ("multi-hyena", "", {"proj_groups": 8}),
        ("multi-hyena", "", {"model_parallel_size": 2}), ("multi-hyena", "", {"norm": "scalenorm"}),
        ("multi-hyena", "", {"bias_gelu_fusion": False}), ("multi-hyena", "", {"num_heads": 3}),
        ("multi-hyena", "", {"attention_config": [[["flash"], 2]]}), ("multi-hyena", "", {"hyena_filter_emb_dim": 4}),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_mean_another_model_are_refused_by_name(tmp_path, case, section, setting):
    config = config_of(BY_ID[case], 20)
    changed = setting if not section else {section: config[section] | setting}
    publish(tmp_path, BY_ID[case], length=20, config=config | changed)
    with pytest.raises(CheckpointError, match=rf"{section}\.?{next(iter(setting))} = .*expected"):
        fi.load(tmp_path)


@pytest.mark.parametrize("case", [case for case in CASES if "layer" in case.config][::2], ids=lambda case: case.id)
def test_unknown_keys_are_refused_with_the_nearest(tmp_path, case):
    config = config_of(case, 20)
    publish(tmp_path, case, length=20, config=config | {"layer": config["layer"] | {"hed_dim": 1, "d_stat": 6}})
    with pytest.raises(CheckpointError, match=r"unknown key 'layer\.(hed_dim|d_stat)'\. (Did you mean|Known)"):
        fi.load(tmp_path)


@pytest.mark.parametrize("blocks", [[3], [-1], [1, 1], "1", 1, [True]], ids=str)
def test_blocks_that_attend_are_blocks(tmp_path, blocks):
    case = BY_ID["h3-hybrid"]
    publish(tmp_path, case, length=20, config=config_of(case, 20) | {"attn_layer_idx": blocks})
    with pytest.raises(CheckpointError, match=r"attn_layer_idx = .*expected a list of different integers from 0 to 2"):
        fi.load(tmp_path)


def test_what_savanna_stores_and_never_uses_is_passed_over(tmp_path):
    for id, unused in (("multi-hyena", ("post_attention", "outer_mlp")), ("multi-hyena-bare", ("pre_mlp",))):
        weights, ids = random_weights(BY_ID[id], 40), torch.tensor([some_ids(40)])
        publish(tmp_path / "plain", BY_ID[id], length=40, weights=weights)
        for name in unused:
            weights[f"sequential.2.{name}_layernorm.weight"] = torch.ones(8, dtype=torch.float64)
        weights["sequential.3.attention.mixer.short_conv_weight"] = torch.ones(3, 8, 1, 4, dtype=torch.float64)
        publish(tmp_path / "full", BY_ID[id], length=40, weights=weights)
        assert torch.equal(fi.load(tmp_path / "plain")(ids), fi.load(tmp_path / "full")(ids))


def test_a_multi_hyena_whose_filters_are_modes_runs_as_recurrences():
    """Chosen by the filter alone: no tiles, the same outputs."""
    torch.manual_seed(0)
    config = MultiHyenaConfig(31, 8, 2, 100, heads=2, tied=False, filter=FilterConfig("modal", options={"modes": 3}))
    model = LanguageModel(config).double().eval().requires_grad_(False)
    ways = [(layer.part, layer.decodes, layer.why) for layer in plan(model, max_new_tokens=50).layers]
    modes = ("ModalConv", "recurrence", "a filter that is a short sum of exponentials")
    assert ways == 2 * [("ShortConv", "FIR ring", "a filter of few taps"), modes]
    tokens, decoder = torch.randint(31, (2, 100)), model.decoder()
    assert decoder.stack is None
    state = decoder.init(2, Blocked(100))
    got = [decoder.extend(state, tokens[:, a:b], every=True) for a, b in ((0, 3), (3, 4), (4, 60), (60, 100))]
    assert (torch.cat(got, 1) - model(tokens)).abs().max() <= 1e-9
    mixer = model.blocks[0].mixer
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    q, k, v = mixer.short(mixer.in_proj(x))[0].chunk(3, dim=1)
    y, h = torch.zeros(30, 8, dtype=torch.float64), mixer.recurrence.filter.taps(30)
    for t in range(30):
        for head in (slice(0, 4), slice(4, 8)):
            rho, skip = h[head.start // 4], mixer.skip[head.start // 4]
            past = sum(rho[t - i] * torch.outer(k[i, head], v[i, head]) for i in range(t + 1))
            y[t, head] = q[t, head] @ (past + skip * torch.outer(k[t, head], v[t, head]))
    assert (mixer.out_proj(y) - mixer(x)[0]).abs().max() <= 1e-9


@pytest.mark.parametrize("id", ["h3-hybrid", "safari-h3-conv", "safari-s4d", "multi-hyena-llama"])
def test_sixteen_bits_keep_filters_in_float32(tmp_path, id):
    """State spaces and filters published in float32 beside 16-bit matrices, and what that gives in float64."""
    case, wide = BY_ID[id], ("kernel", "mixer.filter", "_D", ".D", "long_conv_bias", "inv_freq")
    weights = {
        name: (tensor.float() if any(part in name for part in wide) else tensor.bfloat16())
        for name, tensor in random_weights(case, LENGTH).items()
    }
    publish(tmp_path, case)
    torch.save({"state_dict": weights} if case.outer else weights, tmp_path / "pytorch_model.bin")
    ids = some_ids()
    expected = logits(case, weights, ids)
    got = fi.load(tmp_path, dtype=torch.float64)(torch.tensor([ids]))[0].numpy()
    assert np.abs(got - expected).max() <= 1e-9 * np.abs(expected).max()
    model = fi.load(tmp_path)
    for name, tensor in model.named_parameters():
        assert tensor.dtype == torch.float32 if ".filter." in name else True
    assert model.embedding.weight.dtype == torch.bfloat16
    tokens = fi.generate(model, torch.tensor([ids[:20]]), max_new_tokens=5)
    assert tokens.shape == (1, 5)


def test_rotary_frequencies_of_another_base_are_refused(tmp_path):
    case = BY_ID["h3-hybrid"]
    weights = random_weights(case, 20)
    weights["backbone.layers.1.mixer.rotary_emb.inv_freq"] *= 2
    publish(tmp_path, case, length=20, weights=weights)
    with pytest.raises(CheckpointError, match=r"rotary_emb\.inv_freq is not what the config makes it"):
        fi.load(tmp_path)


@pytest.mark.parametrize(
    ("case", "bound"),
    [("safari-h3-conv", "the filter has 20 taps"), ("safari-h3", r"the config sets 20 .*`l_max`")],
    ids=["taps", "no-taps"],
)
def test_inputs_beyond_the_length_are_refused(tmp_path, case, bound):
    config = config_of(BY_ID[case], 20)
    publish(tmp_path, BY_ID[case], length=20, config=config | {"layer": config["layer"] | {"l_max": 20}})
    with pytest.raises(FlashInferenceError, match=rf"21 positions were given; {bound}"):
        fi.load(tmp_path)(torch.zeros(1, 21, dtype=torch.long))


def test_notes_tell_what_no_file_states(tmp_path):
    told = {}
    for case in CASES:
        publish(tmp_path / case.id, case, length=20)
        told[case.id] = "; ".join(fi.load(tmp_path / case.id).notes)
    assert "l_max is not given, and the filters end nowhere" in told["h3-hybrid"]
    assert "laid out (head, place)" in told["safari-h3-heads-fused"]
    assert "laid out (place, head)" in told["safari-h3-heads"]
    assert "lam is not given; the published default 0.1 was used" in told["safari-h3-conv-hybrid"]
    assert "causal here; the published code wraps around" in told["safari-h3-conv"]


# ------------------------------------------------------------------------------------------------------------- damages

SIZES = (("d_model",), ("n_layer",), ("d_inner",))
NEEDED = (("d_model",), ("n_layer",), ("vocab_size",))
HEAD = "lm_head.weight"
SAVANNA = tuple((name,) for name in ("num_layers", "hidden_size", "seq_length", "padded_vocab_size"))
COPIES = ("act.freq", "implicit_filter.3.freq", "implicit_filter.5.freq")
# Heads of attention are no size: any number that divides the width fits the tensors.
DAMAGED = {
    "h3-hybrid": Target("pytorch_model.bin", (*SIZES, ("ssm_cfg", "d_state")),
                        (*NEEDED, ("ssm_cfg",), ("attn_cfg", "num_heads")), (HEAD, "inv_freq")),
    "safari-h3": Target("pytorch_model.bin", SIZES, (*NEEDED, ("layer",)), (HEAD,)),
    "safari-h3-heads": Target("pytorch_model.bin", (*SIZES, ("layer", "d_state"), ("layer", "head_dim")),
                              (*NEEDED, ("layer",), ("layer", "d_state"), ("layer", "head_dim")), (HEAD,)),
    "safari-h3-conv": Target("pytorch_model.bin", (*SIZES, ("layer", "l_max")), (*NEEDED, ("layer", "l_max")), (HEAD,)),
    "safari-s4d-glu": Target("pytorch_model.bin", (*SIZES, ("layer", "d_state"), ("layer", "n_ssm")),
                             (*NEEDED, ("layer", "d_state"), ("layer", "transposed"), ("layer", "postact")), (HEAD,)),
    "multi-hyena": Target("pytorch_model.bin", (*SAVANNA, ("num_heads",)), (*SAVANNA, ("use_slow_heads",)), COPIES),
    "multi-hyena-bare": Target("pytorch_model.bin", (*SAVANNA, ("num_heads",)), (*SAVANNA, ("num_heads",)), COPIES),
    "multi-hyena-llama": Target("pytorch_model.bin", SAVANNA, (*SAVANNA, ("no_weight_tying",)), COPIES),
}  # fmt: skip


# Those of a layout that another case has too.
AGAIN = ("safari-h3-heads", "multi-hyena-llama")


def test_every_layout_is_damaged_here():
    assert {BY_ID[case].layout for case in DAMAGED if case not in AGAIN} == {layout.name for layout in LAYOUTS}


@pytest.mark.parametrize("case", [case for case in DAMAGED if case not in AGAIN])
def test_sixty_damages_are_sixty_errors(tmp_path, case):
    publish(tmp_path / "good", BY_ID[case], torch.float32, 12)
    fi.load(tmp_path / "good")
    assert survives(tmp_path / "good", tmp_path / "bad", DAMAGED[case], range(60)) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGED)
def test_five_hundred_damages(tmp_path, case):
    publish(tmp_path / "good", BY_ID[case], torch.float32, 12)
    assert survives(tmp_path / "good", tmp_path / "bad", DAMAGED[case], range(60, 560)) == []
