"""Times gated linear attention here: `python -m benchmarks.linear_attention [--shapes NAME ...] [--only NAME ...]`.

Every backend first passes a gate: outputs and every gradient against float32 XLA on a short row. Then forward, and
forward with backward, are timed at the shapes of `pallas_kernels.gated_linear.specs`. Where PyTorch, Triton and
flash-linear-attention are installed, their chunk kernels are timed beside ours on the same shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
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
COLUMNS = ("shape", "implementation", "forward_ms", "both_ms", "forward_TB_per_s", "reason")
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
    return lambda q, k, v, g: gated_linear_attention(q, k, v, g, implementation=implementation)[0]


def both(implementation: str):
    def run(q, k, v, g, do):
        o, vjp = jax.vjp(lambda *x: gated_linear_attention(*x, implementation=implementation)[0], q, k, v, g)
        return o, vjp(do)

    return run


def short_inputs(shape: Shape) -> tuple[jax.Array | None, ...]:
    """Of the gate: one row of `GATE_TOKENS`."""
    return inputs(dataclasses.replace(shape, batch=1), GATE_TOKENS)


def programs(name: str, shape: Shape, implementations: list[str]) -> dict[tuple[str, ...], tuple[Callable, Any]]:
    """What `time_ours` runs at a shape: (function, shapes of its arguments) by what it is."""
    large, short = jax.eval_shape(lambda: inputs(shape)), jax.eval_shape(lambda: short_inputs(shape))
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), short)
    jobs: dict[tuple[str, ...], tuple[Callable, Any]] = {(name, "exact"): (both("xla"), wide)}
    for one in implementations:
        jobs |= {
            (name, one, "gate"): (both(one), short),
            (name, one, "forward"): (forward(one), large[:4]),
            (name, one, "both"): (both(one), large),
        }
    return jobs


def time_ours(name: str, shape: Shape, implementation: str, compiled: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Errors against float32 XLA on a short row (GateError where they are too large), then the times."""
    exact = compiled[name, "exact"]
    gate, run_forward, run_both = (compiled[name, implementation, part] for part in ("gate", "forward", "both"))
    for program in (exact, gate, run_forward, run_both):
        if isinstance(program, str):
            raise Unsupported(program)
    short = short_inputs(shape)
    o, grads = gate(*short)
    wanted_o, wanted_grads = exact(*jax.tree.map(lambda x: x.astype(jnp.float32), short))
    errors = common.gate("o", o, wanted_o, GATE_LIMIT["outputs"])
    errors |= common.gate("d", grads, wanted_grads, GATE_LIMIT["gradients"])
    large = inputs(shape)
    times = {"forward": common.milliseconds(run_forward, *large[:4]), "both": common.milliseconds(run_both, *large)}
    return times | {"errors": errors}


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


def measure(shapes: dict[str, Shape], only: list[str]) -> list[dict[str, Any]]:
    """One row per shape and implementation (of `only`, if any); what declines or fails its gate gives the reason.

    All programs of ours are compiled first, side by side.
    """
    wanted = lambda names: [name for name in names if not only or name in only]
    ours = wanted(BACKENDS[jax.default_backend()])
    jobs = {key: job for name, shape in shapes.items() for key, job in programs(name, shape, ours).items()}
    compiled = common.compile_all(jobs)
    installed = all(importlib.util.find_spec(x) for x in ("torch", "triton", "fla"))
    rivals = wanted(["fla"] if jax.default_backend() == "gpu" and installed else [])
    rows = []
    for implementation, (name, shape) in itertools.product([*ours, *rivals], shapes.items()):
        row: dict[str, Any] = {"shape": name, "implementation": implementation}
        try:
            is_rival = implementation in rivals
            result = time_fla(shape) if is_rival else time_ours(name, shape, implementation, compiled)
            row |= result | {"forward_ms": result["forward"]["ms"], "both_ms": result["both"]["ms"]}
            row["forward_TB_per_s"] = shape.bytes_forward / row["forward_ms"] / 1e9
        except (Unsupported, common.GateError) as reason:
            row["reason"] = str(reason)
        print(common.table([row], COLUMNS), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--only", nargs="*", default=[], help="implementations: mosaic_gpu, mosaic_tpu, xla, fla")
    parser.add_argument("--tokens", type=int, help="instead of each shape's own length")
    parser.add_argument("--commit", help="of the code, where it runs outside of its repository")
    parser.add_argument("--out", default=common.RESULTS / "linear_attention.json")
    options = parser.parse_args()
    shapes = {name: SHAPES[name] for name in options.shapes}
    if options.tokens:
        shapes = {name: dataclasses.replace(shape, tokens=options.tokens) for name, shape in shapes.items()}
    rows = measure(shapes, options.only)
    print(common.table(rows, COLUMNS))
    common.write(options.out, {"environment": common.environment(options.commit), "rows": rows})


if __name__ == "__main__":
    main()
