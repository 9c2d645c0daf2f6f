"""LongGen hybrids against full attention: a train step, prefill, decoding and cache bytes of one stack.

    python -m benchmarks.longgen --output benchmarks/results/longgen.json        # 128K tokens, one H100
    python -m benchmarks.longgen --small --length 512 --steps 2 --repeats 1      # to see that it runs

Eight layers shaped like Llama 2 7B's with random weights, three of them full (the paper keeps 12 of 32): 'window' keeps
1,024 tokens in the others, 'strided' 16 blocks of 64 and every 16th. The full layers of all stacks train and read
prompts on cuDNN (`--full`); under `--remat attention` its forward runs a second time, while results of 'mosaic_gpu' are
kept. Prompts are read in one chunk. `by_flops` is how much faster a train step would be if time were arithmetic,
`by_bytes` a decode step if it were bytes.
"""

import argparse
import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import jax

from benchmarks import common, decode_model, train_step
from lcjax.cache import cache_bytes
from lcjax.data.tokenizers import load_tokenizer
from lcjax.methods import LongGen
from lcjax.models.decoder import abstract
from lcjax.models.flops import CONVENTION, flops_per_token
from lcjax.models.patterns import Strided
from lcjax.models.spec import ModelSpec
from lcjax.serve.source import Loaded, random_model
from pallas_kernels.op import prefer

STACK = ModelSpec(
    name="llama2-7b-stack", vocab_size=32000, width=4096, mlp_width=11008, num_layers=8, num_heads=32,
    num_kv_heads=32, head_dim=128, tie_embeddings=False,
)  # fmt: skip
SMALL = {"name": "small", "vocab_size": 512, "width": 64, "mlp_width": 96, "num_heads": 4, "num_kv_heads": 4}
VARIANTS = {
    "window": LongGen(full=3, sink=64, window=960),
    "strided": LongGen(full=3, window=None, strided=Strided(block=64, local=16, every=16)),
}
SMALL_VARIANTS = {
    "window": LongGen(full=3, sink=4, window=60),
    "strided": LongGen(full=3, window=None, strided=Strided(block=16, local=2, every=4)),
}
TARGETS = {"train": 1.75, "prefill": 1.75, "decode": 1.9, "cache": 0.381}


def main() -> None:
    """Parse, measure, print, write."""
    args = _arguments()
    stack = dataclasses.replace(STACK, max_length=args.length + args.steps * (args.repeats + 2))
    if args.small:
        stack = dataclasses.replace(stack, **SMALL, head_dim=16)
    variants = SMALL_VARIANTS if args.small else VARIANTS
    specs = {"full": stack} | {name: variants[name].model(stack) for name in args.variants}
    with prefer(args.full):
        found = measured(specs, args)
    record = {**common.environment(args.commit), "convention": CONVENTION, "arguments": vars(args) | {"output": None}}
    record |= {"runs": found, "against_full": {n: against(found, n, specs, args) for n in args.variants}}
    print(json.dumps(record["against_full"], indent=1), flush=True)
    if args.output:
        common.write(args.output, record | {"targets": TARGETS})


def measured(specs: dict[str, ModelSpec], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every part of every stack."""
    found = {name: trained(spec, args) for name, spec in specs.items()} if "train" in args.parts else {}
    if "decode" in args.parts:
        weights = random_model(specs["full"], load_tokenizer("bytes"))
        for name, spec in specs.items():
            model = weights._replace(graphdef=abstract(spec)[0], spec=spec)
            found[name] = found.get(name, {}) | decoded(model, args)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=["window", "strided"])
    parser.add_argument("--parts", nargs="+", choices=("train", "decode"), default=["train", "decode"])
    parser.add_argument("--full", choices=("cudnn", "mosaic_gpu"), default="cudnn", help="backend of full attention")
    parser.add_argument("--small", action="store_true", help="a stack that a CPU can run")
    parser.add_argument("--steps", type=int, default=16, help="tokens a dispatch when decoding")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--remat", default="attention")
    parser.add_argument("--commit", help="of the code, where it runs outside of its repository")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def trained(spec: ModelSpec, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a train step on one row that is one document."""
    how = argparse.Namespace(
        remat=args.remat, scan=False, exchange="auto", loss="chunked", batch=1, length=args.length,
        steps=args.repeats, packed=False,
    )  # fmt: skip
    found = train_step.measure(spec, how, devices=1)
    print(spec.name, json.dumps(found), flush=True)
    gc.collect()
    return {"train_seconds": found["seconds"], "train": found}


def decoded(model: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    """Prefill of the whole prompt, and a decode step behind it."""
    decode_model.gate(model)
    run = decode_model.Run(model, 1, args.length, args.steps * (args.repeats + 1), args.steps)
    prefill = common.milliseconds(run.begin, target=0.01, repeats=args.repeats)
    state, step = decode_model.decode_steps(run, args)
    found = {
        "prefill_seconds": prefill["ms"] / 1e3,
        "decode_seconds": step,
        "cache_bytes": cache_bytes(state.caches),
        "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(model.params)),
    }
    print(model.spec.name, json.dumps(found), flush=True)
    return found


def against(
    found: dict[str, dict[str, Any]], name: str, specs: dict[str, ModelSpec], args: argparse.Namespace
) -> dict[str, float]:
    """How much faster and smaller a variant is than full attention."""
    full, mine = found["full"], found[name]
    faster = {
        part: full[f"{part}_seconds"] / mine[f"{part}_seconds"]
        for part in ("train", "prefill", "decode")
        if f"{part}_seconds" in mine
    }
    flops = [flops_per_token(specs[n], args.length, training=True) for n in ("full", name)]
    faster["train_by_flops"] = flops[0] / flops[1]
    if "cache_bytes" in mine:
        weights = mine["weight_bytes"]
        faster["cache"] = mine["cache_bytes"] / full["cache_bytes"]
        faster["decode_by_bytes"] = (weights + full["cache_bytes"]) / (weights + mine["cache_bytes"])
    return faster


if __name__ == "__main__":
    main()
