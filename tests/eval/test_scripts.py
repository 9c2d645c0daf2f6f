"""Results and the scripts."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from lcjax.checkpoint.hf import export_pretrained
from lcjax.data.tokenizers import load_tokenizer
from lcjax.eval.metrics.judge import JudgeError, ask_scores
from lcjax.eval.model_judge import ModelJudge
from lcjax.eval.results import describe_run, write_results
from lcjax.models.spec import Attention, ModelSpec
from lcjax.serve.source import Pretrained, random_model
from tests.serve.toy import TOKENIZER

ROOT = Path(__file__).resolve().parents[2]


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
    assert len(results["_run"]["seconds"]) == 1
    assert results["_run"]["seconds"][0] > 0
    assert results["_run"]["peak_device_bytes"] is None, "a CPU has no figure"
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


def test_evaluate_script_compares_models(folder, tmp_path, monkeypatch, capsys):
    """Two models, a task with a missing field beside a sound one: a table with differences, pages and figures."""
    row = {"prompt": "Say x", "references": ["x"], "metric": "any_substring", "max_new_tokens": 4}
    for name, bad in (("mine", ()), ("broken", ("metric",))):
        rows = [{"id": str(i), **{k: v for k, v in row.items() if k not in bad}} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = bindings(
        f'pretrained.source="{folder}"', 'pretrained.tokenizer="bytes"', f'bfloat16/pretrained.source="{folder}"',
        "suite.tasks=(@mine/json_task(), @broken/json_task())", "suite.lengths=(128, 256)",
        f'mine/json_task.source="{tmp_path / "mine.jsonl"}"', f'broken/json_task.source="{tmp_path / "broken.jsonl"}"',
    )  # fmt: skip
    gin = "--gin_file=configs/eval/compare.gin"
    script("evaluate.py", gin, *flags, f"--output={tmp_path}", monkeypatch=monkeypatch)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"base/mine", "bfloat16/mine"} <= results.keys()
    shown = capsys.readouterr().out
    assert re.search(r"task +tokens +base +bfloat16", shown)
    assert re.search(r"mine +128 +\d+\.\d \[.*\] +\+0\.0 \[", shown)
    assert "broken at 128: missing: broken.jsonl, row 1: the field 'metric' is missing" in shown
    page = (tmp_path / "ruler_comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 1  # no mean where a task is missing: scores, but not by memory
    assert "bfloat16: broken at 128" in page
    assert (tmp_path / "base" / "ruler.html").is_file()


def test_a_model_judges(folder):
    judge = ModelJudge(Pretrained(str(folder), tokenizer="bytes"), max_tokens=5)
    assert judge.name == str(folder)
    assert judge("Is it good?") == judge("Is it good?")
    with pytest.raises(JudgeError, match="gave no readable scores for Clarity in 1 replies"):
        ask_scores(judge, "Is it good?", ("Clarity",), low=1, high=5, retries=1)
    with pytest.raises(ValueError, match="the cache holds 2048"):
        judge("x" * 3000)


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
