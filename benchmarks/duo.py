"""DuoAttention at a long context: decode speed against what its bytes allow, and cache sizes.

    python -m benchmarks.duo --output benchmarks/results/duo.json               # 128K and 256K tokens, one H100
    python -m benchmarks.duo --small --contexts 512 --steps 2 --repeats 1       # to see that it runs

Layers with random weights: shaped like Llama 2 7B's with a quarter of the heads retrieving ('mha'), and like Llama 3
8B's with half of them ('gqa'); streaming heads keep 64 + 256 tokens. With weights W, a full cache C and the split one
rho C, bytes allow (W + C) / (W + rho C); what is reached is the ratio of the decode steps' times. `--int8` keeps the
retrieval heads in int8 (and compares with a full cache of bfloat16).
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from benchmarks import common, decode_model
from lcjax.cache import CacheLayout, cache_bytes
from lcjax.data.tokenizers import load_tokenizer
from lcjax.models.decoder import abstract
from lcjax.models.patterns import Spans
from lcjax.models.spec import Attention, ModelSpec
from lcjax.serve.source import Loaded, random_model

SINK, WINDOW, CHUNK = 64, 256, 8192
MHA = ModelSpec(
    name="mha", vocab_size=32000, width=4096, mlp_width=11008, num_layers=8, num_heads=32, num_kv_heads=32,
    head_dim=128, tie_embeddings=False,
)  # fmt: skip
GQA = dataclasses.replace(MHA, name="gqa", mlp_width=14336, num_kv_heads=8)
RETRIEVAL = {"mha": 0.25, "gqa": 0.5}
TARGETS = {"share_of_bytes": 0.9, "cache": {"mha": 3.8, "gqa": 1.95}}
SMALL = {"vocab_size": 512, "width": 64, "mlp_width": 96, "num_layers": 2, "num_heads": 8, "head_dim": 16}


def main() -> None:
    """Parse, measure, print, write."""
    args = _arguments()
    found = [measure(name, context, args) for name in args.shapes for context in args.contexts]
    record = {**common.environment(args.commit), "convention": __doc__, "arguments": vars(args) | {"output": None}}
    if args.output:
        common.write(args.output, record | {"targets": TARGETS, "runs": found})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(RETRIEVAL), default=["mha", "gqa"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[131_072, 262_144])
    parser.add_argument("--int8", action="store_true", help="retrieval heads in int8")
    parser.add_argument("--small", action="store_true", help="shapes that a CPU can run")
    parser.add_argument("--steps", type=int, default=16, help="tokens a dispatch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--commit", help="of the code, where it runs outside of its repository")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def split(spec: ModelSpec, share: float) -> ModelSpec:
    """Every layer with this share of retrieval heads, which lie anywhere."""
    order = jax.random.permutation(jax.random.key(0), spec.num_kv_heads).tolist()
    keep = set(order[: round(share * spec.num_kv_heads)])
    spans = [(0, None) if head in keep else (SINK, WINDOW) for head in range(spec.num_kv_heads)]
    pattern = Spans(tuple(sink for sink, _ in spans), tuple(window for _, window in spans))
    return dataclasses.replace(spec, pattern=(Attention(pattern=pattern),))


def measure(name: str, context: int, args: argparse.Namespace) -> dict[str, Any]:
    """Full attention and the split heads, one after the other."""
    spec = dataclasses.replace({"mha": MHA, "gqa": GQA}[name], max_length=2 * context)
    if args.small:
        spec = dataclasses.replace(spec, **SMALL, num_kv_heads=8 if name == "mha" else 4)
    full = random_model(spec, load_tokenizer("bytes"))
    sparse = split(spec, RETRIEVAL[name])
    duo = full._replace(graphdef=abstract(sparse)[0], spec=sparse)
    layouts = CacheLayout(), CacheLayout(dtype="int8" if args.int8 else None)
    times = [step(model, context, layout, args) for model, layout in zip((full, duo), layouts, strict=True)]
    (slow, whole), (fast, part) = times
    weights = sum(x.nbytes for x in jax.tree.leaves(full.params))
    allowed = (weights + whole) / (weights + part)
    found = {
        "shape": name, "context": context, "int8": args.int8, "retrieval": RETRIEVAL[name],
        "decode_seconds": {"full": slow, "duo": fast}, "cache_bytes": {"full": whole, "duo": part},
        "weight_bytes": weights, "cache_ratio": whole / part, "faster": slow / fast, "bytes_allow": allowed,
        "share_of_bytes": slow / fast / allowed,
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    return found


def step(model: Loaded, context: int, layout: CacheLayout, args: argparse.Namespace) -> tuple[float, int]:
    """(seconds of a decode step behind `context` tokens, bytes of the caches)."""
    decode_model.gate(model)
    run = decode_model.Run(
        model, 1, context, args.steps * (args.repeats + 1), args.steps, layout=layout, chunk=min(CHUNK, context)
    )
    state, seconds = decode_model.decode_steps(run, args)
    return seconds, cache_bytes(state.caches)


if __name__ == "__main__":
    main()
