"""Every gin file of a suite builds its job, and bad bindings are refused before anything runs."""

from pathlib import Path

import pytest

from lcjax import settings
from lcjax.eval.compare import Compare, Variant, comparison
from lcjax.eval.metrics.judge import HttpJudge
from lcjax.eval.outcome import Cell, Outcome
from lcjax.eval.report import write_comparison
from lcjax.eval.runner import Suite, flatten
from lcjax.positions import DualChunk
from tests.eval_suites import fixtures

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "eval"
NEEDED = {
    "leval": ("leval.source", fixtures.leval),
    "longbench": ("longbench.source", fixtures.longbench),
    "mmlongbench": ("mmlongbench.source", lambda folder: fixtures.mmlongbench(folder / "rows.jsonl")),
}
SUITES = {
    "ruler": 13,
    "needle_threading": 28,
    "babilong": 5,
    "giraffe": 3,
    "reasoning": 3,
    "leval": 7,
    "longbench": 21,
    "helmet": 5,
    "longbench_write": 1,
    "mmlongbench": 1,
    "smollm2_passkey": 1,
}


@pytest.mark.parametrize("name", SUITES)
def test_suites_build(name, tmp_path):
    bindings = []
    if name in NEEDED:
        key, make = NEEDED[name]
        bindings = [f"{key} = {make(tmp_path)!r}"]
    job, config = settings.load("evaluate", [FOLDER / f"{name}.gin"], bindings)
    (suite,) = job.tasks
    assert isinstance(suite, Suite)
    assert suite.name == name.removeprefix("smollm2_")
    assert len(list(flatten(suite.tasks))) == SUITES[name]
    assert "suite.lengths" in config


def test_a_macro_names_the_texts_of_an_extended_model():
    books = ["FIRST = 'a.txt'", "SECOND = 'b.txt'"]
    job, _ = settings.load("evaluate", [FOLDER / "extended.gin"], books)
    assert [task.text for task in job.tasks[:4]] == ["a.txt", "b.txt"] * 2
    with pytest.raises(settings.SettingsError, match="SECOND"):
        settings.load("evaluate", [FOLDER / "extended.gin"], books[:1])


def test_books_of_a_million_tokens_are_one_binding():
    job, _ = settings.load("evaluate", [FOLDER / "million.gin"], ["BOOKS = ('a.txt', 'b.txt')"])
    (compared,) = job.tasks
    (measure,), (law,) = compared.perplexities, compared.laws
    assert measure.text == ("a.txt", "b.txt")
    assert max(measure.lengths) == 2**20 == 64 * measure.chunk == 16 * measure.window
    assert law.remap == DualChunk(6144, 1024)


def test_copy_recall_and_compare_build():
    bindings = ["copy_recall.filler = 'a.txt'", "copy_recall.passages = 'b.txt'"]
    job, _ = settings.load("evaluate", [FOLDER / "copy_recall.gin"], bindings)
    assert job.tasks[0].lengths == (2048, 4096, 8192)
    job, _ = settings.load("evaluate", [FOLDER / "compare.gin"])
    (compare,) = job.tasks
    assert isinstance(compare, Compare)
    assert [variant.model.dtype for variant in compare.others] == ["bfloat16"]


def test_a_judge_is_bound_by_name():
    bindings = ["longbench_write.judge = @http_judge()", "http_judge.url = 'http://127.0.0.1:1/v1'"]
    job, _ = settings.load("evaluate", [FOLDER / "longbench_write.gin"], [*bindings, "http_judge.model = 'judge'"])
    assert job.tasks[0].tasks.judge == HttpJudge("http://127.0.0.1:1/v1", "judge")


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("ruler.num_exampels = 3", "did you mean 'num_examples'"),
        ("suite.lengths = ()", "give at least one positive number"),
        ("suite.lengths = ('4k',)", "suite.lengths"),
        ("leval.split = 'open'", "nothing reads leval.split"),
    ],
)
def test_bad_bindings_are_refused(binding, words):
    with pytest.raises(settings.SettingsError, match=words):
        settings.load("evaluate", [FOLDER / "ruler.gin"], [binding])


def rows(scores: list[float]) -> list[dict]:
    return [{"id": str(i), "scores": {"score": score}, "where": {}, "cache_bytes": 0} for i, score in enumerate(scores)]


def outcome(scores: dict[str, list[float]]) -> Outcome:
    return Outcome("s", "toy", cells=[Cell(task, 1024, rows(values)) for task, values in scores.items()])


RUNS = {
    "dense": outcome({"a": [1.0] * 20, "b": [0.0, 1.0] * 10}),
    "window": outcome({"a": [0.0] * 20, "b": [0.0, 1.0] * 10}),
    "other": outcome({"a": [1.0] * 19}),
}


def test_a_comparison_names_differences_and_gaps():
    table = comparison(RUNS).split("\n")
    assert table[0].split() == ["task", "tokens", "dense", "window", "other"]
    assert "-100.0 [-100.0, -100.0]*" in table[1]
    assert "+0.0 [+0.0, +0.0]" in table[2]
    assert table[1].endswith("missing"), "other examples are not compared"
    assert table[2].endswith("missing")
    assert table[3].split()[:5] == ["mean", "of", "tasks", "1,024", "75.0"]
    assert "-50.0 [-50.0, -50.0]*" in table[3]
    assert table[3].endswith("missing")
    with pytest.raises(ValueError, match="changes nothing"):
        Variant("same")


def test_the_page_of_a_comparison_leaves_out_what_is_not_there(tmp_path):
    empty = Outcome("s", "toy", missing=[("a", 1024, "no room")])
    write_comparison(tmp_path, {"none": empty, **RUNS})
    page = (tmp_path / "s_comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 1, "no cache is known, so nothing is drawn against it"
    assert "none: a at 1K: no room" in page
    assert page.count("mean of tasks") == 1
    assert "http" not in page
