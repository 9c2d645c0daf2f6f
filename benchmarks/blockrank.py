"""Ranking in one pass against ranking by writing: a 7B-shaped model, random weights and tokens.

    python -m benchmarks.blockrank --output benchmarks/results/blockrank.json
    python -m benchmarks.blockrank --small --documents 4 8 --size 32 --dense 8 --repeats 2   # a check, on any machine

BlockRank (arXiv 2510.05396) reads documents that don't see each other, through the layers before the scoring one and no
further. For each number of documents: time, FLOPs (documents' own pairs only), share of the device's bf16 peak. The
dense ranking of `--dense` documents is the same model with full attention through all layers, a prefill of the same
tokens and then the tokens of one number (the best document's) or of all of them; `--number_tokens` a number.
A gate compares the shares of documents in two orders before anything is timed.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.decode_model import Run, decode_steps
from lcjax.data.ranking import DOCUMENT, OTHER, SIGNAL
from lcjax.data.tokenizers import load_tokenizer
from lcjax.models.spec import Attention, ModelSpec
from lcjax.observe.hardware import peak_flops
from lcjax.parallel.work import count_flops
from lcjax.positions.laws import Rope
from lcjax.serve.rank import score_program
from lcjax.serve.source import Loaded, random_model

MISTRAL = ModelSpec(
    name="mistral-7b", vocab_size=32768, width=4096, mlp_width=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, pattern=(Attention(rope=Rope(base=1e6)),), max_length=32768, tie_embeddings=False, dtype="bfloat16",
)  # fmt: skip
SMALL = dataclasses.replace(
    MISTRAL, name="small", vocab_size=512, width=64, mlp_width=96, num_layers=4, num_heads=4, num_kv_heads=2,
    head_dim=16,
)  # fmt: skip
OFFSET = 16384  # where the last block's positions begin
GATE = 8  # documents


def main() -> None:
    """Parse, check, measure, print, write."""
    args = _arguments()
    model = random_model(SMALL if args.small else MISTRAL, load_tokenizer("bytes"))
    layer = round(model.spec.num_layers * 20 / 32)
    gate(model, args.size, layer)
    ranked = [rank(model, documents, args.size, layer) for documents in sorted({*args.documents, args.dense})]
    print(common.table(ranked, ("documents", "tokens", "ms", "tflops", "share_of_peak", "pairs")), flush=True)
    written = dense(model, args)
    own = next(row["ms"] for row in ranked if row["documents"] == args.dense)
    written |= {f"{name}_times_blockrank": written[f"{name}_ms"] / own for name in ("top", "order")}
    print(common.table([written], tuple(written)), flush=True)
    record = {**common.environment(args.commit), "convention": __doc__, "arguments": vars(args) | {"output": None}}
    if args.output:
        common.write(args.output, record | {"layer": layer, "ranked": ranked, "dense": written})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[125, 250, 500])
    parser.add_argument("--size", type=int, default=192, help="tokens of a block")
    parser.add_argument("--dense", type=int, default=100, help="documents of the comparison with dense ranking")
    parser.add_argument("--number_tokens", type=int, default=4, help="tokens of a written number and its comma")
    parser.add_argument("--small", action="store_true", help="four narrow layers")
    parser.add_argument("--steps", type=int, default=32, help="tokens a dispatch in the dense ranking")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--commit", help="of the code, where it runs outside of its repository")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def rows(documents: int, size: int, vocab_size: int) -> dict[str, jax.Array]:
    """One row of full blocks of random tokens."""
    blocks = documents + 2
    roles = np.full((blocks, size), DOCUMENT)
    roles[[0, -1]] = OTHER
    roles[-1, -2:] = SIGNAL
    starts = np.array([0, *[size] * documents, OFFSET])
    fields = {
        "inputs": np.random.default_rng(0).integers(0, vocab_size, (blocks, size)),
        "positions": starts[:, None] + np.arange(size),
        "segment_ids": np.ones((blocks, size)),
        "roles": roles,
    }
    return {name: jnp.asarray(values.reshape(1, -1), jnp.int32) for name, values in fields.items()}


def gate(model: Loaded, size: int, layer: int) -> None:
    """Documents in another order have their shares in that order."""
    batch = rows(GATE, size, model.spec.vocab_size)
    order = np.random.default_rng(1).permutation(GATE)
    blocks = batch["inputs"].reshape(-1, size)
    moved = batch | {"inputs": blocks[np.array([0, *(order + 1), GATE + 1])].reshape(1, -1)}
    program = score_program(model.spec, GATE, size, layer)
    shares, others = (np.asarray(program(model.params, each))[0] for each in (batch, moved))
    common.gate("shares in another order", others, shares[order], 0.05)
    common.gate("sum of shares", shares.sum(), 1.0, 1e-3)


def rank(model: Loaded, documents: int, size: int, layer: int) -> dict[str, Any]:
    """One row of the results."""
    batch = rows(documents, size, model.spec.vocab_size)
    program = score_program(model.spec, documents, size, layer)
    flops = count_flops(program, model.params, batch, recomputed=False)
    ms = common.milliseconds(program, model.params, batch)["ms"]
    rate, peak = common.tflops(flops, ms), peak_flops(jax.devices()[0])
    tokens = (documents + 2) * size
    return {
        "documents": documents,
        "tokens": tokens,
        "ms": ms,
        "flops": flops,
        "tflops": rate,
        "share_of_peak": None if peak is None else rate * 1e12 / peak,
        "pairs": (documents + 2) * size * (size + 1) // 2 + (2 * documents + 1) * size * size,
    }


def dense(model: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a dense prefill, of a step, and of writing one number and all."""
    context = (args.dense + 2) * args.size
    run = Run(model, 1, context, args.steps * (args.repeats + 1), args.steps)
    prefill = common.milliseconds(run.begin)["ms"]
    step = 1e3 * decode_steps(run, args)[1]
    return {
        "documents": args.dense,
        "tokens": context,
        "prefill_ms": prefill,
        "step_ms": step,
        "top_ms": prefill + args.number_tokens * step,
        "order_ms": prefill + args.dense * args.number_tokens * step,
    }


if __name__ == "__main__":
    main()
