"""Every gin file of a suite builds its job, and bad bindings are refused before anything runs."""

from collections import Counter
from pathlib import Path

import pytest

from lcjax import settings
from lcjax.eval.compare import Compare, Variant, comparison
from lcjax.eval.metrics.judge import HttpJudge
from lcjax.eval.outcome import Cell, Outcome
from lcjax.eval.report import score_table, write_comparison
from lcjax.eval.runner import Suite, flatten
from lcjax.eval.tasks.helmet_documents import helmet
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
    longer, _ = settings.load("evaluate", [FOLDER / "extended_64k.gin"], books)
    assert [task.lengths for task in longer.tasks[:4]] == [(8192, 32768, 65536)] * 2 + [(32768,)] * 2
    assert longer.tasks[4].lengths[0] == 65536


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


def test_helmets_mean_is_of_its_categories(tmp_path):
    """Four tasks of recall weigh as much as one of rag; the intervals are of the same mean."""
    scores = {"kv": 1.0, "mk2": 1.0, "mk3": 1.0, "mv": 0.0, "rag": 0.0, "icl": 0.5}
    category = lambda task: task if task in ("rag", "icl") else "recall"
    cells = [Cell(t, 1024, rows([s - 0.25, s + 0.25] * 8), category=category(t)) for t, s in scores.items()]
    found = Outcome("helmet", cells=cells)
    tables = found.tables()
    assert tables["helmet_mean.recall"] == {"1024": 0.75}
    assert tables["helmet_mean"] == {"1024": pytest.approx((0.75 + 0 + 0.5) / 3)}
    mean = found.means()[1024]
    error = (1 / 3) * (0.25 / 4) * (1 / 4 + 1 + 1) ** 0.5  # of three means; 16 scores a task, deviations of 0.25
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    better = Outcome("helmet", cells=[Cell(c.task, 1024, rows([1.0] * 16), category=c.category) for c in cells])
    line = comparison({"base": found, "better": better}).split("\n")[-1]
    assert line.startswith("mean of categories")
    assert f"+{100 - 100 * mean.mean:.1f}" in line
    page = score_table(found)
    assert "recall, 4 tasks" in page
    assert "rag, 1 tasks" not in page
    assert found.summary()["categories"]["recall"]["1024"]["count"] == 64
    gap = Outcome("helmet", cells=cells[1:], missing=[("kv", 1024, "no file")])
    assert not gap.means()
    assert "helmet_mean" not in gap.tables()


def test_helmet_has_seven_categories(tmp_path):
    made = helmet(rag="a", rerank="b", cite="c", longqa="d", longqa_choice="e", summ="f")
    assert Counter(task.category for task in made) == {
        "recall": 4, "longqa": 2, "rag": 1, "rerank": 1, "cite": 1, "summ": 1, "icl": 1
    }  # fmt: skip


def test_the_page_of_a_comparison_leaves_out_what_is_not_there(tmp_path):
    empty = Outcome("s", "toy", missing=[("a", 1024, "no room")])
    write_comparison(tmp_path, {"none": empty, **RUNS})
    page = (tmp_path / "s_comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 1, "no cache is known, so nothing is drawn against it"
    assert "none: a at 1K: no room" in page
    assert page.count("mean of tasks") == 1
    assert "http" not in page
