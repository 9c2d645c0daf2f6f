"""DuoAttention's learned gates on SmolLM2 against other choices of as many heads: copy recall and perplexity.

    python -m benchmarks.duo_smollm2 --books data/*.txt --test one.txt other.txt --output runs/duo_smollm2

Learns gates with `configs/repro/duo.gin` on the books, then gives half of the KV heads 16 sinks and a window of 64:
those with the lowest gates ('learned'), the highest ('inverted'), random ones, and as many in every layer ('uniform').
Each plan, and full attention, is measured by the loss of a passage that is read again (teacher forcing) and by
perplexity by position, on two books that no gate has seen. One GPU.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, runs
from lcjax.eval.copy_recall import CopyRecallProbe
from lcjax.eval.duo import learned_gates
from lcjax.eval.perplexity import Perplexity
from lcjax.methods import Duo
from lcjax.methods.duo import Gates
from lcjax.models.decoder import abstract
from lcjax.serve.source import Loaded, Pretrained

SINK, WINDOW, SPARSITY = 16, 64, 0.5


def main() -> None:
    """Learn, choose, measure, print, write."""
    args = _arguments()
    bindings = [runs.paths(args.books), *args.gin_bindings]
    folder = runs.train(["configs/repro/duo.gin"], bindings, args.output / "gates")
    gates = learned_gates(Pretrained(str(folder)).load())
    base = Pretrained(args.source, "bfloat16").load()
    models = {"full": base}
    for name, chosen in plans(gates).items():
        path = args.output / f"{name}.json"
        Gates.made(base.spec, base.params, chosen).save(path)
        spec = Duo(str(path), SPARSITY, SINK, WINDOW).model(base.spec)
        models[name] = base._replace(graphdef=abstract(spec)[0], spec=spec)
    found = {name: measured(name, model, args) for name, model in models.items()}
    print(common.table([{"plan": name} | brief(tables) for name, tables in found.items()], _columns(args)), flush=True)
    record = {**common.environment(), "gates": {layer: list(map(float, g)) for layer, g in gates.items()}}
    common.write(args.output / "duo_smollm2.json", record | {"measured": found})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, nargs="+", required=True, help="text files to learn gates on")
    parser.add_argument("--test", type=Path, nargs=2, required=True, help="two text files that are not among them")
    parser.add_argument("--source", default="smollm2", help="a model as in pretrained.source")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--count", type=int, default=20, help="passages a length")
    parser.add_argument("--gin_bindings", action="append", default=[], help="of the run (repeatable)")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def plans(gates: Mapping[int, np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    """Gates of every choice of heads, the highest being those that keep everything."""
    rng = np.random.default_rng(0)
    heads = len(next(iter(gates.values())))
    # The heads of a layer in turn, one further from layer to layer; odd layers keep one head less if heads are odd.
    uniform = {layer: 1 - ((np.arange(heads) + n) % heads + 0.5 * (n % 2)) / heads for n, layer in enumerate(gates)}
    return {
        "learned": dict(gates),
        "inverted": {layer: 1 - mine for layer, mine in gates.items()},
        "random": {layer: rng.uniform(size=heads) for layer in gates},
        "uniform": {layer: np.clip(mine, 0, 1) for layer, mine in uniform.items()},
    }


def measured(name: str, model: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    """Copy recall at each length, and perplexity of the first book by position."""
    folder = args.output / name
    folder.mkdir(parents=True, exist_ok=True)
    filler, passages = map(str, args.test)
    probe = CopyRecallProbe(filler, passages, tuple(args.lengths), count=args.count, lost=False)
    text = Perplexity(filler, lengths=(max(args.lengths),), window=max(args.lengths) // 4)
    return dict(probe.run(model, folder)) | dict(text.run(model, folder))


def brief(tables: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One line of the printed table."""
    recall = {f"recall {length}": nll for length, nll in tables["copy_recall_nll"].items()}
    return recall | {f"perplexity {length}": found for length, found in tables["perplexity"].items()}


def _columns(args: argparse.Namespace) -> list[str]:
    return ["plan", *(f"recall {n}" for n in args.lengths), f"perplexity {max(args.lengths)}"]


if __name__ == "__main__":
    main()
