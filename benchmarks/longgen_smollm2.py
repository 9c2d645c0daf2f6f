"""SmolLM2 extended to 32K twice on the same tokens, as a LongGen hybrid and with full attention: perplexity and cache.

    python -m benchmarks.longgen_smollm2 --books data/*.txt --test held_out.txt --output runs/longgen_smollm2

Trains `configs/repro/longgen.gin` and `configs/repro/longgen_full.gin` (8M tokens each; books, Python's library and
pass keys), then reads the first 32K tokens of the book that no run has seen. The hybrid is to reach 1.03 of the full
model's perplexity with 38 % of its cache. One GPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax

from benchmarks import common, runs
from lcjax.cache import init_caches
from lcjax.eval.perplexity import Perplexity
from lcjax.models.spec import ModelSpec
from lcjax.serve.source import Pretrained

MODELS = {"longgen": "configs/repro/longgen.gin", "full": "configs/repro/longgen_full.gin"}
TARGETS = {"perplexity_ratio": 1.03, "cache": 0.38}


def main() -> None:
    """Train both, read the book, print, write."""
    args = _arguments()
    found: dict[str, dict[str, Any]] = {}
    for name, file in MODELS.items():
        folder = runs.train([file], [runs.paths(args.books), *args.gin_bindings], args.output / name)
        model = Pretrained(str(folder), "bfloat16").load()
        measure = Perplexity(str(args.test), lengths=tuple(args.lengths), chunk=min(2048, *args.lengths), name=name)
        tables = measure.run(model, args.output)
        found[name] = {"perplexity": tables[name], "cache_bytes": cache_bytes(model.spec, max(args.lengths))}
    ratios = {
        length: found["longgen"]["perplexity"][length] / full for length, full in found["full"]["perplexity"].items()
    }
    share = found["longgen"]["cache_bytes"] / found["full"]["cache_bytes"]
    record = {**common.environment(), "models": found, "perplexity_ratio": ratios, "cache": share, "targets": TARGETS}
    print(json.dumps({"perplexity_ratio": ratios, "cache": share}), flush=True)
    common.write(args.output / "longgen_smollm2.json", record)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, nargs="+", required=True, help="text files to train on")
    parser.add_argument("--test", type=Path, required=True, help="a text file that is not among them")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--gin_bindings", action="append", default=[], help="of both runs (repeatable)")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def cache_bytes(spec: ModelSpec, length: int) -> int:
    """Bytes of keys and values for one request of `length` tokens; nothing is allocated."""
    caches = jax.eval_shape(lambda: init_caches(spec, 1, length))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches) if x.ndim > 1)


if __name__ == "__main__":
    main()
