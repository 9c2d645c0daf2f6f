"""What holds for every task: a perfect answer scores 1, a blank one 0, budgets are kept and filled, seeds repeat."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lcjax.eval.budget import BudgetError, prompt_ids, require_whole
from lcjax.eval.haystack import load_haystack
from lcjax.eval.metrics.judge import LocalJudge
from lcjax.eval.task import Example, Task
from lcjax.eval.tasks import giraffe, helmet, helmet_documents, leval, longbench, longwriter, mmlongbench, ruler
from lcjax.eval.tasks.babilong import BabiLong, babilong
from lcjax.eval.tasks.copy_recall import CopyRecall
from lcjax.eval.tasks.custom import JsonTask
from lcjax.eval.tasks.needle_threading import SingleThread, needle_threading
from lcjax.eval.tasks.passkey import Passkey
from lcjax.eval.tasks.reasoning import HaystackReasoning, reasoning
from tests.eval_suites import fixtures
from tests.eval_suites.tokens import chatty, pieces, plain, smollm2

BUDGET = 6000

GENERATED: dict[str, Callable[[], list[Any]]] = {
    "ruler": lambda: ruler.ruler(num_examples=3),
    "needle_threading": lambda: needle_threading(num_examples=3, needles=(2, 5), thread_lengths=(2, 5)),
    "needle_threading_short": lambda: needle_threading(
        num_examples=2, needles=(3,), thread_lengths=(4,), short_keys=True
    ),
    "babilong": lambda: babilong(num_examples=6),
    "giraffe": lambda: giraffe.giraffe(num_examples=6),
    "reasoning": lambda: [*reasoning(num_examples=3), HaystackReasoning(clustered=True, num_examples=2)],
    "copy_recall": lambda: [CopyRecall(num_examples=3)],
    "passkey": lambda: [Passkey(num_examples=5)],
    "helmet_offline": lambda: [helmet.JsonKv(num_examples=6), helmet.ManyShot(num_examples=3)],
}

JUDGE = LocalJudge(
    lambda prompt: json.dumps(
        {**dict.fromkeys(longwriter.DIMENSIONS, 5), "fluency": 1, "correctness": 3, "recalled": 2, "sentences": 2}
        | {"supported": 2}
    )
)

FROM_DATA: dict[str, Callable[[Path], list[Any]]] = {
    "longbench": lambda f: longbench.longbench(
        fixtures.longbench(f), names=tuple(sorted(path.stem for path in Path(fixtures.longbench(f)).iterdir()))
    ),
    "leval": lambda f: leval.leval(fixtures.leval(f), split="all"),
    "helmet_rag": lambda f: [helmet.Rag(source=fixtures.rag(f / "rag.jsonl"), num_examples=7)],
    "helmet_rerank": lambda f: [helmet.Rerank(source=fixtures.rerank(f / "rerank.jsonl"), num_examples=2)],
    "helmet_cite": lambda f: [helmet.Cite(source=fixtures.cite(f / "cite.jsonl"), num_examples=2)],
    "helmet_icl": lambda f: [helmet.ManyShot(source=fixtures.shots(f / "shots.jsonl"), num_examples=2)],
    "helmet_longqa": lambda f: [
        *(helmet_documents.LongQa(source=fixtures.long_qa(f / "qa.jsonl"), judge=judge) for judge in (None, JUDGE)),
        helmet_documents.LongChoice(source=fixtures.long_choice(f / "choice.jsonl")),
    ],
    "helmet_summ": lambda f: [
        helmet_documents.Summary(source=fixtures.summaries(f / "summ.jsonl"), judge=judge) for judge in (None, JUDGE)
    ],
    "mmlongbench": lambda f: [mmlongbench.MmLongBenchText(source=fixtures.mmlongbench(f / "mm.jsonl"))],
    "giraffe_pages": lambda f: [
        kind(source=fixtures.articles(f / "pages.jsonl"), num_examples=6)
        for kind in (giraffe.AlteredNumericQa, giraffe.FreeFormQa)
    ],
    "ruler_qa": lambda f: [
        ruler.Qa1(source=fixtures.squad(f / "squad.json"), num_examples=2),
        ruler.Qa2(source=fixtures.hotpot(f / "hotpot.json"), num_examples=2),
    ],
    "longwriter": lambda f: [longwriter.LongWrite(lengths=(300,), judge=judge) for judge in (None, JUDGE)],
    "custom": lambda f: [JsonTask(source=fixtures.custom(f / "mine.jsonl"))],
}


def headline(score: float | Mapping[str, float]) -> float:
    return score if isinstance(score, float) else next(iter(score.values()))


def check(task: Task, tokenizer: Any, budget: int = BUDGET) -> list[Example]:
    items = list(task.examples(tokenizer, budget, seed=3))
    assert items, task.name
    assert len({item.id for item in items}) == len(items)
    for item in items:
        tokens = len(prompt_ids(tokenizer, item.prompt))
        assert tokens == item.metadata["prompt_tokens"]
        assert tokens + item.max_new_tokens <= budget, task.name
        assert len(tokenizer.encode(task.ideal(item))) <= item.max_new_tokens, task.name
        perfect = task.score(item, task.ideal(item))
        assert headline(perfect) == pytest.approx(1.0), (task.name, task.ideal(item), perfect)
        assert headline(task.score(item, "")) == 0.0, task.name
        assert headline(task.score(item, "  \n")) == 0.0, task.name
        json.dumps(item.metadata)
    return items


@pytest.mark.parametrize("suite", GENERATED)
@pytest.mark.parametrize("tokenizer", [plain, chatty], ids=["plain", "chat"])
def test_generated_tasks_score_perfect_and_blank_answers(suite, tokenizer):
    for task in GENERATED[suite]():
        first, again = check(task, tokenizer()), list(task.examples(tokenizer(), BUDGET, seed=3))
        assert first == again, f"{task.name}: a seed must repeat byte for byte"
        other = list(task.examples(tokenizer(), BUDGET, seed=4))
        assert [item.prompt for item in first] != [item.prompt for item in other]


@pytest.mark.parametrize("suite", FROM_DATA)
def test_tasks_from_data_score_perfect_and_blank_answers(suite, tmp_path):
    for task in FROM_DATA[suite](tmp_path):
        for tokenizer in (plain(), chatty()):
            assert check(task, tokenizer) == list(task.examples(tokenizer, BUDGET, seed=3))


def test_every_name_is_used_once():
    names = [task.name for build in GENERATED.values() for task in build()]
    assert len({name for name in names if "multi_needle_3" not in name}) >= 35


def tokenizer_of(kind: str, folder: Path) -> Any:
    return {"bytes": plain, "sentencepiece": lambda: pieces(folder), "smollm2": smollm2}[kind]()


@pytest.mark.parametrize("budget", [1024, 4096, 20_000])
@pytest.mark.parametrize(
    "suite",
    [
        *("ruler", "babilong", "giraffe", "reasoning", "copy_recall", "passkey", "helmet_offline"),
        "needle_threading_short",
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "smollm2"])
def test_budgets_are_filled_to_one_percent_or_one_unit(suite, budget, kind, tmp_path_factory):
    tokenizer = tokenizer_of(kind, tmp_path_factory.getbasetemp())
    for task in GENERATED[suite]():
        try:
            items = list(task.examples(tokenizer, budget, seed=0))[:3]
        except BudgetError:
            if budget > 1024 or kind == "smollm2":
                raise
            continue
        for item in items:
            used = len(prompt_ids(tokenizer, item.prompt)) + item.max_new_tokens
            unit = UNIT_CHARACTERS.get(task.name, 420 if suite in ("babilong", "giraffe", "reasoning") else 170)
            assert used <= budget
            assert budget - used <= max(0.01 * budget, unit), (task.name, used)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [131_072, 1_000_000])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "smollm2"])
def test_long_budgets_are_filled_in_seconds(budget, kind, tmp_path_factory):
    tokenizer = tokenizer_of(kind, tmp_path_factory.getbasetemp())
    load_haystack("python")
    others = giraffe.AlteredNumericQa, giraffe.Lines, SingleThread, BabiLong, HaystackReasoning, helmet.JsonKv, Passkey
    for task in [*ruler.ruler(num_examples=1), *(kind(num_examples=1) for kind in others)]:
        began = time.process_time()
        (item,) = task.examples(tokenizer, budget, seed=0)
        seconds = time.process_time() - began
        used = item.metadata["prompt_tokens"] + item.max_new_tokens
        assert 0.99 * budget <= used <= budget, task.name
        assert seconds < 10, task.name


UNIT_CHARACTERS = {"qa_2": 260, "longchat_lines": 60}


def test_a_planted_truncation_is_caught():
    tokenizer = plain()
    item = next(iter(ruler.ruler(num_examples=1)[0].examples(tokenizer, 2000, seed=0)))
    ids = prompt_ids(tokenizer, item.prompt)
    require_whole(tokenizer, item.prompt, ids, item.id)
    for cut in (ids[:-1], ids[1:], ids[:900] + ids[1000:]):
        with pytest.raises(BudgetError, match="something cut or changed the prompt"):
            require_whole(tokenizer, item.prompt, cut, item.id)


def test_a_budget_smaller_than_the_question_is_named():
    with pytest.raises(BudgetError, match=r"niah_single_1-0-0 .* its budget is 200"):
        next(iter(ruler.ruler(num_examples=1)[0].examples(plain(), 200, seed=0)))
