"""A plan of MoA against other spans of the same density, on copy recall and perplexity by position.

    python -m benchmarks.moa_plan --filler book.txt --passages other.txt --output benchmarks/results/moa_plan.json
    python -m benchmarks.moa_plan --plan runs/moa/plan.json --filler book.txt --passages other.txt

Without `--plan` one is made first, from questions about Python's documentation and passages of it that come again, and
kept beside the output. At each length, fixed for its requests: "dense" is the model itself; "plan" the plan's spans;
"uniform" one span for all heads, the plan's mean; "random" the plan's spans dealt out to the heads at random, so that
the density is the same to the token. All keep one block of 64 first tokens. `--filler` is also the text whose
perplexity is measured, from `--start` tokens on.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from lcjax.cache.base import AttentionCache
from lcjax.cache.room import Room
from lcjax.eval.answered import Questions, Quotations
from lcjax.eval.copy_recall import CopyRecallProbe
from lcjax.eval.moa import PlanSpans
from lcjax.eval.perplexity import Perplexity
from lcjax.methods.moa.plan import Plan, under
from lcjax.methods.moa.rules import SearchSpace
from lcjax.models.decoder import abstract
from lcjax.models.elastic import kept_tokens
from lcjax.models.family import period
from lcjax.models.patterns import Spans
from lcjax.models.spec import Attention, Mixer, ModelSpec
from lcjax.serve.source import Loaded, Pretrained

SMOLLM2 = SearchSpace(profiles=(1024, 2048, 4096), lengths=(1024, 2048, 4096, 8192), step=512)
VALIDATION = 6144


def main() -> None:
    """Parse, make or read the plan, compare at each length, print, write."""
    args = _arguments()
    model = Pretrained(args.model, dtype=args.dtype).load()
    plan = Plan.load(args.plan) if args.plan else make_plan(model, args)
    found: dict[str, Any] = {}
    for length in args.lengths:
        variants = specs(model.spec, plan, length, args.seed)
        found[str(length)] = {name: measure(model, spec, length, args) for name, spec in variants.items()}
        columns = ("variant", "density", "copy_nll", "copy_top1", "perplexity", "last_window")
        shown = [{"variant": name, **row} for name, row in found[str(length)].items()]
        print(f"{length} tokens\n{common.table(shown, columns)}", flush=True)
    record = {**common.environment(args.commit), "convention": __doc__, "model": model.source}
    record |= {"plan": dataclasses.asdict(plan), "arguments": {k: str(v) for k, v in vars(args).items()}}
    if args.output:
        common.write(args.output, record | {"lengths": found})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--plan", type=Path, help="a plan file; without it a plan is made")
    parser.add_argument("--filler", required=True, help="a text file")
    parser.add_argument("--passages", required=True, help="another text file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--count", type=int, default=20, help="plants of copy recall")
    parser.add_argument("--start", type=int, default=20_000, help="tokens of the text to pass over")
    parser.add_argument("--chunk", type=int, default=512, help="tokens read at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the random spans")
    parser.add_argument("--commit", help="of the code, where it runs outside of its repository")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def make_plan(model: Loaded, args: argparse.Namespace) -> Plan:
    """A plan of half density for SmolLM2."""
    folder = args.output.parent if args.output else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    PlanSpans((Questions(count=8), Quotations(count=8)), SMOLLM2, VALIDATION, cuts=2).run(model, folder)
    return Plan.load(folder / "plan.json")


def specs(spec: ModelSpec, plan: Plan, length: int, seed: int) -> dict[str, ModelSpec]:
    """The variants for requests of `length` tokens."""
    rules = [pair for layer in zip(plan.alphas, plan.betas, strict=True) for pair in zip(*layer, strict=True)]
    keeps = np.array([kept_tokens(*rule, length, plan.block) for rule in rules])
    dealt = np.random.default_rng(seed).permutation(keeps)
    even = np.full(len(keeps), round(keeps.mean()))
    return {
        "dense": spec,
        "plan": under(spec, plan, length),
        "uniform": spanned(spec, even, length, plan.block),
        "random": spanned(spec, dealt, length, plan.block),
    }


def spanned(spec: ModelSpec, keeps: Sequence[int] | np.ndarray, length: int, block: int) -> ModelSpec:
    """The spec whose heads, in the order of layers, keep so many tokens."""
    each = [(0, None) if kept >= length else (block, int(kept) - block) for kept in keeps]
    heads = spec.num_kv_heads
    layers = [each[i * heads : (i + 1) * heads] for i in range(spec.num_layers)]
    patterns = [Spans(tuple(s for s, _ in layer), tuple(w for _, w in layer)) for layer in layers]
    pairs = zip(spec.layers, patterns, strict=True)
    mixers = tuple(dataclasses.replace(m, pattern=p) for m, p in pairs if isinstance(m, Attention))
    return dataclasses.replace(spec, pattern=period(mixers))


@dataclasses.dataclass(frozen=True)
class Held(Spans):
    """The same spans over a cache of every token: rings of as many sizes as spans would be as many programs."""

    def cache(self, room: Room) -> AttentionCache:
        return room.whole(room.num_kv_heads)


def held(spec: ModelSpec) -> ModelSpec:
    """The spec with its spans `Held`."""

    def over(mixer: Mixer) -> Mixer:
        if not isinstance(mixer, Attention) or not isinstance(mixer.pattern, Spans):
            return mixer
        return dataclasses.replace(mixer, pattern=Held(mixer.pattern.sinks, mixer.pattern.windows))

    return dataclasses.replace(spec, pattern=tuple(map(over, spec.pattern)))


def measure(model: Loaded, spec: ModelSpec, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: loss and hits of copied tokens, perplexity of a text and its last window."""
    quick = held(spec)
    variant = model._replace(graphdef=abstract(quick)[0], spec=quick)
    probe = CopyRecallProbe(
        args.filler, args.passages, (length,), count=args.count, chunk=min(args.chunk, length), lost=False
    )
    options: Any = {"start": args.start, "chunk": min(args.chunk, length), "window": length // 8}
    text = Perplexity(args.filler, lengths=(length,), **options)
    with tempfile.TemporaryDirectory() as folder:
        copied, read = probe.run(variant, Path(folder)), text.run(variant, Path(folder))
    positions = dict(read["perplexity_by_position"])
    return {
        "density": density(spec, length),
        "copy_nll": copied["copy_recall_nll"][str(length)],
        "copy_top1": copied["copy_recall_top1"][str(length)],
        "perplexity": read["perplexity"][str(length)],
        "last_window": positions[max(positions, key=int)],
        "by_position": positions,
    }


def density(spec: ModelSpec, length: int) -> float:
    """Share of the keys and values of `length` tokens that are kept, over layers and heads."""
    patterns = [getattr(mixer, "pattern", None) for mixer in spec.layers]
    spans = [span for p in patterns if isinstance(p, Spans) for span in p.spans]
    kept = [length if window is None else min(sink + window, length) for sink, window in spans]
    return float(np.mean(kept)) / length if kept else 1.0


if __name__ == "__main__":
    main()
