"""Suites on a small model, timed cell by cell: RULER and L-Eval, in batches and one by one.

    python -m benchmarks.eval_speed prepare --leval LEval-data --output prompts.npz
    python -m benchmarks.eval_speed answer --single 8 --prompts prompts.npz --output answers.jsonl
    python -m benchmarks.eval_speed score --leval LEval-data --prompts prompts.npz --output runs/ruler

The prompts are made once and carried as ids, so that a device is not kept waiting for text. A cell is a task at a
length; its seconds are reading, decoding and detokenizing, the compilation counts apart. `answer` goes on where an
older file of answers ends. `score` writes what `evaluate.py` writes: one line an example, summary, page and figures;
and it compares the answers that were given one by one with those of the batches.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcjax.data.tokenizers import load_tokenizer
from lcjax.eval.budget import prompt_ids
from lcjax.eval.outcome import Outcome
from lcjax.eval.results import commit, describe_device
from lcjax.eval.runner import Asked, Suite, batches
from lcjax.eval.shared_prefix import SharedPrefixGenerator, answer_batch
from lcjax.eval.task import Example, Task
from lcjax.eval.tasks.leval import leval
from lcjax.eval.tasks.ruler import ruler
from lcjax.serve.engine import Completion, Engine, Request
from lcjax.serve.fetch import KNOWN, fetch
from lcjax.serve.report import Report
from lcjax.serve.source import Pretrained

SINGLE_LENGTH = 2048  # where examples are answered one by one too


def main() -> None:
    """One of the three steps."""
    parser = argparse.ArgumentParser(description="Time the evaluation suites of a small model.")
    parser.add_argument("step", choices=("prepare", "answer", "score"))
    parser.add_argument("--source", default="smollm2", help="a model as in pretrained.source")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 4096, 2048, 1024])
    parser.add_argument("--examples", type=int, default=50, help="of each task of RULER")
    parser.add_argument("--leval", default="", help="folder with L-Eval's JSON lines; its closed tasks run at 8192")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--single", type=int, default=0, help="examples of each RULER task that run one by one too")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--prompts", type=Path, default=Path("prompts.npz"))
    parser.add_argument("--answers", type=Path, default=Path("answers.jsonl"))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    {"prepare": prepare, "answer": answer, "score": score}[args.step](args)


def cells(args: argparse.Namespace) -> Iterator[tuple[str, Task, int]]:
    """(suite, task, length), the longest first."""
    for length in args.lengths:
        yield from (("ruler", task, length) for task in ruler(num_examples=args.examples))
    if args.leval:
        yield from (("leval", task, 8192) for task in leval(args.leval))


def prepare(args: argparse.Namespace) -> None:
    """Write the ids of every prompt, flat, with a table of the cells."""
    tokenizer = load_tokenizer(str(fetch(args.source)) if args.source in KNOWN else args.source)
    table, ids = [], []
    for suite, task, length in cells(args):
        found = list(task.examples(tokenizer, length, 0))
        prompts = [prompt_ids(tokenizer, example.prompt) for example in found]
        ids += prompts
        rows = [
            (len(p), e.max_new_tokens, e.metadata.get("prefix_group", "")) for p, e in zip(prompts, found, strict=True)
        ]
        table.append({"suite": suite, "task": task.name, "length": length, "rows": rows})
        print(suite, task.name, length, len(rows), flush=True)
    facts = {"cells": table, "commit": commit()}
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    np.savez_compressed(args.output, ids=np.concatenate(ids).astype(dtype), facts=np.array(json.dumps(facts)))


def read_prompts(path: Path) -> tuple[dict[str, Any], list[list[Asked]]]:
    """The facts of a file of prompts, and the examples of each cell in order."""
    with np.load(path) as file:
        facts, ids = json.loads(str(file["facts"])), file["ids"]
    found, begin = [], 0
    for cell in facts["cells"]:
        asked = []
        for number, (size, limit, group) in enumerate(cell["rows"]):
            example = Example(str(number), "", (), limit, {"prefix_group": group})
            asked.append(Asked(example, tuple(ids[begin : begin + size].tolist()), str(number)))
            begin += size
        found.append(asked)
    return facts, found


def answer(args: argparse.Namespace) -> None:
    """Answer cell by cell, one JSON line each."""
    began = time.perf_counter()
    facts, prompts = read_prompts(args.prompts)
    model = Pretrained(args.source, dtype=args.dtype).load()
    engine = Engine(batch=args.batch, chunk=args.chunk, steps=16, slack=64)
    generator = SharedPrefixGenerator(model.graphdef, model.params, model.spec, model.tokenizer, engine)
    print(f"{describe_device()}, model read after {time.perf_counter() - began:.1f} s", flush=True)
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    done = {(line["task"], line["length"], line["batch"]) for line in map(json.loads, lines)}
    plan = [(cell, asked, args.batch) for cell, asked in zip(facts["cells"], prompts, strict=True)]
    if args.single:
        plan += [(c, a[: args.single], 1) for c, a, _ in plan if c["suite"] == "ruler" and c["length"] == SINGLE_LENGTH]
    for cell, asked, batch in plan:
        if (cell["task"], cell["length"], batch) in done:
            continue
        if time.perf_counter() - began > args.seconds:
            print("out of time", flush=True)
            return
        line = {**{name: cell[name] for name in ("suite", "task", "length")}, "batch": batch, "dtype": args.dtype}
        line |= run_cell(generator, asked, batch)
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"device": describe_device(), "commit": facts["commit"]}) + "\n")
        shown = {name: round(value, 2) for name, value in line.items() if isinstance(value, float)}
        print(
            f"{time.perf_counter() - began:.0f} s", cell["task"], cell["length"], batch, len(asked), shown, flush=True
        )


def run_cell(generator: SharedPrefixGenerator, asked: Sequence[Asked], batch: int) -> dict[str, Any]:
    """Answers by example, and where the time went."""
    answers: dict[str, str] = {}
    total = dict.fromkeys(("prefill_seconds", "decode_seconds", "compile_seconds"), 0.0)
    size = 0
    began = time.perf_counter()
    for group in batches(asked, batch):
        found = answer_batch(generator, [one.ids for one in group], [one.example.max_new_tokens for one in group])
        answers |= {one.key: completion.text for one, completion in zip(group, found, strict=True)}
        total = {name: value + getattr(generator.report, name) for name, value in total.items()}
        size = max(size, generator.report.cache_bytes // len(group))
    seconds = time.perf_counter() - began - total["compile_seconds"]
    return {"answers": answers, "seconds": seconds, **total, "cache_bytes": size}


class Recorded:
    """Answers that were given before, by prompt ids."""

    def __init__(self, known: dict[tuple[int, ...], str]):
        self._known = known
        self.report = Report()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The recorded texts."""
        self.report = Report()
        self.report.add_prefill(sum(len(request.prompt) for request in requests), 0.0)
        return [Completion(self._known[tuple(map(int, request.prompt))]) for request in requests]


def score(args: argparse.Namespace) -> None:
    """Write the pages of the batched answers, and print how the answers that were given one by one differ."""
    facts, prompts = read_prompts(args.prompts)
    lines = {(o["task"], o["length"], o["batch"]): o for o in map(json.loads, args.answers.read_text().splitlines())}
    known: dict[tuple[int, ...], str] = {}
    for cell, asked in zip(facts["cells"], prompts, strict=True):
        if line := lines.get((cell["task"], cell["length"], args.batch)):
            known |= {one.ids: line["answers"][one.key] for one in asked}
    model = Pretrained(args.source, dtype=args.dtype).load()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ("ruler", "leval"):
        there = [(task, n) for suite, task, n in cells(args) if suite == name and (task.name, n, args.batch) in lines]
        if there:
            tasks = {task.name: task for task, _ in there}
            suite = Suite(
                list(tasks.values()), tuple(sorted({n for _, n in there})), name, engine=Engine(batch=args.batch)
            )
            outcome = suite.outcome(model, args.output, Recorded(known))
            (args.output / f"{name}_speed.json").write_text(
                json.dumps(speed(outcome, lines, args.batch), indent=1) + "\n"
            )
    if compared := compare_singles(args, model.tokenizer, lines):
        (args.output / "singles_speed.json").write_text(json.dumps(compared, indent=1) + "\n")
        shares = f"{compared['same']} of {compared['examples']} scores are the same"
        print(f"batch {compared['batch']} is {compared['times_as_fast']:.1f} x as fast; {shares}")


def speed(outcome: Outcome, lines: dict[tuple[str, int, int], dict[str, Any]], batch: int) -> dict[str, Any]:
    """Scores with their intervals and the seconds that the answers took, and what they ran on."""
    summary = outcome.summary()
    found = [lines[cell.task, cell.length, batch] for cell in outcome.cells]
    for cell, line in zip(outcome.cells, found, strict=True):
        times = {name: round(line[name], 3) for name in ("seconds", "prefill_seconds", "decode_seconds")}
        summary["cells"][cell.task][str(cell.length)] |= times
    facts = {name: found[0][name] for name in ("device", "dtype", "batch", "commit")}
    facts["model"] = Path(summary["model"]).stem
    del summary["setting"]  # that of the scoring
    return {**summary, **facts, "compile_seconds": round(sum(line["compile_seconds"] for line in found), 1)}


def compare_singles(
    args: argparse.Namespace, tokenizer: Any, lines: dict[tuple[str, int, int], dict[str, Any]]
) -> dict[str, Any]:
    """Seconds an example in a batch and one by one, and how many scores agree; empty where none were given singly."""
    same: list[bool] = []
    seconds = {"single": 0.0, "batched": 0.0}
    facts: dict[str, Any] = {}
    for _, task, length in cells(args):
        one, many = lines.get((task.name, length, 1)), lines.get((task.name, length, args.batch))
        if not one or not many:
            continue
        for example, key in zip(task.examples(tokenizer, length, 0), one["answers"], strict=False):
            same.append(task.score(example, one["answers"][key]) == task.score(example, many["answers"][key]))
        seconds["single"] += one["seconds"] / len(one["answers"])
        seconds["batched"] += many["seconds"] / len(many["answers"])
        facts = {name: many[name] for name in ("device", "dtype", "batch", "commit")} | {"length": length}
    if not same:
        return {}
    facts |= {"examples": len(same), "same": sum(same), "seconds_of_one_of_each_task": seconds}
    return facts | {"times_as_fast": seconds["single"] / seconds["batched"]}


if __name__ == "__main__":
    main()
