"""A whole model, prefilling and decoding: time, the byte limit, and where the time goes.

    python -m benchmarks.decode_model --output benchmarks/results/decode_model.json   # SmolLM2, fetched once
    python -m benchmarks.decode_model --random                                         # its shape, random weights
    python -m benchmarks.decode_model --random --small --context 256 --batches 1 2 --steps 4 --repeats 2

The byte limit of a decode step is (weights + keys and values of the context) / copy bandwidth, the bandwidth measured
in the same run by adding one to a large array (read and written: 2 x its bytes). Figures are medians, of decoding over
`--repeats` dispatches. A gate compares cached decoding with a full forward pass before anything is timed.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import common
from lcjax.cache import CacheLayout, cache_bytes, init_caches
from lcjax.cache.counts import counted
from lcjax.data.tokenizers import load_tokenizer
from lcjax.models.spec import Attention, ModelSpec
from lcjax.positions.laws import Rope
from lcjax.serve.programs import Programs
from lcjax.serve.sampling import Sampling, stack
from lcjax.serve.source import Loaded, Pretrained, random_model
from lcjax.serve.steps import DecodeState, Limits
from pallas_kernels.masks import Causal

SMOLLM2 = ModelSpec(
    name="smollm2-135m", vocab_size=49152, width=576, mlp_width=1536, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, pattern=(Attention(rope=Rope(base=100_000.0)),), max_length=8192, dtype="bfloat16",
)  # fmt: skip
SMALL = dataclasses.replace(SMOLLM2, name="small", vocab_size=512, num_layers=2)


def main() -> None:
    """Parse, measure, print, write."""
    args = _arguments()
    model = _model(args)
    gate(model)
    copy = common.copy_bandwidth(args.copy_bytes)
    runs = [measure(model, batch, copy, args) for batch in args.batches]
    record = {**common.environment(args.commit), "convention": __doc__, "arguments": vars(args) | {"output": None}}
    if args.output:
        common.write(args.output, record | {"copy_bytes_per_s": copy, "runs": runs})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prefill and decode speed of a model against the byte limit.")
    parser.add_argument("--random", action="store_true", help="random weights of SmolLM2's shape: needs no model file")
    parser.add_argument("--small", action="store_true", help="two layers and a small vocabulary (with --random)")
    parser.add_argument("--source", default="smollm2", help="a model as in pretrained.source")
    parser.add_argument("--context", type=int, default=8192, help="prompt tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=int, default=32, help="tokens a dispatch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copy_bytes", type=int, default=2**30)
    parser.add_argument("--commit", help="of the code, where it runs outside of its repository")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _model(args: argparse.Namespace) -> Loaded:
    if args.random:
        return random_model(SMALL if args.small else SMOLLM2, load_tokenizer("bytes"))
    return Pretrained(args.source, dtype="bfloat16").load()


class Run:
    """Programs for one batch and context, and the arguments they take; prompts are read in chunks (None: one)."""

    def __init__(
        self,
        model: Loaded,
        batch: int,
        context: int,
        room: int,
        steps: int,
        *,
        layout: CacheLayout | None = None,
        chunk: int | None = None,
    ):
        chunk = chunk or context
        if context % chunk:
            raise ValueError(f"a context of {context} tokens is no multiple of chunks of {chunk}")
        capacity = -(-(context + room) // 256) * 256
        sizes = {"batch": batch, "capacity": capacity, "chunk": chunk, "steps": steps}
        self.programs = Programs(model.graphdef, model.params, model.spec, sizes | {"cache": layout or CacheLayout()})
        endless = jnp.full(batch, 2**30, jnp.int32)
        lengths = jnp.full(batch, context + room, jnp.int32)
        self.settings = stack([Sampling()] * batch), Limits(endless, jnp.array([-1]), lengths)
        self.programs.prepare(*self.settings, extend=context > chunk)
        tokens = jax.random.randint(jax.random.key(batch), (batch, context), 0, model.spec.vocab_size)
        self.chunks = [tokens[:, at : at + chunk] for at in range(0, context, chunk)]
        self.valid = jnp.ones((batch, chunk), bool)
        self.last = {end: jnp.full(batch, end) for end in (False, True)}

    def begin(self, chunks: int | None = None) -> DecodeState:
        """A filled cache and the first token, after so many chunks of the prompt (None: all)."""
        read = self.chunks[:chunks]
        for n, tokens in enumerate(read, 1):
            arguments = tokens, self.valid, self.last[n == len(read)], *self.settings
            state = self.programs.begin(*arguments) if n == 1 else self.programs.extend(state, *arguments)
        return state


def gate(model: Loaded) -> None:
    """Cached decoding agrees with a full forward pass on the logits of the last token."""
    tokens = jax.random.randint(jax.random.key(0), (1, 65), 0, model.spec.vocab_size)

    @jax.jit
    def both(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        decoder = nnx.merge(model.graphdef, params)
        caches = init_caches(model.spec, 1, 256)
        _, caches = decoder.hidden(tokens[:, :64], caches=caches)
        cached, _ = decoder.hidden(tokens[:, 64:], caches=caches)
        full, _ = decoder.hidden(tokens)
        return decoder.logits(cached[:, -1]), decoder.logits(full[:, -1])

    cached, full = map(np.asarray, both(model.params, tokens))
    error = np.abs(cached - full).max() / np.abs(full).max()
    if not error < 0.05:
        raise SystemExit(f"gate: cached decoding differs from the full pass by {error:.3g} of the largest logit")


def measure(model: Loaded, batch: int, bandwidth: float, args: argparse.Namespace) -> dict[str, Any]:
    """Prefill in one chunk, a decode step at full context against the byte limit, and the parts of a step."""
    began = time.perf_counter()
    run = Run(model, batch, args.context, args.steps * (args.repeats + 1), args.steps)
    compiling = time.perf_counter() - began
    prefill = common.milliseconds(run.begin)["ms"]
    state, step = decode_steps(run, args)
    weights = sum(x.nbytes for x in jax.tree.leaves(model.params))
    capacity = state.caches[0].k.shape[1]
    context = cache_bytes(state.caches) * args.context / capacity
    limit = (weights + context) / bandwidth
    attention = attention_alone(model, counted(state.caches, state.length))
    found = {
        "batch": batch,
        "context": args.context,
        "compile_seconds": compiling,
        "prefill_milliseconds": prefill,
        "prefill_tokens_per_second": 1e3 * batch * args.context / prefill,
        "steps_a_dispatch": args.steps,
        "decode_milliseconds_a_step": 1e3 * step,
        "decode_tokens_per_second": batch / step,
        "byte_limit_milliseconds": 1e3 * limit,
        "share_of_byte_limit": limit / step,
        "bytes": {"weights": weights, "keys and values of the context": context, "cache": cache_bytes(state.caches)},
        "parts_milliseconds": {
            "attention over the cache, all layers, alone": attention,
            "logits and greedy choice, alone": logits_alone(model, batch),
            "the rest (projections, MLP, norms, rotary, cache writes, logits, launches)": 1e3 * step
            - attention["ours"],
        },
    }
    print(json.dumps(found, indent=2), flush=True)
    return found


def decode_steps(run: Run, args: argparse.Namespace) -> tuple[DecodeState, float]:
    """(state after the runs, seconds a step), several steps a dispatch."""
    state = run.begin()
    seconds = []
    for _ in range(args.repeats + 1):
        jax.block_until_ready(state)
        began = time.perf_counter()
        state, written = run.programs.decode(state, *run.settings)
        jax.block_until_ready(written)
        seconds.append(time.perf_counter() - began)
    return state, statistics.median(seconds[1:]) / args.steps


def attention_alone(model: Loaded, caches: tuple[Any, ...]) -> dict[str, Any]:
    """Milliseconds for one query a request over every layer's cache: ours, and cuDNN's where it runs."""
    batch = caches[0].length.shape[0]
    q = jnp.ones((batch, 1, model.spec.num_heads, model.spec.head_dim), model.spec.compute_dtype)

    @jax.jit
    def ours(caches: tuple[Any, ...], q: jax.Array) -> jax.Array:
        starts = [dataclasses.replace(cache, start=cache.length - 1) for cache in caches]
        return jnp.stack([cache.attend(q, Causal(), return_lse=False)[0] for cache in starts])

    @jax.jit
    def cudnn(caches: tuple[Any, ...], q: jax.Array) -> jax.Array:
        attend = functools.partial(jax.nn.dot_product_attention, q, implementation="cudnn")
        return jnp.stack([attend(c.k, c.v, key_value_seq_lengths=c.length) for c in caches])

    found: dict[str, Any] = {"ours": common.milliseconds(ours, caches, q)["ms"]}
    if jax.devices()[0].platform != "gpu":
        return found | {"cudnn": "needs an NVIDIA GPU"}
    try:
        found["cudnn"] = common.milliseconds(cudnn, caches, q)["ms"]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        found["cudnn"] = str(error).splitlines()[0]
    return found


def logits_alone(model: Loaded, batch: int) -> float:
    """Milliseconds of the unembedding and the greedy choice."""
    hidden = jnp.ones((batch, model.spec.width), model.spec.compute_dtype)

    @jax.jit
    def choose(params: Any, hidden: jax.Array) -> jax.Array:
        return jnp.argmax(nnx.merge(model.graphdef, params).logits(hidden), -1)

    return common.milliseconds(choose, model.params, hidden)["ms"]


if __name__ == "__main__":
    main()
