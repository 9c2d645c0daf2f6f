"""The compiled schedule of TPU kernels, without a TPU.

    python -m benchmarks.tpu_schedule --generations v5p v6e --tiles 512,512,512 1024,1024,512
    python -m benchmarks.tpu_schedule --op decode --tiles 64,512,1 --heads 32
    python -m benchmarks.tpu_schedule --op dual_chunk --tiles 512,512,512 1024,1024,512

libtpu's compiler writes each kernel's VLIW schedule: one bundle is one cycle, stalls aside. The hot region is the
straight-line block that does a visited tile's products without a token mask; its bundles and the share of its matrix
slots in use compare kernels without a chip. JAX's splash attention is compiled at the same tiles, beside ours, and its
ragged paged attention beside our decode attention at the same page size and keys a step. The compiler flags are read
once per process, so every row is a process of its own.

    python -m benchmarks.tpu_schedule --tune --generations v5e v5p v6e tpu7x --dims 64 128 256

`--tune` writes the tiles with the fewest hot bundles a score, forward and backward together, to `pallas_kernels/tuned`.

A tile is rows, keys, keys a product for attention; tokens of a page, keys a step, new tokens a request for decoding,
whose KV heads are a quarter of `--heads`, with 64 requests; tokens a grid step for gated linear attention and the delta
rule (`--op delta`), whose hot region is one chunk (the other two numbers say its length).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

CODES = {
    "attention": ("ours_fwd", "ours_bwd", "splash_fwd", "splash_bwd"),
    "decode": ("ours_decode", "ragged_decode"),
    "linear": ("linear_fwd", "linear_bwd"),
    "delta": ("delta_fwd", "delta_bwd"),
    "dual_chunk": tuple(f"{part}_{way}" for way in ("fwd", "bwd") for part in ("ours", "own", "before", "older")),
}
PARTS = ("own", "before", "older")  # the chunks that the three calls of dual chunk attention read
BATCH, GROUP = 64, 4  # of decoding
MATRIX = ("MXU", "MATMUL")
LABEL = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:(LH|LB|LE|PB|PF|CT))?\s*:")
KERNEL = re.compile(
    r"block_sparse_attention_(?:fwd|dq|dkv|bwd)|splash\w*|decode_attention|ragged_paged_attention\w*|gated_linear_\w+"
)
PASSES = "final.*|post-ra"  # all passes would be hundreds of megabytes of text
DELAY = 5  # a branch takes effect after its delay slots


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One kernel's figures; slots, spills and fills count uses in the hot region."""

    kernel: str
    bundles: int
    hot_bundles: int
    matrix_use: float
    slots: dict[str, int]
    spills: int
    fills: int
    vmem_mib: float


def read_utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """(unit names, slots of each in a bundle, uses per bundle)."""
    lines = text.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = [int(n) for n in lines[2].split()]
    rows = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
    if len(names) != len(capacity) or any(len(row) != len(names) for row in rows):
        raise ValueError(f"utilization dump: {len(names)} units, {len(capacity)} capacities, rows of other lengths")
    return names, capacity, rows


def block_starts(bundles: str) -> list[int]:
    """Addresses at which straight-line blocks begin: after labels and after branches with their delay slots."""
    starts = {0}
    for line in bundles.splitlines():
        if not (found := LABEL.match(line)):
            continue
        address = int(found[1], 16)
        if found[2]:
            starts.add(address)
        if "sbr.rel" in line:
            starts.add(address + DELAY)
    return sorted(starts)


def analyse(kernel: str, utilization: str, bundles: str, allocations: str) -> Schedule:
    """The figures of one kernel from its three dumps."""
    names, capacity, rows = read_utilization(utilization)
    matrix = next(n for n, name in enumerate(names) if name in MATRIX)
    starts = [start for start in block_starts(bundles) if start < len(rows)]
    blocks = [rows[a:b] for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]
    work = [sum(row[matrix] for row in block) for block in blocks]
    # Blocks with as much matrix work as any hold a tile's products; the masked twin of the hot one is longer.
    hot = min((block for block, n in zip(blocks, work, strict=True) if n >= 0.8 * max(work)), key=len)
    total = [sum(column) for column in zip(*hot, strict=True)]
    slots = dict(zip(names, total, strict=True))
    size = sum(int(n, 16) for n in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", allocations))
    return Schedule(
        kernel=kernel,
        bundles=len(rows),
        hot_bundles=len(hot),
        matrix_use=round(total[matrix] / (capacity[matrix] * len(hot)), 3),
        slots=slots,
        spills=slots.get("VSTORE:SPILL", 0),
        fills=slots.get("VLOAD:FILL", 0),
        vmem_mib=round(size / 2**20, 2),
    )


def read_dump(folder: pathlib.Path) -> Iterator[Schedule]:
    """Every attention kernel in a dump folder."""
    for path in sorted(folder.glob("*-final_bundles.txt")):
        if "schedule-analysis" in path.name or not (found := KERNEL.search(path.name)):
            continue
        stem = re.sub(r"-\d+-final_bundles\.txt$", "", path.name)
        names = ("final_hlo-static-per-bundle-utilization", "post-ra")
        paths = (next(folder.glob(f"{stem}-[0-9][0-9]-{name}.txt")) for name in names)
        utilization, allocations = (found_path.read_text(errors="replace") for found_path in paths)
        yield analyse(found[0], utilization, path.read_text(errors="replace"), allocations)


def compile_code(code: str, generation: str, tiles: tuple[int, int, int], length: int, heads: int, dim: int) -> None:
    """Compile one row's program in this process (the flags must be in the environment already)."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import aot

    makers: dict[str, Callable] = {"ours_decode": _our_decode, "ragged_decode": _ragged_decode}
    both_ways: dict[str, Callable] = {"linear": _linear, "delta": functools.partial(_linear, delta=True)}
    both_ways |= {part: functools.partial(_ours, part=n) for n, part in enumerate(PARTS)}
    makers |= {f"{name}_{way}": maker for name, maker in both_ways.items() for way in ("fwd", "bwd")}
    maker = makers.get(code, _ours if code.startswith("ours") else _splash)
    forward, shapes = maker(tiles, length, heads, dim)

    def backward(*x):
        return jax.grad(lambda *y: forward(*y).astype(jnp.float32).sum(), (0, 1, 2))(*x)

    aot.compile_for(generation, backward if code.endswith("bwd") else forward, *shapes)


def _ours(tiles, length, heads, dim, part=None):
    """Causal attention, or a part of dual chunk attention whose text has four chunks."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.attention import mosaic_tpu
    from pallas_kernels.attention.call import Call
    from pallas_kernels.dual_chunk import chunk_masks
    from pallas_kernels.masks import Causal

    mask = Causal() if part is None else chunk_masks(length // 4, length)[part]

    def forward(q, k, v):
        call = Call(q, k, v, mask, None, None, 0, None, dim**-0.5, None, False)
        return mosaic_tpu.attend_with(call, *tiles)[0]

    return forward, [jax.ShapeDtypeStruct((1, length, heads, dim), jnp.bfloat16)] * 3


def _splash(tiles, length, heads, dim):
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, kv, compute = tiles
    sizes = kernel.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    attend = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return attend, [jax.ShapeDtypeStruct((heads, length, dim), jnp.bfloat16)] * 3


def _linear(tiles, length, heads, dim, delta=False):
    import jax
    import jax.numpy as jnp

    from pallas_kernels import gated_linear_attention
    from pallas_kernels.gated_linear import mosaic_tpu

    mosaic_tpu.BLOCK_TOKENS = tiles[0]

    def forward(q, k, v, g, beta=None):
        return gated_linear_attention(q, k, v, g, beta=beta, implementation="mosaic_tpu")[0]

    shapes = [jax.ShapeDtypeStruct((1, length, heads, dim), jnp.bfloat16)] * 4
    return forward, shapes + [jax.ShapeDtypeStruct((1, length, heads), jnp.float32)] * delta


def _our_decode(tiles, length, heads, dim):
    import jax
    import jax.numpy as jnp

    import pallas_kernels as pk
    from pallas_kernels.decode import mosaic_tpu

    page, mosaic_tpu.STEP, tokens = tiles

    def cache():
        pool = jnp.zeros((BATCH * length // page, heads // GROUP, page, dim), jnp.bfloat16)
        table = jnp.zeros((BATCH, length // page), jnp.int32)
        return pk.KVCache(pool, pool, jnp.zeros(BATCH, jnp.int32), page_table=table)

    attend = lambda q, cache: pk.decode_attention(q, cache, implementation="mosaic_tpu")
    return attend, [jax.ShapeDtypeStruct((BATCH, tokens, heads, dim), jnp.bfloat16), jax.eval_shape(cache)]


def _ragged_decode(tiles, length, heads, dim):
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    page, keys, tokens = tiles

    def attend(q, pages, lengths, table):
        starts, count = jnp.arange(BATCH + 1, dtype=jnp.int32) * tokens, jnp.full(1, BATCH, jnp.int32)
        sizes = {"num_kv_pages_per_block": keys // page, "num_queries_per_block": tokens}
        return ragged_paged_attention(q, pages, lengths, table, starts, count, **sizes, vmem_limit_bytes=2**26)

    shaped = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
    pages = shaped(BATCH * length // page, page, 2 * heads // GROUP, dim, dtype=jnp.bfloat16)
    q = shaped(BATCH * tokens, heads, dim, dtype=jnp.bfloat16)
    return attend, [q, pages, shaped(BATCH), shaped(BATCH, length // page)]


def measure(code: str, generation: str, tiles: tuple[int, int, int], sizes: tuple[int, int, int]) -> list[Schedule]:
    """Compile in a child process with the dump flags and read what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={PASSES}"
        environment = {**os.environ, "LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        words = [code, generation, *map(str, tiles), *map(str, sizes)]
        command = [sys.executable, "-m", "benchmarks.tpu_schedule", "--child", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = list(read_dump(pathlib.Path(folder)))
    if done.returncode or not found:
        raise RuntimeError(f"{code} for {generation} at tiles {tiles} did not compile:\n{done.stderr[-2000:]}")
    # A gradient program holds the forward kernel too; it has its own row.
    return [row for row in found if not (code.endswith("bwd") and "fwd" in row.kernel)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", default=["v5p", "v6e"])
    parser.add_argument("--tiles", nargs="+", default=["128,128,128", "512,512,512", "1024,1024,512"])
    parser.add_argument("--op", default="attention", choices=CODES)
    parser.add_argument(
        "--codes", nargs="+", default=None, choices=[code for codes in CODES.values() for code in codes]
    )
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dims", type=int, nargs="+", default=[128])
    parser.add_argument("--output", type=pathlib.Path, default=None, help="JSON file to write")
    parser.add_argument("--tune", action="store_true", help="write the best tiles of our attention for each generation")
    parser.add_argument("--child", nargs=8, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        code, generation, *numbers = options.child
        q, k, compute, length, heads, dim = map(int, numbers)
        return compile_code(code, generation, (q, k, compute), length, heads, dim)
    if options.tune:
        options.codes = ["ours_fwd", "ours_bwd"]
    rows = []
    print(f"{'generation':11}{'tile':15}{'kernel':36}{'hot':>7}{'matrix':>8}{'spills':>8}{'fills':>7}{'VMEM MiB':>10}")
    codes = options.codes or CODES[options.op]
    for generation, dim, text, code in itertools.product(options.generations, options.dims, options.tiles, codes):
        q, k, compute = map(int, text.split(","))
        try:
            found = measure(code, generation, (q, k, compute), (options.length, options.heads, dim))
        except RuntimeError as error:  # tiles beyond VMEM: a row of its own
            print(f"{generation:11}{text:15}{code}: {str(error).splitlines()[-1][:120]}", flush=True)
            continue
        for row in found:
            rows.append({"generation": generation, "tiles": text, "dim": dim, "code": code, **dataclasses.asdict(row)})
            name = f"{code.split('_')[0]} {row.kernel.removeprefix('block_sparse_attention_')} {dim}"
            print(
                f"{generation:11}{text:15}{name:36}{row.hot_bundles:7}{row.matrix_use:8.3f}{row.spills:8}"
                f"{row.fills:7}{row.vmem_mib:10.2f}",
                flush=True,
            )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(_report(options, rows), indent=1) + "\n")
    if options.tune:
        for generation in options.generations:
            _write_tiles(generation, _report(options, [row for row in rows if row["generation"] == generation]))


def _report(options: argparse.Namespace, rows: list[dict]) -> dict:
    import importlib.metadata as metadata

    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    call = {"length": options.length, "heads": options.heads, "dtype": "bfloat16"}
    parts = f"ours: causal; others: the chunks of {options.length // 4} tokens that dual chunk attention reads"
    call |= {
        "attention": {"mask": "causal"},
        "dual_chunk": {"mask": parts},
        "decode": {"mask": "causal", "requests": BATCH, "kv_heads": options.heads // GROUP},
        "linear": {"decay": "vector"},
        "delta": {"decay": "vector", "beta": "float32"},
    }[options.op]
    when = time.strftime("%Y-%m-%d")
    return {"date": when, "versions": versions, "call": call, "unit": "bundles (cycles without stalls)", "rows": rows}


def best_tiles(rows: list[dict]) -> str:
    """The tiles whose kernels together take the fewest hot bundles a score."""
    total: dict[str, float] = {}
    for row in rows:
        q, k, _ = map(int, row["tiles"].split(","))
        total[row["tiles"]] = total.get(row["tiles"], 0.0) + row["hot_bundles"] / (q * k)
    compiled = {row["tiles"] for row in rows if row["code"] == "ours_bwd"}
    return min(sorted(compiled), key=total.__getitem__)


def _write_tiles(generation: str, report: dict) -> None:
    from pallas_kernels import aot, tuning

    kind = aot.devices(generation)[0].device_kind
    entries = []
    for dim in sorted({row["dim"] for row in report["rows"]}):
        rows = [row for row in report["rows"] if row["dim"] == dim]
        names = ("block_q", "block_k", "compute_k")
        tiles = dict(zip(names, map(int, best_tiles(rows).split(",")), strict=True))
        entries.append({"kernel": "attention_tpu", "dim": dim, "tiles": tiles, "schedules": rows})
    chosen = "hot bundles a score in the compiler's schedules, forward plus backward; not timed on a device"
    found = {"device": kind, "chosen_by": chosen, **report, "entries": entries}
    del found["rows"]
    path = pathlib.Path(tuning.__file__).parent / "tuned" / tuning.file_name(kind)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
