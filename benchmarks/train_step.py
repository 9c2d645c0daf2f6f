"""Times a train step: `python -m benchmarks.train_step --length 8192 --batch 4 --remat none [--devices 1 2]`.

A stack of layers shaped like Llama 3 8B's, with its optimiser step and a vocabulary of 32,768, on packed random tokens.
With several devices the sequence is split over all of them (the mesh's context axis). Utilisation counts each query's
visible keys, backward as twice the forward, and nothing that is computed a second time.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import numpy as np

from benchmarks import common
from lcjax.models.decoder import abstract
from lcjax.models.flops import CONVENTION, flops_per_token
from lcjax.models.spec import Attention, ModelSpec
from lcjax.observe.hardware import peak_flops
from lcjax.parallel.layout import EXCHANGES
from lcjax.parallel.mesh import make_mesh
from lcjax.parallel.rules import batch_sharding
from lcjax.positions.laws import Rope
from lcjax.train import state as states
from lcjax.train.losses import CrossEntropy
from lcjax.train.optimizers import AdamW, Cosine
from lcjax.train.step import BATCH_DTYPES, StepOptions, make_step

ROPE = Rope(base=500_000.0)
FULL, SPARSE = Attention(rope=ROPE), Attention(rope=ROPE, window=4096, sink=64)
PATTERNS = {"dense": (FULL,), "hybrid": (SPARSE, FULL, SPARSE)}
VOCABULARY = 32_768


def spec(layers: int, length: int, pattern: str) -> ModelSpec:
    """Layers of Llama 3 8B."""
    return ModelSpec(
        name=f"8b-{pattern}",
        vocab_size=VOCABULARY,
        width=4096,
        mlp_width=14336,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        pattern=PATTERNS[pattern],
        max_length=length,
        tie_embeddings=False,
    )


def rows(vocabulary: int, args: argparse.Namespace, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """One batch of random tokens, each row one document; segment ids say so where `args.packed` does."""
    batch, length = args.batch, args.length
    tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, length + 1))
    columns = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(length), (batch, length)),
        "segment_ids": np.ones((batch, length)),
        "loss_weights": np.ones((batch, length)),
    }
    sharding = batch_sharding(mesh)
    placed = {name: jax.device_put(columns[name].astype(dtype), sharding) for name, dtype in BATCH_DTYPES.items()}
    return placed if args.packed else placed | {"segment_ids": None}


def measure(model: ModelSpec, args: argparse.Namespace, devices: int) -> dict[str, Any]:
    """Seconds of a step and what follows from them; the loss must fall, or the step is not worth timing."""
    mesh = make_mesh(fsdp=1, context=devices, devices=jax.devices()[:devices])
    optimizer = AdamW(Cosine(peak=1e-4, warmup=2))
    start = states.Start(model, optimizer.build(100))
    shapes = states.abstract_state(start, mesh)
    options = StepOptions(remat=args.remat, scan=args.scan, exchange=args.exchange)
    loss = CrossEntropy(implementation=args.loss, chunk_tokens=8192)
    step = make_step(abstract(model)[0], start.optimizer, optimizer.schedule.build(100), loss, options)
    batch = rows(model.vocab_size, args, mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(start.state, out_shardings=states.shardings(shapes))()
        began = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(states.shardings(shapes), None))
        compiled = jitted.lower(shapes, batch).compile()
        compile_seconds = time.perf_counter() - began
        losses, samples = [], []
        for _ in range(args.steps + 2):
            began = time.perf_counter()
            state, metrics = compiled(state, batch)
            losses.append(float(metrics["loss"]))  # waits for the step
            samples.append(time.perf_counter() - began)
    if not (np.isfinite(losses).all() and losses[-1] < losses[0]):
        raise common.GateError(f"the loss does not fall: {losses}")
    return report(model, args, devices, samples[2:]) | {"losses": losses, "compile_seconds": compile_seconds}


def report(model: ModelSpec, args: argparse.Namespace, devices: int, samples: list[float]) -> dict[str, Any]:
    """One row of the results."""
    seconds = float(np.median(samples))
    tokens = args.batch * args.length
    flops = flops_per_token(model, args.length, training=True) * tokens
    peak = peak_flops(jax.devices()[0])
    return {
        "model": model.name,
        "layers": model.num_layers,
        "length": args.length,
        "batch": args.batch,
        "devices": devices,
        "exchange": args.exchange if devices > 1 else "none",
        "remat": args.remat,
        "seconds": seconds,
        "min_seconds": min(samples),
        "max_seconds": max(samples),
        "tokens_per_second": tokens / seconds,
        "mfu": None if peak is None else flops / seconds / (peak * devices),
    }


def main() -> None:
    """Measure each pattern on each number of devices; print rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pattern", nargs="+", choices=sorted(PATTERNS), default=["dense"])
    parser.add_argument("--devices", nargs="+", type=int, default=[1])
    parser.add_argument("--exchange", choices=EXCHANGES, default="auto")
    parser.add_argument("--remat", choices=("none", "full", "attention", "dots"), default="attention")
    parser.add_argument("--scan", action="store_true", help="scan over equal layers, as pod runs do")
    parser.add_argument("--loss", choices=("auto", "chunked", "tokamax"), default="chunked")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--unpacked", dest="packed", action="store_false", help="rows without segment ids")
    parser.add_argument("--commit", help="of the code, where it runs outside of its repository")
    parser.add_argument("--out", default=str(common.RESULTS / "train_step.json"))
    args = parser.parse_args()
    found = []
    columns = ("model", "layers", "length", "devices", "exchange", "remat", "seconds", "tokens_per_second", "mfu")
    for pattern in args.pattern:
        for devices in args.devices:
            found.append(measure(spec(args.layers, args.length, pattern), args, devices))
            print(common.table(found[-1:], columns), flush=True)
    memory = jax.local_devices()[0].memory_stats() or {}
    record = {**common.environment(args.commit), "flop_convention": CONVENTION, "rows": found}
    common.write(args.out, record | {"peak_bytes": memory.get("peak_bytes_in_use")})


if __name__ == "__main__":
    main()
