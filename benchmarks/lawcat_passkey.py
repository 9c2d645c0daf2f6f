"""Passkey retrieval of SmolLM2 made linear on rows of at most 1K tokens, from 1K to 22K tokens; with ablations.

    python -m benchmarks.lawcat_passkey --output benchmarks/results/lawcat_passkey.json
    python -m benchmarks.lawcat_passkey --output benchmarks/results/lawcat_passkey.json \\
        --variants lawcat no_gate no_conv no_normaliser

The second command adds its rows to the first one's table. Each variant is distilled and finetuned from the same
weights on the same rows: passkey questions of about 100 to 1,000 tokens and one row in ten of Python's library. Five
depths x 20 keys a length; a question counts when greedy decoding would give the key and then a full stop. "softmax" is
the given model, not trained at all; "lawcat" the published layer; the three without a part are of "stretched", whose
decays start spread out and are trained on lines that stand for longer ones. `--text` adds perplexity by position.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np

from benchmarks.distillation import CHUNK, Model, Plan, Texts, accuracy, distil, softmax_layers
from lcjax.data.packing import first_fit, pairs, render
from lcjax.data.tokenizers import Tokenizer
from lcjax.eval.measure import Table
from lcjax.eval.passkey_texts import PasskeyTexts
from lcjax.eval.perplexity import Perplexity
from lcjax.eval.results import describe_run
from lcjax.eval.tasks.passkey import Passkey
from lcjax.methods import Lawcat, Lolcats, Method
from lcjax.models.decoder import abstract
from lcjax.positions.sampling import Stretch
from lcjax.serve.source import Loaded, Pretrained

LENGTHS = (1024, 2048, 4096, 8192, 12288, 16384, 22528)
ROW = 1024
STEPS = (300, 1000)
ANSWER = 6  # five digits and a full stop, a token each
OTHER_WEIGHT = 0.03  # of tokens that are not an answer, in the finetuning loss
LONG = (16.0, 65536.0)  # horizons
FAR = Lawcat(horizons=LONG, stretched=True)
VARIANTS: dict[str, Method | None] = {
    "softmax": None,
    "lawcat": Lawcat(),
    "horizons": Lawcat(horizons=LONG),
    "stretched": FAR,
    "no_gate": replace(FAR, decay="none", horizons=None),
    "no_conv": replace(FAR, conv_width=0),
    "no_normaliser": replace(FAR, normalise=False),
    "wide": replace(FAR, features=64),
    "window": Lawcat(window=64),
    "lolcats": Lolcats(),
}


def main() -> None:
    """Run the variants in turn; the table is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["softmax", "stretched"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--stretch", type=float, default=60.0, help="half of a 1K row times 60 stands for 30K tokens")
    parser.add_argument("--text", help="a text file that no row was taken from")
    parser.add_argument("--keys", type=int, default=20, help="for each of five depths")
    parser.add_argument("--rows", type=int, default=4096, help="training rows")
    parser.add_argument("--batch", type=int, default=Plan.batch)
    parser.add_argument("--steps", nargs=2, type=int, default=STEPS, help="of transfer and of finetuning")
    args = parser.parse_args()
    loaded = Pretrained(args.model, dtype="bfloat16").load()
    texts = make_texts(loaded.tokenizer, args.rows, tuple(args.lengths), args.keys)
    stretch = Stretch(args.stretch, tuple(loaded.tokenizer.encode("\n")))
    plan = Plan(batch=args.batch, transfer_steps=args.steps[0], finetune_steps=args.steps[1])
    table = json.loads(args.output.read_text()) if args.output.exists() else {}
    for name in args.variants:
        method = VARIANTS[name]
        stretched = isinstance(method, Lawcat) and method.stretched
        mine = replace(plan, sampler=stretch) if stretched else plan
        model, table[name] = run_variant(Model(loaded.spec, loaded.params), method, texts, mine)
        if args.text:
            table[name]["perplexity"] = by_position(loaded, model, args.text)
        table["_run"] = describe_run(f"# {vars(args)}")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(table, indent=1) + "\n")
        print(name, table[name]["accuracy"], flush=True)


def run_variant(teacher: Model, method: Method | None, texts: Texts, plan: Plan) -> tuple[Model, dict]:
    """The model, and its row of the table."""
    report: dict = {"method": repr(method)}
    model = teacher
    if method is not None:
        model, stages = distil(teacher, method, texts.rows, plan)
        report |= {"plan": repr(plan), **stages}
    report["growing_layers"] = softmax_layers(model.spec)
    return model, report | {"accuracy": accuracy(model, texts.questions, texts.answer)}


def by_position(teacher: Loaded, model: Model, text: str) -> Table:
    """Perplexity of windows of 2,048 tokens, named by where they end."""
    measure = Perplexity(text, start=20_000, lengths=(32_768,), chunk=CHUNK)
    student = teacher._replace(graphdef=abstract(model.spec)[0], params=model.params, spec=model.spec)
    with tempfile.TemporaryDirectory() as folder:
        return measure.run(student, Path(folder))["perplexity_by_position"]


def make_texts(tokenizer: Tokenizer, count: int, lengths: tuple[int, ...], keys: int) -> Texts:
    """Token arrays from the tokenizer: `count` packed rows, and 5 x `keys` questions for each length."""
    questions = {length: _questions(tokenizer, length, keys) for length in lengths}
    return Texts(_rows(tokenizer, count), questions, ANSWER)


def _rows(tokenizer: Tokenizer, count: int) -> dict[str, np.ndarray]:
    """Nine rows in ten hold questions, each whole; the others Python text."""
    corpus = PasskeyTexts().open("")
    pieces = [np.asarray(tokenizer.encode(corpus[i]), np.int32) for i in range(2 * count)]
    packed = first_fit([piece for piece in pieces if pairs(piece) <= ROW], ROW)
    packed = [packed[i] for i in np.random.default_rng(0).permutation(len(packed))[: count - count // 10]]
    made = [render(row, ROW, 0) for row in packed]
    for row, fields in zip(packed, made, strict=True):
        fields["loss_weights"] *= OTHER_WEIGHT
        ends = np.cumsum([pairs(piece) for piece in row])
        for end in ends:
            fields["loss_weights"][end - ANSWER : end] = 1.0
    library = [render([piece], ROW, 0) for piece in _library(tokenizer, count // 10)]
    for fields in library:
        fields["loss_weights"] *= OTHER_WEIGHT
    made += library
    return {name: np.stack([fields[name] for fields in made]) for name in made[0]}


def _library(tokenizer: Tokenizer, count: int) -> list[np.ndarray]:
    """Whole rows of the standard library's sources."""
    from lcjax.data.sources import PythonStdlib

    ids: list[int] = []
    source = PythonStdlib()
    for document in source.documents("train"):
        ids += tokenizer.encode(document.text[:20_000])
        if len(ids) > count * (ROW + 1):
            break
    return list(np.asarray(ids[: count * (ROW + 1)], np.int32).reshape(-1, ROW + 1))


def _questions(tokenizer: Tokenizer, length: int, keys: int) -> np.ndarray:
    """Questions with their answers, all of one number of tokens, at most `length`."""
    ids = []
    for index in range(5 * keys):
        label = f"passkey-0-{index}"
        rows = lambda units, index=index, label=label: _ids(tokenizer, units, index, label)
        each = len(rows(33)) - len(rows(32))
        units = (length - len(rows(0))) // each
        ids.append(rows(units))
    if len({len(row) for row in ids}) > 1:
        raise ValueError("questions of one length differ in tokens: this benchmark needs a digit-by-digit tokenizer")
    return np.asarray(ids, np.int32)


def _ids(tokenizer: Tokenizer, units: int, index: int, label: str) -> list[int]:
    draft = Passkey().draft(Random(label), units, index)
    return tokenizer.encode(f"{draft.prompt(chat=False)} {draft.references[0]}.")


if __name__ == "__main__":
    main()
