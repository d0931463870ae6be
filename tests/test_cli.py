"""The command line: what it prints is what the library gives, and it fails in one line."""

import dataclasses
import gzip
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import flash_inference as fi
from flash_inference.cli import COMMANDS, app
from flash_inference.cli.plan import _ranges
from flash_inference.cli.records import parse
from flash_inference.cli.source import Source
from flash_inference.models.hyena import FilterConfig, HyenaConfig
from flash_inference.ops.tile_conv import TILE_CONV_IMPLS, Choice, Impl, table_path

BYTES = HyenaConfig(256, 8, 1, 512, filter=FilterConfig(width=8))
DNA = dataclasses.replace(BYTES, vocab_size=16, tokens="dna", start_token=2)
LONG = dataclasses.replace(BYTES, length=1 << 17)


def module(name):
    return sys.modules[f"flash_inference.cli.{name}"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in {"bytes": BYTES, "dna": DNA, "long": LONG}.items():
        torch.manual_seed(0)
        model = fi.LanguageModel(config).requires_grad_(False)
        torch.nn.init.normal_(model.embedding.weight)
        fi.save(model, folder / name)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(models, tmp_path, monkeypatch):
    """Runs in a folder of models, with a tuning table of its own."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*arguments, input=None, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def rows(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def start(*arguments, **settings):
    environment = os.environ | {"PYTHONPATH": str(Path(fi.__file__).parents[1])}
    command = [sys.executable, "-m", "flash_inference.cli", *arguments]
    pipe = subprocess.PIPE
    # A suite that runs in the background ignores Ctrl-C, and so would what it starts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment, preexec_fn=heed, **settings)


# ------------------------------------------------------------------------------------------------------- all commands


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_every_command_explains_itself(command):
    shown = run(command, "--help").stdout
    assert "Example" in shown
    assert f"flash-inference {command}" in shown
    assert "--json" in shown
    assert command in run("--help").stdout


def test_version():
    assert run("--version").stdout == f"flash-inference {fi.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "shakespare"),
        ("generate", "./bytes", "--tokens", 1000),
        ("generate", "./bytes", "--temperature", -1),
        ("generate", "./bytes", "--prompt", "a", "--prompt-file", "b"),
        ("generate", "./bytes", "--prompt-file", "missing.txt"),
        ("generate", "./bytes", "--logprobs"),
        ("generate", "./bytes", "prompt"),
        ("generate", "./dna", "--prompt", "ACGU"),
        ("score", "./bytes", "--text", ""),
        ("score", "./bytes", "--text", "a", "--reverse-complement"),
        ("score", "./bytes", "--fasta", "dna/config.json"),
        ("score", "./dna", "--text", "ACXG"),
        ("score", "./dna", "--text", "ACGT", "--npz", "no/such/folder.npz"),
        ("score", "./bytes", "--text", "a", "--npz", "a.npz", "--json"),
        ("embed", "./bytes", "--text", "a", "--layer", 3),
        ("embed", "./bytes", "--text", "a", "--pool", "max"),
        ("embed", "./bytes", "--text", ""),
        ("embed", "./bytes", "--text", "a", "--npz", "a.npz", "--json"),
        ("verify", "./bytes", "--dtype", "int8"),
        ("plan", "./bytes", "--tokens", 600),
        ("plan", "./bytes", "--tiling", "rlaxed"),
        ("plan", "./bytes", "--tokens", 10, "--device", "abacus"),
        ("plan", "./bytes", "--tokens", 10, "--state-dtype", "int8"),
        ("draw", "relaxed", 10, "--near", 4),
        ("draw", "relaxed", 65),
        ("draw", "relaxed", 10, "--prompt", 10),
        ("bench", "no_such"),
        ("tune", "--device", "abacus"),
        ("demo", "--model", "./bytes", "--tokens", 512),
    ],
)
def test_errors_are_one_line(arguments):
    result = run(*arguments, code=2)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


# ----------------------------------------------------------------------------------------------------------- generate


def test_generate_prints_what_the_library_generates():
    model = fi.load("./bytes")
    tokens = fi.generate(model, "Hi", max_new_tokens=60, temperature=1.0, top_k=40, seed=3)
    arguments = ("generate", "./bytes", "--tokens", 60, "--seed", 3, "--top-k", 40)
    result = run(*arguments, "--prompt", "Hi")
    assert result.stdout == model.tokens.decode(tokens[0])
    assert "60 tokens in" in result.stderr
    assert "tokens/s" in result.stderr
    assert run(*arguments, "-", input="Hi").stdout == result.stdout


def test_generate_json():
    model = fi.load("./bytes")
    expected = fi.generate(model, "Hi", max_new_tokens=9, temperature=1.0, seed=3, n=2, allowed=[97, 98], logprobs=True)
    result = run(
        "generate", "./bytes", "--prompt", "Hi", "--tokens", 9, "--seed", 3, "--n", 2, "--allowed", "ab", "--json",
        "--logprobs",
    )  # fmt: skip
    for row, tokens, logprobs in zip(rows(result), *expected, strict=True):
        assert row["tokens"] == tokens.tolist()
        assert row["logprobs"] == logprobs.tolist()
        assert row["text"] == model.tokens.decode(tokens)
        assert row["complete"]
        assert not row["stopped"]


def test_generate_stops_after_a_stop_string():
    settings = ("generate", "./bytes", "--temperature", 50, "--seed", 3, "--json")
    (row,) = rows(run(*settings, "--tokens", 200, "--allowed", "abc", "--stop", "ab", "--stop", "ca"))
    assert row["stopped"]
    assert row["text"].endswith(("ab", "ca"))
    assert row["new_tokens"] < 200
    (row,) = rows(run(*settings, "--tokens", 5, "--allowed", "97,"))
    assert row["text"] == "aaaaa"


def test_generate_many_samples_of_text():
    shown = run("generate", "./bytes", "--tokens", 5, "--n", 2, "--allowed", "abc", "--seed", 1).stdout
    assert [line[:14] for line in shown.splitlines()[::2]] == ["==> sample 1 o", "==> sample 2 o"]


def test_generate_dna_prints_fasta(tmp_path):
    path = tmp_path / "in.fa"
    path.write_text(">first one\nACGT\nacgt\n>second\nAC\n")
    model = fi.load("./dna")
    letters = model.tokens.letters
    expected = fi.generate(model, ["ACGTACGT", "AC"], max_new_tokens=100, temperature=1.0, seed=5, n=2, allowed=letters)
    settings = ("generate", "./dna", "--tokens", 100, "--seed", 5)
    shown = run(*settings, "--fasta", path, "--n", 2).stdout
    records = list(parse(Source.of_text("stdout", shown)))
    assert [record.name for record in records] == ["first_1", "first_2", "second_1", "second_2"]
    assert [record.text for record in records] == [model.tokens.decode(row) for row in expected]
    assert max(len(line) for line in shown.splitlines() if line[0] != ">") == 70
    live = parse(Source.of_text("stdout", run(*settings, "--prompt", "ACGT ACGT").stdout))
    assert [record.text for record in live] == [records[0].text]


def test_generate_reads_packed_fastq_and_repeated_names(tmp_path):
    path = tmp_path / "reads.gz"
    path.write_bytes(gzip.compress(b"@r 1\r\nacg\r\n+\r\n@@@\r\n@r 2\r\nTT\r\n+\r\n!!"))
    model = fi.load("./dna")
    expected = fi.generate(
        model, ["ACG", "TT"], max_new_tokens=9, temperature=1.0, seed=5, allowed=model.tokens.letters
    )
    result = run("generate", "./dna", "--tokens", 9, "--seed", 5, "--fasta", path)
    records = list(parse(Source.of_text("stdout", result.stdout)))
    assert [record.name for record in records] == ["r_1", "r_1"]
    assert [record.text for record in records] == [model.tokens.decode(row) for row in expected]
    assert "line 5 repeats the name 'r'" in result.stderr


def test_interrupted_json_keeps_what_was_made(monkeypatch):
    engine = importlib.import_module("flash_inference.engine.generate")
    whole = engine.stream_steps

    def interrupted(*arguments, **settings):
        for count, step in enumerate(whole(*arguments, **settings)):
            if count == 7:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(engine, "stream_steps", interrupted)
    (row,) = rows(run("generate", "./bytes", "--tokens", 50, "--json", code=130))
    assert row["new_tokens"] == len(row["tokens"]) == 7
    assert not row["complete"]


def test_interrupt_ends_cleanly():
    with start("generate", "./long", "--tokens", "100000", "--seed", "1", "--allowed", "abcd") as process:
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert b"tokens/s" in errors
    assert set(first + rest) <= set(b"abcd")


def test_closed_pipe_ends_cleanly():
    with start("generate", "./long", "--tokens", "100000", "--allowed", "abcd") as process:
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert b"Traceback" not in errors
    assert b"Error" not in errors


# -------------------------------------------------------------------------------------------------------------- score


def test_score():
    expected = float(fi.score(fi.load("./bytes"), "hello").sum())
    (row,) = rows(run("score", "./bytes", "--text", "hello", "--json"))
    assert row["tokens"] == 5
    assert row["log_likelihood"] == pytest.approx(expected)
    assert row["bits_per_token"] == pytest.approx(-expected / 5 / math.log(2))
    header, line = run("score", "./bytes", input="hello").stdout.splitlines()
    assert header.split("\t") == ["record", "tokens", "log_likelihood", "bits_per_token"]
    assert line.split("\t")[:2] == ["stdin", "5"]
    assert float(line.split("\t")[2]) == pytest.approx(expected, abs=1e-5)


def test_score_per_token():
    expected = fi.score(fi.load("./bytes"), "a\tb")[0].tolist()
    lines = [line.split("\t") for line in run("score", "./bytes", "--text", "a\tb", "--per-token").stdout.splitlines()]
    assert [line[3] for line in lines[1:]] == ["a", "\\t", "b"]
    assert [float(line[4]) for line in lines[1:]] == pytest.approx(expected, abs=1e-5)
    (row,) = rows(run("score", "./bytes", "--text", "a\tb", "--per-token", "--json"))
    assert row["log_likelihoods"] == pytest.approx(expected)


def test_score_both_strands():
    model = fi.load("./dna")
    fasta = ">a\nACG\nTT\n\n>b more\nggn\n"
    found = rows(run("score", "./dna", "--reverse-complement", "--json", input=fasta))
    for row, (name, strands) in zip(found, {"a": ("ACGTT", "AACGT"), "b": ("GGN", "NCC")}.items(), strict=True):
        forward, other = (float(fi.score(model, strand).sum()) for strand in strands)
        assert row["record"] == name
        assert row["forward"] == pytest.approx(forward)
        assert row["reverse_complement"] == pytest.approx(other)
        assert row["log_likelihood"] == pytest.approx((forward + other) / 2)


def test_score_per_token_of_both_strands():
    expected = fi.score(fi.load("./dna"), "ACGTT", reverse_complement=True)[0].tolist()
    (row,) = rows(run("score", "./dna", "--reverse-complement", "--per-token", "--text", "ACGTT", "--json"))
    assert row["log_likelihoods"] == pytest.approx(expected)
    assert row["log_likelihood"] == pytest.approx(sum(expected))


def test_score_writes_arrays(tmp_path):
    path = tmp_path / "out.npz"
    assert run("score", "./dna", "--npz", path, input=">a\nACG\n>a\nTT\n>b\nACG\n").stdout == ""
    with np.load(path) as found:
        assert found["names"].tolist() == ["a", "a", "b"]
        assert found["lengths"].tolist() == [3, 2, 3]
        expected = torch.cat([row[0] for row in fi.score(fi.load("./dna"), ["ACG", "TT", "ACG"])])
        assert found["log_likelihoods"] == pytest.approx(expected.numpy(), abs=1e-6)


def test_records_are_checked_before_any_is_scored():
    result = run("score", "./dna", input=">a\nACG\n>b\nACG\nAXG\n", code=2)
    assert result.stdout == ""
    assert "stdin line 5, record 'b': character 'X' at index 1" in result.stderr


# -------------------------------------------------------------------------------------------------------------- embed


@pytest.mark.parametrize("pool", ["none", "mean", "last"])
def test_embed(tmp_path, pool):
    texts = {"a": "ACGTT", "b": "ggn", "c": "ACGTA"}
    fasta = "".join(f">{name}\r\n{text}\r\n" for name, text in texts.items())
    found = fi.embed(fi.load("./dna"), list(texts.values()), layer=0, pool=pool)
    expected = [row.reshape(-1, 8) for row in found]
    arguments = ("embed", "./dna", "--layer", 0, "--pool", pool)
    header, *lines = run(*arguments, input=fasta).stdout.splitlines()
    assert header.split("\t")[:3] == ["record", "position" if pool == "none" else "tokens", "d0"]
    shown = torch.tensor([[float(cell) for cell in line.split("\t")[2:]] for line in lines])
    assert torch.equal(shown, torch.cat(expected))
    numbers = [int(line.split("\t")[1]) for line in lines]
    assert numbers == ([1, 2, 3, 4, 5, 1, 2, 3, 1, 2, 3, 4, 5] if pool == "none" else [5, 3, 5])
    for row, vectors in zip(rows(run(*arguments, "--json", input=fasta)), expected, strict=True):
        assert torch.equal(torch.tensor(row["embedding"]).reshape(-1, 8), vectors)
    path = tmp_path / "out.npz"
    run(*arguments, "--npz", path, input=fasta)
    with np.load(path) as arrays:
        assert arrays["names"].tolist() == list(texts)
        assert arrays["lengths"].tolist() == [len(vectors) for vectors in expected]
        assert np.array_equal(arrays["embeddings"], torch.cat(expected).numpy())


# ------------------------------------------------------------------------------------------------------ verify, plan


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_verify(dtype):
    (row,) = rows(run("verify", "./bytes", "--prompt", "Hi", "--tokens", 40, "--dtype", dtype, "--json"))
    assert row["equal"]
    assert row["first"] is None
    assert row["dtype"] == dtype
    assert row["tokens"] == 40
    assert run("verify", "./bytes", "--tokens", 10).stdout.startswith("equal: 10 greedy tokens")


def test_verify_tells_where_decoding_differs(monkeypatch):
    engine = importlib.import_module("flash_inference.engine.verify")
    whole = engine._decode

    def wrong(*arguments):
        tokens, logits = whole(*arguments)
        tokens[6] = (tokens[6] + 1) % 256
        return tokens, logits

    monkeypatch.setattr(engine, "_decode", wrong)
    shown = run("verify", "./bytes", "--tokens", 10, code=1).stdout
    assert shown.startswith("differ: first at position 7, cached ")


def test_plan():
    (row,) = rows(run("plan", "./bytes", "--prompt", 50, "--tokens", 400, "--batch", 2, "--json"))
    parts = row["bytes"]
    at_once = parts["state"] + parts["filters"] + parts["workspace"]
    assert parts["total"] == at_once + max(parts["spectra"], parts["activations"])
    assert min(parts.values()) > 0
    assert row["positions"] == 450
    assert row["work"]["lazy"]["of_lazy"] == 1
    assert row["work"]["relaxed"]["total"] < row["work"]["lazy"]["total"]
    assert set(row["work"]) == {"lazy", "eager", "epoched", "relaxed", "blocked", "spread"}
    shown = run("plan", "./bytes", "--tokens", 100, "--tiling", "blocked").stdout
    assert "Prompted(Blocked(99), 1)" in shown
    assert "workspace" in shown
    assert [(layer["part"], layer["decodes"]) for layer in row["layers"]] == [
        ("ImplicitFilter", "tiles"),
        ("ShortConv", "FIR ring"),
    ]
    assert "a long filter without a short recurrence" in shown
    run("plan", "./bytes", "--tokens", 1)


def test_plan_for_a_gpu_that_is_elsewhere():
    (row,) = rows(run("plan", "./bytes", "--tokens", 400, "--device", "cuda", "--free", 2, "--json"))
    parts = row["bytes"]
    assert parts.pop("total") == sum(parts.values())
    assert set(parts) == {"state", "weights", "filters", "spectra", "workspace", "graphs"}
    assert row["fits"]
    half = run(
        "plan", "./bytes", "--tokens", 400, "--device", "cuda", "--free", 2, "--state-dtype", "bfloat16", "--json"
    )
    assert rows(half)[0]["bytes"]["state"] < parts["state"]
    told = run("plan", "./bytes", "--tokens", 400, "--device", "cuda", "--free", 0.01, code=2).stderr
    assert "400 positions need" in told
    assert "0.01 GiB are free" in told


# --------------------------------------------------------------------------------------------------------------- tune


@pytest.fixture
def small(monkeypatch):
    tune = module("tune")
    for name, value in {"SIDES": (2, 48), "QUICK_CHANNELS": (8,), "QUICK_SECONDS": 1e-4}.items():
        monkeypatch.setattr(tune, name, value)


@pytest.mark.usefixtures("small")
def test_tune_writes_the_table():
    run("tune", "--quick")
    table = Choice.load().measurements
    assert [(m.side, m.impl) for m in table] == [(s, i) for s in (2, 48) for i in ("direct", "fft")]
    assert all(m.microseconds > 0 and m.error > 0 for m in table)
    (shown,) = rows(run("tune", "--show", "--json"))
    assert shown == [dataclasses.asdict(m) for m in table]


@pytest.mark.usefixtures("small")
def test_tune_refuses_a_wrong_implementation(monkeypatch):
    def wrong(y, filter, first, out, channels):
        TILE_CONV_IMPLS[Impl.DIRECT](y, filter, first, out, channels)
        out[-1] *= 1 + 1e-5

    monkeypatch.setitem(TILE_CONV_IMPLS, Impl.FFT, wrong)
    result = run("tune", "--quick", code=1)
    assert result.stderr.count("wrong: fft at side 2") == 1
    assert {m.impl for m in Choice.load().measurements} == {"direct"}


@pytest.mark.usefixtures("small")
def test_interrupted_tune_writes_nothing(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(TILE_CONV_IMPLS, Impl.FFT, interrupt)
    run("tune", "--quick", code=130)
    assert not table_path().exists()


# -------------------------------------------------------------------------------------------------------- draw, bench


def test_draw(tmp_path):
    assert "Relaxed(8)" in run("draw", "relaxed", 8).stdout
    shown = run("draw", "spread", 40, "--near", 4, "--every", 2, "--prompt", 3, "--taps", 20).stdout
    assert "Prompted(Spread(Separated(37, " in shown
    path = tmp_path / "picture.svg"
    run("draw", "epoched", 100, "--epoch", 10, "--svg", path)
    assert path.read_text().startswith("<svg")
    (row,) = rows(run("draw", "relaxed", 4, "--json"))
    assert row["payments"][1] == {"after": 1, "sources": [0, 2], "targets": [2, 4]}


def test_bench(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "rows.py").write_text('"""Helpers."""\n')
    (folder / "cost.py").write_text(
        '"""What does it cost?\n\nMuch."""\nimport sys\ndef main(argv):\n    print(argv)\n    return 3\n'
        'if __name__ == "__main__":\n    sys.exit(main(sys.argv[1:]))\n'
    )
    assert rows(run("bench", "--json")) == [[{"name": "cost", "question": "What does it cost?"}]]
    assert "What does it cost?" in run("bench", "--list").stdout
    run("bench", "cost", "--quick", "--out", "here", "--length", "5", code=3)
    assert capfd.readouterr().out == "['--length', '5', '--quick', '--out', 'here']\n"


def test_bench_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module("bench"), "__file__", str(tmp_path / "site/flash_inference/cli/bench.py"))
    assert "source checkout" in run("bench", code=2).stderr


# -------------------------------------------------------------------------------------------------------- doctor, demo


def test_doctor():
    (found,) = rows(run("doctor", "--json"))
    assert found["flash_inference"] == fi.__version__
    assert found["torch"] == torch.__version__
    assert found["sound"]
    assert "built-in table" in run("doctor").stdout
    table_path().parent.mkdir(parents=True)
    table_path().write_text("{")
    assert "cannot be read" in run("doctor", code=1).stdout


def test_demo_reads_the_newest_committed_rows(tmp_path, monkeypatch):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module("demo"), "__file__", str(tmp_path / "site/flash_inference/cli/demo.py"))
    committed = module("demo").committed
    assert committed(65536) is None
    lines = [
        {"decoder": "flash", "length": 65536, "us_per_token": 100},
        {"decoder": "lazy", "length": 65536, "us_per_token": 500},
        {"decoder": "lazy", "length": 1024, "us_per_token": 5},
        {"decoder": "flash", "length": 65536, "us_per_token": 90},
    ]
    (results / "cpu_length.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert committed(65536) == {"flash": 90, "lazy": 500}


def test_demo_tells_all():
    shown = run("demo", "--model", "./bytes", "--tokens", 40).stdout
    assert "40 greedy tokens equal to full recomputation" in shown
    assert "at a prefix of 10" in shown
    assert "at 65,536 tokens" in shown
    (row,) = rows(run("demo", "--model", "./bytes", "--tokens", 40, "--json"))
    assert row["equal"]
    assert shown.startswith(row["text"])


def test_blocks_that_decode_alike_share_a_line():
    assert [_ranges(numbers) for numbers in ([0], [0, 0], [0, 1, 2], [0, 2, 3, 7])] == ["0", "0", "0-2", "0, 2-3, 7"]
