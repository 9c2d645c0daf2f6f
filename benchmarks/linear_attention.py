"""Times gated linear attention here: `python -m benchmarks.linear_attention [--shapes NAME ...] [--only NAME ...]`.

Every backend first passes a gate: outputs and every gradient against float32 XLA on a short row. Then forward, and
forward with backward, are timed at the shapes of `pallas_kernels.gated_linear.specs`. Where PyTorch, Triton and
flash-linear-attention are installed, their chunk kernels are timed beside ours on the same shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from pallas_kernels import Unsupported, gated_linear_attention
from pallas_kernels.gated_linear.specs import SHAPES, Shape

GATE_TOKENS = 3136  # 49 chunks: several to a unit of work, and a shorter last one
GATE_LIMIT = {"outputs": 6e-3, "gradients": 3e-2}  # relative, bfloat16
BACKENDS = {"gpu": ("mosaic_gpu", "xla"), "tpu": ("mosaic_tpu", "xla"), "cpu": ("xla",)}


def inputs(shape: Shape, tokens: int | None = None) -> tuple[jax.Array | None, ...]:
    """q, k, v, log_decay and the cotangent of o, bfloat16; the mean log-decay is -0.05."""
    t = tokens or shape.tokens
    keys = jax.random.split(jax.random.key(0), 5)
    rows = (shape.batch, t, shape.heads)
    q, k = (jax.random.normal(key, (*rows, shape.key_width), jnp.bfloat16) for key in keys[:2])
    v, do = (jax.random.normal(key, (*rows, shape.value_width), jnp.bfloat16) for key in keys[2:4])
    size = {"none": None, "scalar": rows, "vector": (*rows, shape.key_width)}[shape.decay]
    g = None if size is None else (-0.05 * jax.random.exponential(keys[4], size)).astype(jnp.bfloat16)
    return q, k, v, g, do


def forward(implementation: str):
    return jax.jit(lambda q, k, v, g: gated_linear_attention(q, k, v, g, implementation=implementation)[0])


def both(implementation: str):
    def run(q, k, v, g, do):
        o, vjp = jax.vjp(lambda *x: gated_linear_attention(*x, implementation=implementation)[0], q, k, v, g)
        return o, vjp(do)

    return jax.jit(run)


def check(shape: Shape, implementation: str) -> dict[str, float]:
    """Errors against float32 XLA on a short row; GateError where they are too large."""
    short = inputs(dataclasses.replace(shape, batch=1), GATE_TOKENS)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), short)
    o, grads = both(implementation)(*short)
    wanted_o, wanted_grads = both("xla")(*exact)
    errors = common.gate("o", o, wanted_o, GATE_LIMIT["outputs"])
    return errors | common.gate("d", grads, wanted_grads, GATE_LIMIT["gradients"])


def time_ours(shape: Shape, implementation: str) -> dict[str, Any]:
    errors = check(shape, implementation)
    q, k, v, g, do = inputs(shape)
    forward_ms = common.milliseconds(forward(implementation), q, k, v, g)
    both_ms = common.milliseconds(both(implementation), q, k, v, g, do)
    return {"forward": forward_ms, "both": both_ms, "errors": errors}


def time_fla(shape: Shape) -> dict[str, Any]:
    """flash-linear-attention's chunk kernels (PyTorch, Triton) on the same shape."""
    import torch
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    function = chunk_gla if shape.decay == "vector" else chunk_simple_gla

    def tensor(x):
        return None if x is None else torch.from_dlpack(x).clone().requires_grad_()

    q, k, v, g, do = (tensor(x) for x in inputs(shape))

    def run_forward():
        with torch.no_grad():
            function(q, k, v, g)

    def run_both():
        function(q, k, v, g)[0].backward(do)

    return {"forward": _torch_milliseconds(run_forward), "both": _torch_milliseconds(run_both)}


def _torch_milliseconds(run, calls: int = 10, repeats: int = 5) -> dict[str, float]:
    import torch

    run()
    torch.cuda.synchronize()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / calls * 1e3)
    return {"ms": float(np.median(samples)), "min_ms": min(samples), "max_ms": max(samples)}


def measure(name: str, shape: Shape, only: list[str]) -> list[dict[str, Any]]:
    """One row per implementation (of `only`, if any); one that declines or fails its gate is a row with the reason."""
    runs: dict[str, Callable[[], dict[str, Any]]]
    runs = {x: functools.partial(time_ours, shape, x) for x in BACKENDS[jax.default_backend()]}
    if jax.default_backend() == "gpu" and all(importlib.util.find_spec(x) for x in ("torch", "triton", "fla")):
        runs["fla"] = functools.partial(time_fla, shape)
    rows = []
    for implementation, run in runs.items():
        if only and implementation not in only:
            continue
        row: dict[str, Any] = {"shape": name, "implementation": implementation}
        try:
            result = run()
            row |= result | {"forward_ms": result["forward"]["ms"], "both_ms": result["both"]["ms"]}
            row["forward_TB_per_s"] = shape.bytes_forward / row["forward_ms"] / 1e9
        except (Unsupported, common.GateError) as reason:
            row["reason"] = str(reason)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--only", nargs="*", default=[], help="implementations: mosaic_gpu, mosaic_tpu, xla, fla")
    parser.add_argument("--tokens", type=int, help="instead of each shape's own length")
    parser.add_argument("--out", default=common.RESULTS / "linear_attention.json")
    options = parser.parse_args()
    rows = []
    for name in options.shapes:
        shape = SHAPES[name]
        shape = dataclasses.replace(shape, tokens=options.tokens) if options.tokens else shape
        rows += measure(name, shape, options.only)
    print(common.table(rows, ("shape", "implementation", "forward_ms", "both_ms", "forward_TB_per_s", "reason")))
    common.write(options.out, {"environment": common.environment(), "rows": rows})


if __name__ == "__main__":
    main()
