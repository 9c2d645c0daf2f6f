"""Self-made rows with the schemas of the data sets that need the internet."""

from pathlib import Path
from typing import Any

from tests.eval_suites.tokens import write_rows

TEXT = "The mill of Arnsby was built in 1823. It burned down and was built again. Its wheel turned until the war. " * 4


def longbench(folder: Path) -> str:
    """One row for a data set of each metric."""
    kinds: dict[str, dict[str, Any]] = {
        "qasper": {"input": "When was the mill built?", "answers": ["in 1823", "1823"]},
        "multifieldqa_zh": {"input": "磨坊建于何时？", "answers": ["一八二三年"]},
        "dureader": {"input": "谁建了磨坊？", "answers": ["磨坊主人自己"]},
        "gov_report": {"input": "", "answers": ["A mill was built, burned and built again."]},
        "trec": {
            "input": "Question: Who built it?\nType:",
            "answers": ["Individual"],
            "all_classes": ["Individual", "Individual group", "Date"],
        },
        "samsum": {"input": "Dialogue: ...\nSummary:", "answers": ["Ann will come at six."]},
        "passage_retrieval_en": {"input": "About a mill.", "answers": ["Paragraph 7"]},
        "passage_count": {"input": "", "answers": ["4"]},
        "lcc": {"input": "", "answers": ["    return mill.wheel(turns=3)"]},
    }
    for name, row in kinds.items():
        more = {"context": TEXT, "all_classes": None, **row}
        write_rows(folder / f"{name}.jsonl", [{"_id": f"{name}-{i}", **more} for i in range(2)])
    return str(folder)


def leval(folder: Path) -> str:
    """One document for several kinds of exam and open questions."""
    outputs = {
        "tpo": ["B", "D"],
        "quality": ["(A) A mill.", "(C) In the war"],
        "coursera": ["AC", "B"],
        "gsm100": ["18", "1,200"],
        "sci_fi": ["True [fact: False]", "False [fact: False]"],
        "topic_retrieval_longchat": ["The history of mills", "Wheels"],
        "codeU": ["['a', 'b']", "42"],
        "multidoc_qa": ["It was built in 1823.", "Fire."],
        "gov_report_summ": ["A mill was built and burned.", "It was built again."],
    }
    for name, answers in outputs.items():
        row = {"instructions": ["What about the mill?", "And then?"], "outputs": answers, "input": TEXT}
        write_rows(folder / f"{name}.jsonl", [{**row, "source": "made", "evaluation": "exam"}])
    return str(folder)


def passages(count: int) -> list[dict[str, str]]:
    """Distracting passages."""
    return [
        {"title": f"River {i}", "text": f"River number {i} flows to the sea and freezes in winter."}
        for i in range(count)
    ]


def rag(path: Path) -> str:
    """Three questions."""
    towns = {"Arnsby": "1823", "Holt": "1790", "Wick": "1901"}
    return write_rows(
        path,
        [
            {
                "question": f"When was the mill of {town} built?",
                "answers": [year, f"in {year}"],
                "positives": [{"title": town, "text": f"The mill of {town} was built in {year}."}],
                "negatives": passages(60),
            }
            for town, year in towns.items()
        ],
    )


def cite(path: Path) -> str:
    """Two answers, each with its passage."""
    return write_rows(
        path,
        [
            {
                "question": "When were the mills of Arnsby and Holt built?",
                "answers": [["1823"], ["1790", "the year 1790"]],
                "positives": [
                    {"title": "", "text": "The mill of Arnsby was built in 1823."},
                    {"title": "", "text": "The mill of Holt was built in 1790."},
                ],
                "negatives": passages(60),
            }
        ],
    )


def rerank(path: Path) -> str:
    """Graded passages."""
    rows = [{"id": f"d{i}", "text": f"Passage {i} on mills and rivers.", "grade": max(0, 3 - i)} for i in range(40)]
    return write_rows(path, [{"query": "mills", "passages": rows}])


def shots(path: Path) -> str:
    """Three classes of five texts."""
    return write_rows(
        path,
        [{"text": f"text {i} about {label}", "label": label} for label in ("tea", "ships", "snow") for i in range(5)],
    )


def long_qa(path: Path) -> str:
    """A free question."""
    return write_rows(path, [{"document": TEXT, "question": "When was the mill built?", "answers": ["in 1823"]}])


def long_choice(path: Path) -> str:
    """A multiple choice."""
    options = ["in 1790", "in 1823", "in 1901"]
    return write_rows(path, [{"document": TEXT, "question": "When?", "answers": ["in 1823"], "options": options}])


def summaries(path: Path) -> str:
    """A summary with two key points."""
    summary = "The mill of Arnsby was built in 1823. It burned down and was built again."
    points = ["The mill was built in 1823", "It burned down"]
    return write_rows(path, [{"document": TEXT, "summary": summary, "key_points": points}])


def mmlongbench(path: Path) -> str:
    """A row of each kind."""
    context = [{"text": TEXT}, {"text": "The key of the house is 4417. There were 2 cats, then 1 cat."}]
    answers = {"retrieval": "4417", "choice": "C", "count": [2, 1], "document": 0.25}
    rows = [{"question": f"({kind})?", "answer": a, "kind": kind, "context": context} for kind, a in answers.items()]
    more = [3, "in the year 1823", ["red", "blue"], [1, 2], "https://arnsby.example/mill"]
    rows += [{"question": "?", "answer": a, "kind": "document", "context": context} for a in more]
    return write_rows(path, rows)


def articles(path: Path) -> str:
    """A page with a numeric and a page with a free answer."""
    return write_rows(
        path,
        [
            {"document": TEXT, "question": "In which year was the mill built?", "answer": "1823"},
            {"document": TEXT, "question": "Where is the mill?", "answer": "Arnsby"},
        ],
    )


def squad(path: Path) -> str:
    """SQuAD's JSON."""
    import json

    asked = {"question": "When was the mill built?", "id": "q", "answers": [{"text": "1823", "answer_start": 33}]}
    paragraphs = [{"context": TEXT, "qas": [asked]}]
    paragraphs += [{"context": passage["text"], "qas": []} for passage in passages(30)]
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "mill", "paragraphs": paragraphs}]}))
    return str(path)


def hotpot(path: Path) -> str:
    """HotpotQA's JSON."""
    import json

    context = [["Mill", ["The mill stands in Arnsby."]], ["Arnsby", ["Arnsby lies on the Wend."]]]
    context += [[passage["title"], [passage["text"]]] for passage in passages(10)]
    row = {"question": "On which river is the mill?", "answer": "Wend", "context": context}
    path.write_text(json.dumps([{**row, "supporting_facts": [["Mill", 0], ["Arnsby", 0]]}]))
    return str(path)


def custom(path: Path) -> str:
    """A row for several metrics."""
    rows = [
        {"id": f"c{i}", "prompt": "{document}\nWhen?", "document": TEXT, "references": ["in 1823"], "metric": name}
        for i, name in enumerate(("exact_match", "token_f1", "rougeL", "any_substring", "bleu", "chrf"))
    ]
    return write_rows(path, [{**row, "max_new_tokens": 8} for row in rows])
