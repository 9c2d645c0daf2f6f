"""LAWCAT against softmax attention: a layer's prefill by length, a model's prefill, and decoding behind long prompts.

    python -m benchmarks.lawcat_speed --output benchmarks/results/lawcat_speed.json    # one H100
    python -m benchmarks.lawcat_speed --small                                          # to see that it runs

Layers: projections, convolutions, feature maps, gate, recurrence and output projection of LAWCAT's layer against
projections, rotary positions, causal attention (by cuDNN on an NVIDIA GPU, also where the library has a faster kernel)
and output projection of its teacher; one row, random weights, bfloat16. `core` is the recurrence or the attention
alone, on arrays of the layer's sizes. Model: SmolLM2's shape, random weights, all layers converted. `prefill` reads a
prompt in one chunk, softmax attention on the fastest backend that the library knows of; `decode` in chunks of 1,024
tokens, and then one compiled program writes behind prompts of every length, which take turns, so that a chip's clock
favours none. Times are medians.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from benchmarks import common, decode_model
from lcjax.cache import cache_bytes
from lcjax.data.tokenizers import load_tokenizer
from lcjax.methods import Lawcat
from lcjax.models.spec import ModelSpec
from lcjax.serve.source import Loaded, random_model
from pallas_kernels import block_sparse_attention, gated_linear_attention
from pallas_kernels.masks import Causal
from pallas_kernels.op import prefer

SMOLLM2 = decode_model.SMOLLM2
LAYERS = {
    "32x128": ModelSpec(
        name="32x128", vocab_size=512, width=4096, mlp_width=512, num_layers=1, num_heads=32, num_kv_heads=32,
        head_dim=128,
    ),
    "smollm2": dataclasses.replace(SMOLLM2, vocab_size=512, num_layers=1),
}  # fmt: skip
SMALL = dataclasses.replace(
    SMOLLM2, name="small", vocab_size=512, width=64, mlp_width=96, num_layers=1, num_heads=4, num_kv_heads=2,
    head_dim=16,
)  # fmt: skip
TARGETS = {"faster_from": {"32x128": 4096, "smollm2": 16384}, "prefill": 6.0, "decode_spread": 0.03}
GATE_TOKENS, GATE_LIMIT = 320, 2e-2  # five chunks of the kernel; relative error, bfloat16 against float32
COLUMNS = ("shape", "tokens", "lawcat_ms", "softmax_ms", "faster", "lawcat_core_ms", "softmax_core_ms")
type Timed = tuple[Callable[..., Any], Callable[[int], tuple[Any, ...]]]


def main() -> None:
    """Parse, measure, print, write."""
    args = _arguments()
    record = {**common.environment(args.commit), "convention": __doc__, "arguments": vars(args) | {"output": None}}
    record["targets"] = TARGETS
    for part in args.parts:
        record[part] = PARTS[part](args)
        if args.output:  # after each part: a later one that fails takes nothing away
            common.write(args.output, record)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024 * 2**n for n in range(2, 8)], help="of layers")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 131_072, 1_048_576], help="before decoding")
    parser.add_argument("--length", type=int, default=131_072, help="tokens of a model's prefill")
    parser.add_argument("--chunk", type=int, default=1024, help="in which prompts before decoding are read")
    parser.add_argument("--steps", type=int, default=32, help="tokens a dispatch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can run")
    parser.add_argument("--commit", help="of the code, where it runs outside of its repository")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.small:
        jax.config.update("jax_disable_most_optimizations", True)
        vars(args).update(lengths=[64], length=64, contexts=[32, 64], chunk=32, steps=4, repeats=2)
    return args


def drawn(spec: ModelSpec) -> Loaded:
    """Random weights."""
    return random_model(spec, load_tokenizer("bytes"))


def layers(args: argparse.Namespace) -> dict[str, Any]:
    """Both layers and their cores at every length, and the length from which on LAWCAT's stays faster."""
    rows, found = [], {}
    for name, spec in ({"small": SMALL} if args.small else LAYERS).items():
        ratios = {}
        for tokens, times in layer_times(spec, args.lengths).items():
            mine, theirs = times["lawcat_ms"], times["softmax_ms"]
            ratios[tokens] = None if isinstance(mine, str) or isinstance(theirs, str) else theirs / mine
            rows.append({"shape": name, "tokens": tokens, **times, "faster": ratios[tokens]})
            print(common.table(rows[-1:], COLUMNS), flush=True)
        found[name] = faster_from(ratios)
    print(common.table(rows, COLUMNS), f"faster from: {found}", sep="\n", flush=True)
    return {"rows": rows, "faster_from": found}


def layer_times(spec: ModelSpec, lengths: Sequence[int]) -> dict[int, dict[str, float | str]]:
    """Milliseconds by length and program, or why a program was not compiled; all are compiled first, side by side."""
    programs = layer_programs(spec)
    jobs = {
        (n, column): (run, jax.eval_shape(functools.partial(arguments, n)))
        for n in lengths
        for column, (run, arguments) in programs.items()
    }
    compiled = common.compile_all(jobs)

    def timed(n: int, column: str) -> float | str:
        program, (_, arguments) = compiled[n, column], programs[column]
        return program if isinstance(program, str) else common.milliseconds(program, *arguments(n))["ms"]

    return {n: {column: timed(n, column) for column in programs} for n in lengths}


def faster_from(ratios: dict[int, float | None]) -> int | None:
    """The shortest length from which on every ratio is above 1."""
    best = None
    for n in sorted(ratios, reverse=True):
        ratio = ratios[n]
        if ratio is None or ratio <= 1:
            break
        best = n
    return best


def layer_programs(spec: ModelSpec) -> dict[str, Timed]:
    """What is timed at every length: a function, and its arguments for n tokens."""
    lawcat, softmax = drawn(Lawcat().model(spec)), drawn(spec)
    for model in (lawcat, softmax):
        gate(model)
    hidden = functools.partial(hidden_states, spec)
    return {
        "lawcat_ms": (layer(lawcat), lambda n: (lawcat.params, hidden(n))),
        "softmax_ms": (by_cudnn(layer(softmax)), lambda n: (softmax.params, hidden(n))),
        "lawcat_core_ms": (
            lambda *x: gated_linear_attention(*x, normalise=True)[0],
            functools.partial(recurrence_inputs, spec),
        ),
        "softmax_core_ms": (
            by_cudnn(lambda *x: block_sparse_attention(*x, Causal())),
            functools.partial(attention_inputs, spec),
        ),
    }


def by_cudnn(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, whose causal attention goes to cuDNN where there is a GPU that has it."""

    def traced(*arguments: Any) -> Any:
        with prefer("cudnn"):
            return run(*arguments)

    return traced


def layer(model: Loaded) -> Callable[[Any, Float[Array, "1 T width"]], Float[Array, "1 T width"]]:
    """The first layer's mixer over a row from its first token on."""

    def run(params: Any, x: Array) -> Array:
        decoder = nnx.merge(model.graphdef, params)
        context = decoder.context(jnp.arange(x.shape[1])[None], 0, None, None)
        return decoder.layers[0].mixer(x, context)[0]

    return run


def gate(model: Loaded) -> None:
    """The layer in bfloat16 agrees with the same weights in float32."""
    x, run = hidden_states(model.spec, GATE_TOKENS), jax.jit(layer(model))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (model.params, x))
    common.gate(model.spec.name, run(model.params, x), run(*wide), GATE_LIMIT)


def hidden_states(spec: ModelSpec, n: int) -> Float[Array, "1 n width"]:
    return jax.random.normal(jax.random.key(0), (1, n, spec.width), jnp.bfloat16)


def recurrence_inputs(spec: ModelSpec, n: int) -> tuple[Array, ...]:
    """Features of queries and keys, values and log-decays, of every query head."""
    q, k, v, g = jax.random.uniform(jax.random.key(0), (4, 1, n, spec.num_heads, spec.head_dim), jnp.bfloat16)
    return q, k, v, -0.1 * g


def attention_inputs(spec: ModelSpec, n: int) -> tuple[Array, ...]:
    """Queries, and keys and values of the KV heads."""
    heads = spec.num_heads, spec.num_kv_heads, spec.num_kv_heads
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(key, (1, n, h, spec.head_dim), jnp.bfloat16) for key, h in zip(keys, heads, strict=True)
    )


@functools.cache
def models(small: bool) -> dict[str, Loaded]:
    """The linear and the softmax model; both go on from a chunk of a prompt as one pass would."""
    spec = SMALL if small else SMOLLM2
    found = {"lawcat": drawn(Lawcat().model(spec)), "softmax": drawn(spec)}
    for model in found.values():
        decode_model.gate(model)
    return found


def prefill(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both models for a prompt in one chunk."""
    seconds = {}
    for name, model in models(args.small).items():
        run = decode_model.Run(model, 1, args.length, args.steps, args.steps)
        seconds[name] = common.milliseconds(run.begin)["ms"] / 1e3
    found = {"tokens": args.length, "seconds": seconds, "faster": seconds["softmax"] / seconds["lawcat"]}
    print("prefill", json.dumps(found), flush=True)
    return found


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a token and bytes of states behind each prompt of the linear model."""
    model = models(args.small)["lawcat"]
    room = args.steps * (args.repeats + 1)
    run = decode_model.Run(model, 1, max(args.contexts), room, args.steps, chunk=args.chunk)
    states, seconds = {}, {context: [] for context in args.contexts}
    for context in args.contexts:
        if context % args.chunk:
            raise SystemExit(f"--contexts has {context}, which is no multiple of --chunk {args.chunk}")
        states[context] = run.begin(context // args.chunk)
    held = {context: cache_bytes(state.caches) for context, state in states.items()}
    for _ in range(args.repeats + 1):
        for context, state in states.items():
            jax.block_until_ready(state)
            began = time.perf_counter()
            states[context], written = run.programs.decode(state, *run.settings)
            jax.block_until_ready(written)
            seconds[context].append((time.perf_counter() - began) / args.steps)
    step = {context: 1e3 * statistics.median(all_[1:]) for context, all_ in seconds.items()}
    rows = [{"context": n, "ms_a_token": step[n], "tokens_per_second": 1e3 / step[n], "bytes": held[n]} for n in step]
    print(common.table(rows, tuple(rows[0])), flush=True)
    return {"rows": rows, "spread": max(step.values()) / min(step.values()) - 1}


PARTS = {"layers": layers, "prefill": prefill, "decode": decode}

if __name__ == "__main__":
    main()
