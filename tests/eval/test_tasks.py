"""Tasks, results and the scripts, with a scripted model in place of a real one."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from lcjax.eval.passkey import Passkey

from lcjax.checkpoint.hf import export_pretrained
from lcjax.data.tokenizers import load_tokenizer
from lcjax.eval import task as task_module
from lcjax.eval.results import describe_run, write_results
from lcjax.eval.task import Example, check_budget
from lcjax.models.spec import Attention, ModelSpec
from lcjax.serve.engine import Completion
from lcjax.serve.source import random_model
from tests.serve.toy import TOKENIZER, toy

ROOT = Path(__file__).resolve().parents[2]


class Scripted:
    """Stands in for the engine: answers each prompt with `answer(prompt text)`."""

    answer = staticmethod(lambda prompt: "")

    def __init__(self, *_):
        self.report = "scripted"

    def generate(self, requests):
        return [Completion(Scripted.answer(TOKENIZER.decode(request.prompt))) for request in requests]


@pytest.mark.parametrize("length", [512, 1000, 4097])
def test_passkey_fills_its_budget(length):
    task = Passkey(trials=1)
    examples = list(task.examples(TOKENIZER, length, seed=1))
    assert examples == list(task.examples(TOKENIZER, length, seed=1))
    assert examples != list(task.examples(TOKENIZER, length, seed=2))
    line = len(
        "The meadow is green. The sea is blue. The sun is warm. A road leads out, and a road leads home again.\n"
    )
    for example in examples:
        check_budget("passkey", example, length)
        assert length - len(example.prompt) - example.new_tokens < line
        assert TOKENIZER.decode(example.prompt).count(example.answer) == 2
    places = [TOKENIZER.decode(e.prompt).index(e.answer) / length for e in examples]
    assert places == sorted(places)
    assert len({e.key for e in examples}) == len(examples)


@pytest.mark.parametrize(("kind", "value"), [("perfect", 1.0), ("blank", 0.0), ("wrong", 0.0)])
def test_passkey_scores(kind, value, monkeypatch, tmp_path):
    answers = {
        "perfect": lambda prompt: " " + re.search(r"key is (\d+)", prompt).group(1) + ".",
        "blank": lambda prompt: "",
        "wrong": lambda prompt: "1 " + re.search(r"key is (\d+)", prompt).group(1),
    }
    monkeypatch.setattr(Scripted, "answer", staticmethod(answers[kind]))
    monkeypatch.setattr(task_module, "Generator", Scripted)
    found = Passkey(lengths=(400, 800), trials=2).run(toy(), tmp_path)
    assert found == {"passkey": {"400": value, "800": value}}
    lines = [json.loads(line) for line in (tmp_path / "passkey.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert lines[0].keys() == {"length", "key", "tokens", "depth", "trial", "answer", "text", "score"}
    assert (tmp_path / "passkey.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_cut_to_fit():
    with pytest.raises(ValueError, match=r"needs 12 tokens \(9 of prompt and 3 of answer\), over its budget of 11"):
        check_budget("toy", Example(tuple(range(9)), "", 3), 11)
    with pytest.raises(ValueError, match="a length of 100 is too small: the question alone has"):
        list(Passkey().examples(TOKENIZER, 100, seed=0))
    with pytest.raises(ValueError, match=r"depths must lie in 0..1, got 2"):
        Passkey(depths=(0.5, 2.0))


def test_results_schema(tmp_path):
    run = describe_run("config")
    assert run.keys() == {"schema", "commit", "device", "versions", "config"}
    write_results(tmp_path, {"perplexity": {"4096": 28.08}}, run)
    assert json.loads((tmp_path / "results.json").read_text()) == {"perplexity": {"4096": 28.08}, "_run": run}
    with pytest.raises(ValueError, match="_run"):
        write_results(tmp_path, {"_run": {}}, run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model as a Hugging Face folder, with a text."""
    path = tmp_path_factory.mktemp("model")
    spec = ModelSpec(
        vocab_size=load_tokenizer("bytes").vocab_size, width=16, mlp_width=32, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=8, pattern=(Attention(),), dtype="float32", max_length=2048,
    )  # fmt: skip
    export_pretrained(spec, random_model(spec, TOKENIZER).params, path)
    (path / "text.txt").write_text("Some words to read. " * 60)
    return path


def script(name, *flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *flags])
    runpy.run_path(str(ROOT / name), run_name="__main__")


def bindings(*lines):
    return [f"--gin_bindings={line}" for line in lines]


def test_evaluate_script(folder, tmp_path, monkeypatch, capsys):
    flags = bindings(
        f'pretrained.source="{folder}"', 'pretrained.tokenizer="bytes"', f'perplexity.text="{folder / "text.txt"}"',
        "perplexity.start=7", "perplexity.lengths=(256,)", "perplexity.chunk=128",
    )  # fmt: skip
    gin = "--gin_file=configs/eval/smollm2_perplexity.gin"
    script("evaluate.py", gin, *flags, f"--output={tmp_path}", monkeypatch=monkeypatch)
    results = json.loads((tmp_path / "results.json").read_text())
    assert 1 < results["perplexity"]["256"] < 1000
    assert "perplexity.start = 7" in results["_run"]["config"]
    assert "perplexity 256:" in capsys.readouterr().out
    for flag, message in (
        ('perplexity.text="none.txt"', "perplexity.text names 'none.txt', which is not a file"),
        ("perplexity.start=10000", "use a longer text or shorter lengths"),
        ("perplexity.lenghts=(1,)", "did you mean 'lengths'"),
    ):
        with pytest.raises(SystemExit) as stop:
            script("evaluate.py", gin, *flags, *bindings(flag), f"--output={tmp_path}", monkeypatch=monkeypatch)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_decode_script(folder, tmp_path, monkeypatch, capsys):
    flags = bindings(
        f'pretrained.source="{folder}"', 'pretrained.tokenizer="bytes"', "generate.max_new_tokens=6",
        "generate.chat=False", "generate.engine=@Engine()", "Engine.chunk=32",
    )  # fmt: skip
    gin = "--gin_file=configs/decode/smollm2.gin"
    (tmp_path / "prompt.txt").write_text("from a file")
    prompts = ["--prompt=one", f"--prompt_file={tmp_path / 'prompt.txt'}"]
    script("decode.py", gin, *flags, *prompts, f"--output={tmp_path}", monkeypatch=monkeypatch)
    shown = capsys.readouterr()
    assert "[0]" in shown.out
    assert "[1]" in shown.out
    assert re.search(r"prefill 14 tokens at [\d.,]+ tokens/s, decode 10 tokens .* cache [\d,]+ bytes", shown.err)
    assert (tmp_path / "answers.txt").is_file()
    with pytest.raises(SystemExit):
        script("decode.py", gin, *flags, "--prompt=" + "x" * 3000, monkeypatch=monkeypatch)
    assert "the prompt has 3000 tokens" in capsys.readouterr().err
