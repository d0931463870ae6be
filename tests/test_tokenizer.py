"""Token tables of files, and the tables of published families."""

from __future__ import annotations

import json

import pytest
import torch

import flash_inference as fi
from flash_inference.errors import CheckpointError, ModelError, TokenError
from flash_inference.models.tokenizer import FileTable, read_tokenizer
from flash_inference.models.tokens import DNA, MULTIMOLECULE_DNA, STRIPED_BYTES, TOKENIZER
from flash_inference.testing.models import random_model


def tokenizer_json() -> str:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"th": 256, "Ġth": 257}
    model = tokenizers.models.BPE(vocabulary, [("t", "h"), ("Ġ", "th")])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str()


@pytest.fixture
def table() -> FileTable:
    return FileTable(tokenizer_json())


def streamed(table, tokens):
    decoder = table.decoder()
    return "".join([*(decoder.push(token) for token in tokens), decoder.finish()])


@pytest.mark.parametrize("text", ["", "the other thing", "naïve 漢字 🧬 th", "\n\t ", "��x"])
def test_text_goes_there_and_back_whole_and_in_pieces(table, text):
    tokens = table.encode(text)
    assert table.decode(tokens) == streamed(table, tokens) == text


def test_any_ids_stream_as_they_decode(table):
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        tokens = torch.randint(table.vocab_size, (12,), generator=generator).tolist()
        assert streamed(table, tokens) == table.decode(tokens)


def test_ids_outside_and_text_of_another_type_are_told(table):
    assert table.vocab_size == 259
    assert table.letters == tuple(range(259))
    with pytest.raises(TokenError, match=r"token id 259 is outside tokenizer\.json"):
        table.decode([259])
    with pytest.raises(TokenError, match="text is bytes"):
        table.encode(b"x")
    with pytest.raises(TokenError, match="cannot be encoded"):
        table.encode("\ud800")


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (tmp_path / TOKENIZER).write_text("{}")
    table = read_tokenizer(tmp_path / TOKENIZER)
    with pytest.raises(ModelError, match=r"needs the package tokenizers: pip install 'flash-inference\[tokenizers\]'"):
        table.encode("x")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / TOKENIZER).write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        read_tokenizer(tmp_path / TOKENIZER)
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    with pytest.raises(CheckpointError, match="is no tokenizer"):
        FileTable(json.dumps({"version": "1.0"})).encode("x")


def test_a_model_takes_its_tokenizer_along(tmp_path):
    model = random_model(tokens=TOKENIZER, vocab_size=260)
    with pytest.raises(ModelError, match=r"needs its family's tokenizer\.json"):
        _ = model.tokens
    model.table = FileTable(tokenizer_json())
    fi.save(model, tmp_path)
    again = fi.load(tmp_path)
    assert again.tokens.encode("the th") == model.tokens.encode("the th")
    made = fi.generate(again, "the", max_new_tokens=5)
    assert torch.equal(made, fi.generate(model, "the", max_new_tokens=5))
    (tmp_path / TOKENIZER).write_bytes((tmp_path / TOKENIZER).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        fi.load(tmp_path)


def test_striped_hyenas_bytes():
    assert STRIPED_BYTES.vocab_size == 512
    assert STRIPED_BYTES.encode("Aé") == [65, 0xC3, 0xA9]
    assert STRIPED_BYTES.decode([0, 1, 31, 32, 65, 0xC3, 0xA9, 10]) == "    Aé "
    assert STRIPED_BYTES.decode([65, 256, 511]) == "A��"
    assert streamed(STRIPED_BYTES, [0xC3, 0xA9, 300, 7]) == "é� "
    assert max(STRIPED_BYTES.letters) == 255
    with pytest.raises(TokenError, match="token id 512"):
        STRIPED_BYTES.decode([512])


def test_dna_tables_have_no_separator_behind_the_text():
    assert DNA.encode("ACGTN") == [7, 8, 9, 10, 11]
    assert MULTIMOLECULE_DNA.encode("acgtn") == [6, 7, 8, 9, 10]
    assert MULTIMOLECULE_DNA.letters == (6, 7, 8, 9)
    assert MULTIMOLECULE_DNA.decode([1, 6, 9, 2, 11]) == "<cls>AT<eos>[11]"
    assert MULTIMOLECULE_DNA.vocab_size == 16
