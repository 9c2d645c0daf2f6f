"""The runner with a small random model, and with a scripted one in its place."""

import json
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest

from lcjax.cache import CacheLayout
from lcjax.eval import runner as runner_module
from lcjax.eval.compare import Compare, Variant
from lcjax.eval.metrics.judge import HttpJudge, LocalJudge
from lcjax.eval.report import effective_context
from lcjax.eval.runner import Runner, Suite, batches
from lcjax.eval.shared_prefix import SharedPrefixGenerator, answer_batch, common_prefix
from lcjax.eval.tasks.custom import JsonTask
from lcjax.eval.tasks.longwriter import DIMENSIONS, LongWrite
from lcjax.eval.tasks.needle_threading import MultiNeedle, SingleNeedle
from lcjax.eval.tasks.needles import NiahSingle1, NiahSingle2
from lcjax.eval.tasks.reasoning import reasoning
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention
from lcjax.serve.engine import Completion, Engine, Generator
from lcjax.serve.report import Report
from lcjax.serve.source import Loaded, Pretrained, random_model
from tests.eval_suites.tokens import write_rows
from tests.serve.toy import SPEC, TOKENIZER

NO_WEIGHTS = Loaded(None, None, SPEC, TOKENIZER, "scripted")
ENGINE = Engine(batch=4, chunk=64, capacity=4096)


class Scripted:
    """Answers with `answer(prompt)` and reports the tokens that it read."""

    asked = 0
    lost = 0
    answer: Callable[[str], str] = staticmethod(lambda prompt: "")

    def __init__(self, *_):
        self.report = Report()

    def generate(self, requests):
        self.report = Report()
        self.report.add_prefill(sum(len(request.prompt) for request in requests) - Scripted.lost, 1.0)
        Scripted.asked += len(requests)
        return [Completion(Scripted.answer(TOKENIZER.decode(request.prompt))) for request in requests]


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(runner_module, "SharedPrefixGenerator", Scripted)
    Scripted.asked = Scripted.lost = 0
    Scripted.answer = staticmethod(lambda prompt: "")
    return Scripted


@pytest.fixture
def silent():
    """The address of a server that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def ideal_answers(tasks, lengths):
    """Prompt text -> ideal answer, for every example of the tasks."""
    return {
        TOKENIZER.decode(TOKENIZER.encode(item.prompt)): task.ideal(item)
        for task in tasks
        for length in lengths
        for item in task.examples(TOKENIZER, length, 0)
    }


def test_a_perfect_model_scores_one_and_the_files_say_so(scripted, tmp_path):
    tasks = [NiahSingle1(num_examples=3), SingleNeedle(num_examples=5), *reasoning(num_examples=2)]
    answers = ideal_answers(tasks, (1500, 3000))
    scripted.answer = staticmethod(answers.__getitem__)
    suite = Suite(tasks=tasks, lengths=(1500, 3000), engine=ENGINE)
    tables = suite.run(NO_WEIGHTS, tmp_path)
    assert tables["suite_mean"] == {"1500": 1.0, "3000": 1.0}
    assert set(tables) == {task.name for task in tasks} | {"suite_mean"}
    rows = [json.loads(line) for line in (tmp_path / "suite.jsonl").read_text().splitlines()]
    assert len(rows) == scripted.asked == 28
    assert all(len(row["prompt_sha256"]) == 64 and row["output"] and row["scores"]["score"] == 1 for row in rows)
    summary = json.loads((tmp_path / "suite_summary.json").read_text())
    assert summary["missing"] == []
    assert summary["cells"]["niah_single_1"]["1500"]["count"] == 3
    assert summary["cells"]["niah_single_1"]["1500"]["low"] < 1.0, "three examples prove little"
    page = (tmp_path / "suite.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert {path.name for path in tmp_path.glob("*.png")} == {"suite_scores.png", "suite_depths.png"}


def test_the_page_shows_wrong_answers_as_text(scripted, tmp_path):
    scripted.answer = staticmethod(lambda prompt: "<script>no</script>")
    Suite(tasks=NiahSingle1(num_examples=2), lengths=(1500,), engine=ENGINE).run(NO_WEIGHTS, tmp_path)
    page = (tmp_path / "suite.html").read_text()
    assert "niah_single_1: 2 of 2" in page
    assert "&lt;script&gt;no" in page
    assert "<script>" not in page


def test_answered_examples_are_not_asked_again(scripted, tmp_path):
    suite = Suite(tasks=[NiahSingle1(num_examples=6)], lengths=(1500,), engine=ENGINE)
    first = suite.run(NO_WEIGHTS, tmp_path)
    path = tmp_path / "suite.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:40])  # killed in the middle of a line
    scripted.asked = 0
    assert suite.run(NO_WEIGHTS, tmp_path) == first
    assert scripted.asked == 2
    assert sorted(path.read_text().splitlines()) == sorted(line.rstrip("\n") for line in lines)
    more = Suite(tasks=[NiahSingle1(num_examples=7)], lengths=(1500,), engine=ENGINE)
    more.run(NO_WEIGHTS, tmp_path)
    assert scripted.asked == 3


def test_what_cannot_run_is_named_and_the_rest_goes_on(scripted, silent, tmp_path):
    scripted.answer = staticmethod(lambda prompt: "some words")
    row = {"id": "a", "prompt": "?", "references": ["x"], "max_new_tokens": 4}
    tasks = [
        NiahSingle2(num_examples=1),
        JsonTask(source=write_rows(tmp_path / "broken.jsonl", [row])),
        JsonTask(source=write_rows(tmp_path / "odd.jsonl", [{**row, "metric": "tokenf1"}])),
        JsonTask(source=str(tmp_path / "absent.jsonl")),
        LongWrite(lengths=(50,), judge=HttpJudge(silent, "slow", timeout=0.2)),
    ]
    suite = Suite(tasks=tasks, lengths=(300, 1500, 5000), engine=ENGINE)
    outcome = suite.outcome(NO_WEIGHTS, tmp_path)
    assert {(cell.task, cell.length) for cell in outcome.cells} == {("niah_single_2", 1500)}
    reasons = {(task, length): reason for task, length, reason in outcome.missing}
    assert "its budget is 300" in reasons["niah_single_2", 300]
    assert "the field 'metric' is missing" in reasons["broken", 1500]
    assert "did you mean 'token_f1'?" in reasons["odd", 1500]
    assert "does not exist" in reasons["absent", 1500]
    assert "gave no answer in 0.2 s; raise `timeout`" in reasons["longbench_write", 1500]
    assert "context is 4096 tokens, under the budget of 5000" in reasons["niah_single_2", 5000]
    assert "Missing" in (tmp_path / "suite.html").read_text()
    assert len(json.loads((tmp_path / "suite_summary.json").read_text())["missing"]) == len(outcome.missing) == 14


def test_what_was_judged_before_the_judge_failed_is_kept(scripted, tmp_path):
    scripted.answer = staticmethod(lambda prompt: "some words")
    replies = (
        [json.dumps(dict.fromkeys(DIMENSIONS, 5))] * 3 + ["no"] * 5 + [json.dumps(dict.fromkeys(DIMENSIONS, 1))] * 5
    )
    task = LongWrite(lengths=(50,), judge=LocalJudge(lambda prompt: replies.pop(0)))
    suite = Suite(tasks=task, lengths=(1500,), engine=ENGINE)
    (missing,) = suite.outcome(NO_WEIGHTS, tmp_path).missing
    assert "gave no readable scores" in missing[2]
    (cell,) = suite.outcome(NO_WEIGHTS, tmp_path).cells
    assert sorted(cell.scores["quality_score"]) == [0.0] * 5 + [1.0] * 3
    assert not replies


def test_documents_that_are_left_out_are_counted(scripted, tmp_path):
    row = {"references": ["x"], "metric": "any_substring", "max_new_tokens": 4, "prompt": "{document}?"}
    rows = [{**row, "id": str(size), "document": "abc " * size} for size in (20, 900, 30, 1200)]
    task = JsonTask(source=write_rows(tmp_path / "mine.jsonl", rows), truncation="drop")
    outcome = Suite(tasks=task, lengths=(100, 600), engine=ENGINE).outcome(NO_WEIGHTS, tmp_path)
    assert [(cell.length, len(cell.rows), cell.dropped) for cell in outcome.cells] == [(100, 1, 3), (600, 2, 2)]
    summary = json.loads((tmp_path / "suite_summary.json").read_text())
    assert {length: cell["dropped"] for length, cell in summary["cells"]["mine"].items()} == {"100": 3, "600": 2}
    assert "(3 left out)" in (tmp_path / "suite.html").read_text()


def test_a_truncation_by_the_engine_is_an_error(scripted, tmp_path):
    scripted.lost = 1
    outcome = Suite(tasks=[NiahSingle1(num_examples=1)], lengths=(1500,), engine=ENGINE).outcome(NO_WEIGHTS, tmp_path)
    assert not outcome.cells
    assert "prompt tokens; something cut them" in outcome.missing[0][2]


def test_a_truncation_before_the_engine_is_an_error(scripted, tmp_path, monkeypatch):
    ask = Runner._ask
    monkeypatch.setattr(Runner, "_ask", lambda self, *a: (one := ask(self, *a))._replace(ids=one.ids[:-5]))
    outcome = Suite(tasks=[NiahSingle1(num_examples=1)], lengths=(1500,), engine=ENGINE).outcome(NO_WEIGHTS, tmp_path)
    assert "something cut or changed the prompt" in outcome.missing[0][2]


def test_shared_prefixes_change_no_answer():
    mixers = (Attention(window=24, sink=2), GatedLinear(conv_width=3))
    model = random_model(replace(SPEC, num_layers=2, pattern=mixers), TOKENIZER, seed=3)
    document = [7 * i % 250 for i in range(150)]
    prompts = [(*document, *range(k, k + 5 * k + 3)) for k in range(1, 4)]
    assert common_prefix([list(prompt) for prompt in prompts]) == 150
    engine = Engine(batch=4, chunk=32, steps=4, capacity=256)
    plain, shared = (
        kind(model.graphdef, model.params, model.spec, model.tokenizer, engine)
        for kind in (Generator, SharedPrefixGenerator)
    )
    shared._programs = plain._programs  # compiled once for both
    wanted, found = (answer_batch(g, prompts, [9, 12, 5]) for g in (plain, shared))
    assert [answer.tokens for answer in found] == [answer.tokens for answer in wanted]
    assert shared.shared_tokens == 2 * 128
    assert shared.report.prompt_tokens + shared.shared_tokens == plain.report.prompt_tokens


def test_a_paged_cache_shares_nothing(monkeypatch):
    whole: list[int] = []
    monkeypatch.setattr(Generator, "_run", lambda self, rows: iter(whole.append(len(rows)) or ()))
    engine = Engine(batch=2, chunk=8, capacity=64, cache=CacheLayout("paged"))
    generator = SharedPrefixGenerator(None, None, SPEC, TOKENIZER, engine)
    answer_batch(generator, [tuple(range(30)), tuple(range(31))], [4, 4])
    assert whole == [2]
    assert generator.shared_tokens == 0


def test_a_random_model_runs_a_suite_end_to_end(tmp_path):
    model = random_model(replace(SPEC, num_layers=1, pattern=(Attention(),)), TOKENIZER)
    row = {"prompt": "{document} Q", "references": ["x"], "metric": "any_substring", "max_new_tokens": 4}
    rows = [
        {**row, "id": str(i), "document": "abc " * 30, "group": "doc", "prompt": f"{{document}} {i}?"} for i in range(3)
    ]
    suite = Suite(tasks=JsonTask(source=write_rows(tmp_path / "mine.jsonl", rows)), lengths=(150,))
    tables = suite.run(model, tmp_path)
    assert set(tables) == {"mine"}
    assert len((tmp_path / "suite.jsonl").read_text().splitlines()) == 3


def test_contours_show_where_the_score_falls(scripted, tmp_path):
    tasks = [MultiNeedle(needles=m, num_examples=2) for m in (2, 5)]
    answers = ideal_answers(tasks, (1500,))
    scripted.answer = staticmethod(lambda prompt: answers.get(prompt, ""))
    outcome = Suite(tasks=tasks, lengths=(1500, 3000), engine=ENGINE).outcome(NO_WEIGHTS, tmp_path)
    assert "Effective context of multi_needle by needles" in (tmp_path / "suite.html").read_text()
    effective, passing = effective_context(outcome)["multi_needle_2"]
    assert 1500 < effective < 3000
    assert passing == 1500


def test_a_comparison_goes_on_without_a_model_that_cannot_be_read(scripted, tmp_path):
    tasks = [NiahSingle1(num_examples=3), NiahSingle2(num_examples=3)]
    scripted.answer = staticmethod(ideal_answers(tasks, (1500,)).__getitem__)
    others = (
        Variant("int8", engine=replace(ENGINE, cache=CacheLayout(dtype="int8"))),
        Variant("gone", model=Pretrained(str(tmp_path / "gone"))),
    )
    tables = Compare(Suite(tasks=tasks, lengths=(1500,), engine=ENGINE), others).run(NO_WEIGHTS, tmp_path)
    assert tables["base/niah_single_1"] == tables["int8/niah_single_1"] == {"1500": 1.0}
    text = (tmp_path / "suite_comparison.txt").read_text()
    assert "mean of tasks" in text
    assert text.count("+0.0 [+0.0, +0.0]") == text.count("missing") == 3
    page = (tmp_path / "suite_comparison.html").read_text()
    assert "gone: niah_single_2 at 1,500: " in page
    assert "dense int8 cache" in page


def test_groups_share_a_batch():
    from lcjax.eval.runner import Asked
    from lcjax.eval.task import Example

    asked = [
        Asked(Example(str(i), "", (), 1, {"prefix_group": group}), (0,) * size, str(i))
        for i, (group, size) in enumerate([("a", 5), (None, 9), ("b", 5), ("a", 6), (None, 1), ("a", 7)])
    ]
    found = [[one.example.id for one in batch] for batch in batches(asked, 2)]
    assert found == [["0", "3"], ["5"], ["4", "1"], ["2"]]


def test_a_suite_without_tasks_or_lengths_is_refused():
    with pytest.raises(ValueError, match="tasks is empty"):
        Suite(tasks=[])
    with pytest.raises(ValueError, match="lengths"):
        Suite(tasks=[NiahSingle1()], lengths=())
    with pytest.raises(ValueError, match="twice"):
        Suite(tasks=[NiahSingle1(), [NiahSingle1(num_examples=3)]])
