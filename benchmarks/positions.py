"""Position laws on a real model, training-free, and the time of dual chunk attention.

    python -m benchmarks.positions laws --model SmolLM2.gguf --tokens a.npy b.npy --output laws.json
    python -m benchmarks.positions dual_chunk --output dual_chunk.json

`laws`: perplexity of the same targets under every law, one pass over each text (int32 ids in .npy), against a sliding
context of the trained length (windows that overlap by half). Laws whose factor follows the length are run once per
multiple of the trained length, each pass scored where its factor holds. Rotary tables are arguments, so all laws
of one attention pattern share a program; programs are compiled side by side.

`dual_chunk`: milliseconds of the op beside plain causal attention on the same backend, after a gate against the
reference.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks import common
from lcjax.checkpoint.hf import load_pretrained
from lcjax.layers.attention import Context
from lcjax.models.decoder import abstract
from lcjax.models.spec import ModelSpec
from lcjax.models.stack import apply_stacked
from lcjax.positions import (
    DPE,
    NTK,
    ByParts,
    DualChunk,
    DynamicLinear,
    DynamicNTK,
    DynamicYaRN,
    Giraffe,
    Linear,
    Llama3,
    Remap,
    Rope,
    SelfExtend,
    YaRN,
)
from lcjax.positions.tables import Tables, of_tokens
from pallas_kernels import block_sparse_attention, dual_chunk_attention
from pallas_kernels.dual_chunk import reference
from pallas_kernels.masks import Causal

PIECE = 1024  # tokens whose logits exist at a time


@dataclasses.dataclass(frozen=True)
class Entry:
    """A law under test; `temperature` multiplies cos and sin beside the law's own factor."""

    name: str
    law: Rope
    remap: Remap | None = None
    temperature: float = 1.0


def entries(base: float, trained: int, length: int, pairs: int) -> list[Entry]:
    """What is compared, for a model of this base and trained length."""
    f = length // trained
    warm = 0.1 * float(np.log(f)) + 1
    shared: dict[str, Any] = {"base": base, "factor": float(f), "original_length": trained}
    plain, near, wide = Rope(base), trained // 8, trained // 2
    size = trained * 3 // 4
    found = [
        Entry("plain", plain),
        Entry("linear", Linear(base, factor=f)),
        Entry("ntk", NTK(base, factor=f)),
        Entry("ntk x2", NTK(base, factor=2 * f)),
        Entry("dynamic ntk", DynamicNTK(base, factor=1.0, original_length=trained)),
        Entry("by parts (1, 32)", ByParts(**shared)),
        Entry("by parts (1, 32), temperature", ByParts(**shared), temperature=warm),
        Entry("llama3 (1, 4)", Llama3(**shared)),
        Entry("yarn", YaRN(**shared)),
        Entry("yarn x2", YaRN(base, factor=2.0 * f, original_length=trained)),
        Entry("dynamic yarn", DynamicYaRN(base, original_length=trained, max_factor=f)),
        Entry("dynamic linear", DynamicLinear(base, original_length=trained, max_factor=f)),
        Entry("giraffe power 0.5", Giraffe(base, power=0.5)),
        Entry("giraffe truncated", Giraffe(base, truncate=trained)),
        Entry("abf x8", Rope(8 * base)),
    ]
    for local, whole in ((trained // 8, size), (trained // 8, trained)):
        remap = DualChunk(whole, local)
        found.append(Entry(f"dual chunk ({whole}, {local})", plain, remap))
        found.append(Entry(f"dual chunk ({whole}, {local}), temperature", plain, remap, warm))
        found.append(Entry(f"dual chunk ({whole}, {local}), half temperature", plain, remap, (1 + warm) / 2))
    for window in (near, wide):
        for group in (f, 2 * f, 4 * f):
            found.append(Entry(f"self-extend (group {group}, window {window})", plain, SelfExtend(group, window)))
        for n in (1, 2, 4):  # groups of pairs kept at their distance, the fast ones
            factors = (1,) * n + (2 * f,) * (8 - n)
            found.append(Entry(f"dpe {factors}, window {window}", plain, DPE(1, window, factors, pairs)))
        remap = DPE(1, window, (2 * f,) * 8, pairs)
        found.append(Entry(f"dpe all {2 * f}, window {window}, temperature", plain, remap, warm))
    return found


def program(spec: ModelSpec, remap: Remap | None) -> Any:
    """Jitted (params, tokens [B,T+1], tables) -> nll [B,T], for the attention pattern of `remap`."""
    spec = spec.with_positions(Rope(), remap)
    graphdef, _ = abstract(spec)

    def run(params: Any, tokens: jax.Array, tables: Tables) -> jax.Array:
        model = nnx.merge(graphdef, params)
        x = model.embed(tokens[:, :-1]).astype(spec.compute_dtype)
        length = jnp.full(x.shape[:1], x.shape[1])
        context = Context({}, {(Rope(), remap): tables}, length)
        x = model.norm(apply_stacked(list(model.layers), x, context, "none", scan=True))
        pieces = lambda a: jnp.moveaxis(a.reshape(a.shape[0], -1, min(PIECE, a.shape[1]), *a.shape[2:]), 1, 0)

        def losses(piece: Any) -> jax.Array:
            logits = model.logits(piece[0])
            return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, piece[1][..., None], -1)[..., 0]

        nll = lax.map(losses, (pieces(x), pieces(tokens[:, 1:])))
        return jnp.moveaxis(nll, 0, 1).reshape(tokens.shape[0], -1)

    return jax.jit(run)


def tables_of(entry: Entry, head_dim: int, length: int, reached: int) -> Tables:
    """The rotary tables of tokens 0..length - 1 under a running length."""
    each, factor = entry.law.frequencies(head_dim, reached)
    make = functools.partial(of_tokens, entry.law, entry.remap, (each, factor * entry.temperature), head_dim)
    return jax.jit(lambda p: make(p, length // 2))(jnp.arange(length, dtype=jnp.int32)[None])


def pattern(remap: Remap | None) -> Remap | None:
    """Entries of equal patterns share a program: once tables are made, only Self-Extend's and DPE's window matters."""
    return SelfExtend(1, remap.window) if isinstance(remap, SelfExtend) else remap


def laws(args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    loaded = load_pretrained(str(args.model), dtype=args.dtype)
    spec, params = loaded.spec, loaded.params
    law = spec.laws[0][0]
    trained, dim, length = args.trained or spec.max_length, spec.head_dim, args.length
    texts = {path.stem: np.load(path)[: length + 1].astype(np.int32) for path in args.tokens}
    print(f"model and tokens after {time.perf_counter() - began:.1f} s", flush=True)
    compared = entries(law.base, trained, length, dim // 2)
    width, step = trained, trained // 2
    begins = range(0, length - width + 1, step)
    windows = {n: np.stack([ids[b : b + width + 1] for b in begins]) for n, ids in texts.items()}
    first = next(iter(texts.values()))
    plain = compared[0]
    jobs = {"sliding": (None, next(iter(windows.values())), tables_of(plain, dim, width, width))}
    for entry in compared:
        key = str(pattern(entry.remap))
        if key not in jobs:
            jobs[key] = (pattern(entry.remap), first[None], tables_of(entry, dim, length, length))
    make = lambda job: program(spec, job[0]).lower(params, *job[1:]).compile()
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        compiled = dict(zip(jobs, pool.map(make, jobs.values()), strict=True))
    print(f"{len(jobs)} programs after {time.perf_counter() - began:.1f} s", flush=True)
    baseline = {}
    for name, rows in windows.items():
        nll = np.asarray(compiled["sliding"](params, rows, jobs["sliding"][2]), np.float64)
        baseline[name] = np.concatenate([nll[0], *(row[width - step :] for row in nll[1:])])
    results = {"sliding": summary(baseline, baseline, trained)}
    print("sliding", json.dumps(results["sliding"]), flush=True)
    for entry in compared:
        run = compiled[str(pattern(entry.remap))]
        found = {name: losses(entry, run, params, ids, dim, trained) for name, ids in texts.items()}
        results[entry.name] = summary(found, baseline, trained)
        brief = {n: (round(v["perplexity"], 2), round(v["ratio"], 3)) for n, v in results[entry.name].items()}
        print(f"{time.perf_counter() - began:6.1f} s  {entry.name}: {brief}", flush=True)
    return {"trained": trained, "length": length, "dtype": args.dtype, "results": results}


def losses(entry: Entry, run: Any, params: Any, ids: np.ndarray, dim: int, trained: int) -> np.ndarray:
    """nll [T] of one text; laws that follow the length score each stretch at its own running length."""
    length = len(ids) - 1
    if not entry.law.follows_length:
        return np.asarray(run(params, ids[None], tables_of(entry, dim, length, length)), np.float64)[0]
    parts = []
    for end in range(trained, length + 1, trained):
        nll = run(params, ids[None], tables_of(entry, dim, length, end))
        parts.append(np.asarray(nll, np.float64)[0, end - trained : end])
    return np.concatenate(parts)


def summary(found: dict[str, np.ndarray], baseline: dict[str, np.ndarray], window: int) -> dict[str, Any]:
    """Per text: perplexity of all targets, its ratio to the sliding context's, and both by windows."""
    perplexity = lambda x: float(np.exp(x.mean()))
    table = {}
    for name, nll in found.items():
        by = [perplexity(nll[i : i + window]) for i in range(0, len(nll), window)]
        base = [perplexity(baseline[name][i : i + window]) for i in range(0, len(nll), window)]
        table[name] = {
            "perplexity": perplexity(nll),
            "ratio": perplexity(nll) / perplexity(baseline[name]),
            "by_window": by,
            "ratio_by_window": [a / b for a, b in zip(by, base, strict=True)],
        }
    return table


def with_gradient(attend: Callable[..., Any]) -> Callable[..., Any]:
    def run(queries: Any, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, vjp = jax.vjp(attend, queries, k, v)
        return o, vjp(do)

    return run


def shapes(length: int, heads: int, kv_heads: int, dim: int) -> tuple[Any, ...]:
    """Three queries, k, v, do in bfloat16."""
    keys = list(jax.random.split(jax.random.key(0), 6))
    sizes = (heads, heads, heads, kv_heads, kv_heads, heads)
    draw = jax.jit(lambda key, h: jax.random.normal(key, (1, length, h, dim), jnp.bfloat16), static_argnums=1)
    made = [draw(key, h) for key, h in zip(keys, sizes, strict=True)]
    return tuple(made[:3]), *made[3:]


def dual_chunk(args: argparse.Namespace) -> dict[str, Any]:
    chunk, implementation = args.chunk, args.implementation
    op = functools.partial(dual_chunk_attention, implementation=implementation)
    ours = functools.partial(op, chunk=chunk)
    dense = lambda q, k, v: block_sparse_attention(q[0], k, v, Causal(), implementation=implementation)
    small = shapes(args.gate_length, 4, 2, 128)
    gate = {
        "actual": jax.jit(with_gradient(functools.partial(op, chunk=args.gate_chunk))),
        "wanted": jax.jit(with_gradient(lambda *x: reference.attend(*x, args.gate_chunk)[0])),
    }
    large = shapes(args.length, 32, 8, 128)
    runs = {
        "dense forward": (jax.jit(dense), large[:3]),
        "dual chunk forward": (jax.jit(ours), large[:3]),
        "dense forward + backward": (jax.jit(with_gradient(dense)), large),
        "dual chunk forward + backward": (jax.jit(with_gradient(ours)), large),
    }
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), small)
    began = time.perf_counter()
    todo = {n: (f, wide if n == "wanted" else small) for n, f in gate.items()} | runs
    with concurrent.futures.ThreadPoolExecutor(len(todo)) as pool:
        compiled = dict(zip(todo, pool.map(lambda job: job[0].lower(*job[1]).compile(), todo.values()), strict=True))
    print(f"{len(todo)} programs after {time.perf_counter() - began:.1f} s", flush=True)
    errors = common.gate("dual_chunk", compiled["actual"](*small), compiled["wanted"](*wide), 2e-2)
    print("errors", json.dumps(errors), flush=True)
    times = {}
    for name, (_, arguments) in runs.items():
        times[name] = common.milliseconds(compiled[name], *arguments, repeats=3)
        print(name, json.dumps(times[name]), flush=True)
    return {"length": args.length, "chunk": chunk, "errors": errors, "milliseconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("laws", "dual_chunk"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=Path, nargs="*")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--trained", type=int, help="trained length, where not the model's own")
    parser.add_argument("--length", type=int)
    parser.add_argument("--chunk", type=int, default=5120)
    parser.add_argument("--gate_length", type=int, default=2055)
    parser.add_argument("--gate_chunk", type=int, default=640)
    parser.add_argument("--implementation")
    parser.add_argument("--commit", help="of the code, where it runs outside of its repository")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.length = args.length or {"laws": 32_768, "dual_chunk": 131_072}[args.what]
    found = {"laws": laws, "dual_chunk": dual_chunk}[args.what](args)
    if args.output:
        common.write(args.output, {**common.environment(args.commit), **found})


if __name__ == "__main__":
    main()
