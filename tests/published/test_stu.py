"""Flash STU: the laws of all published models, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from published_laws import LAWS, publish, write
from stu_reference import CASES

import flash_inference as fi
from flash_inference.errors import CheckpointError, ModelError
from flash_inference.models.stu import STUConfig, alibi_slopes
from flash_inference.tiling import Blocked


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_published(tmp_path, case, law):
    law(tmp_path, case)


def test_an_approximate_unit_is_one_strided_convolution(tmp_path):
    publish(tmp_path, CASES[0])
    decoder = fi.load(tmp_path).decoder()
    assert decoder.stack.filter.stride == 2
    assert decoder.stack.filter.rho.shape == (2 * 8, 150)


def test_all_units_have_one_basis(tmp_path):
    weights = publish(tmp_path, CASES[1])
    model = fi.load(tmp_path)
    bases = {id(block.mixer.filter.phi) for block in model.blocks}
    assert len(bases) == 1
    assert torch.equal(model.blocks[2].mixer.filter.phi, weights["phi"])


def test_the_basis_may_keep_float32_among_16_bits(tmp_path):
    weights = publish(tmp_path, CASES[0], torch.bfloat16, length=20)
    weights["phi"] = weights["phi"].float() + 1e-5
    write(tmp_path / CASES[0].file, weights)
    assert torch.equal(fi.load(tmp_path).blocks[0].mixer.filter.phi, weights["phi"])


UNSUPPORTED = [
    {"bias": True}, {"dilation": 2}, {"num_eigh": 21}, {"num_eigh": 0}, {"hidden_size": 9}, {"window_size": [9, 0]},
    {"intermediate_size": 9}, {"use_approx": 1}, {"use_attn": "yes"}, {"softcap": -1}, {"n_heads": 0},
    {"n_layers": 10**9}, {"mlp_scale": 2.5}, {"mlp_activation": "relu"},
]  # fmt: skip


@pytest.mark.parametrize("setting", UNSUPPORTED, ids=str)
def test_settings_that_mean_another_model_are_refused_by_name(tmp_path, setting):
    publish(tmp_path, CASES[0], length=20, **setting)
    name = "asks for 1000000000 layers" if "n_layers" in setting else f"{next(iter(setting))} = .*expected"
    with pytest.raises(CheckpointError, match=name):
        fi.load(tmp_path)


def test_a_basis_of_another_length_is_refused(tmp_path):
    publish(tmp_path, CASES[0], length=20, seq_len=24)
    with pytest.raises(CheckpointError, match=r"phi is \[20, 5\], expected \[24, 5\]"):
        fi.load(tmp_path)


def test_a_missing_basis_is_not_computed(tmp_path):
    weights = publish(tmp_path, CASES[0], length=20)
    del weights["phi"]
    write(tmp_path / CASES[0].file, weights)
    with pytest.raises(CheckpointError, match=r"missing phi \[20, 5\]"):
        fi.load(tmp_path)


@pytest.mark.parametrize("form", ["tensordot", "exact"])
@pytest.mark.parametrize("hankel", ["Z", "L"])
def test_a_fresh_model_has_the_basis_of_its_hankel_matrix(tmp_path, form, hankel):
    config = STUConfig(19, 6, 3, 40, pattern=("stu", "attention", "stu"), count=4, form=form, hankel=hankel, heads=3)
    model = fi.LanguageModel(config).double().eval().requires_grad_(False)
    tokens = torch.randint(19, (2, 40))
    decoder = model.decoder()
    state = decoder.init(2, Blocked(40))
    got = torch.cat([decoder.extend(state, piece, every=True) for piece in tokens.split([3, 1, 1, 20, 15], 1)], 1)
    assert (got - model(tokens)).abs().max() <= 1e-10
    fi.save(model, tmp_path)
    assert torch.equal(fi.load(tmp_path)(tokens), model(tokens))


def test_slopes_between_powers_of_two():
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


def test_a_pattern_names_what_there_is():
    with pytest.raises(ModelError, match=r"STUConfig\.pattern = \('stu', 'ssm'\) is out of range"):
        STUConfig(19, 6, 2, 40, pattern=("stu", "ssm"), count=4)
