"""The TPU kernels through the real TPU compiler, on a machine without a TPU."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import BlockList, aot, block_sparse_attention
from pallas_kernels.masks import Causal, Sink, Stride, Window, per_head

pytestmark = [
    pytest.mark.usefixtures("optimized"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu's compiler"),
]

SPARSE = Causal() & (Sink(128) | Window(1024) | Stride(64, 16))
STREAMING = Causal() & (Sink(128) | Window(512))


def compile_call(generation, mask, dim, *, length=2048, heads=4, kv_heads=2, gradient=False, **options):
    array = lambda n: jax.ShapeDtypeStruct((1, length, n, dim), jnp.bfloat16)

    def forward(q, k, v):
        return block_sparse_attention(q, k, v, mask, implementation="mosaic_tpu", **options)

    def backward(q, k, v):
        return jax.grad(lambda *x: forward(*x).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    return aot.compile_for(
        generation, backward if gradient else forward, array(heads), array(kv_heads), array(kv_heads)
    )


@pytest.mark.parametrize(
    ("generation", "mask", "dim", "gradient"),
    [
        ("v5e", SPARSE, 64, False),
        ("v5p", STREAMING, 128, True),
        ("v6e", Causal(), 256, False),
        ("tpu7x", Causal(), 128, False),
    ],
)
def test_compiles(generation, mask, dim, gradient):
    compile_call(generation, mask, dim, gradient=gradient, length=1024)


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("case", ["sparse", "packed", "listed"])
def test_compiles_everywhere(generation, dim, case):
    options = {"packed": {"segment_ids": jnp.zeros((1, 2048), jnp.int32)}, "listed": {"lists": listed(2048)}}
    compile_call(generation, STREAMING if case == "packed" else SPARSE, dim, gradient=True, **options.get(case, {}))


def listed(length: int, heads: int = 2, width: int = 4) -> BlockList:
    rows = length // 128
    return BlockList(
        jnp.zeros((1, heads, rows, width), jnp.int32), jnp.zeros((1, heads, rows), jnp.int32), block_q=128, block_k=128
    )


def test_heads_of_64_are_not_padded_in_memory():
    """Rows of 64 would take twice their bytes in HBM, if q, k, v were copied one head a row of 128 lanes."""
    compiled = compile_call("v5e", Causal(), 64, length=4096, heads=8, kv_heads=4)
    memory, bytes_of_q = compiled.memory_analysis(), 4096 * 8 * 64 * 2
    assert memory.argument_size_in_bytes <= 1.01 * 2 * bytes_of_q  # q, and k with v
    large = [line for line in compiled.as_text().splitlines() if re.search(r"= bf16\[[\d,]*\S* (pad|copy)\(", line)]
    assert not [line for line in large if " pad(" in line], large
    assert memory.temp_size_in_bytes <= 1.1 * 3 * bytes_of_q  # one order of heads and rows to another, unpadded


@pytest.mark.slow
def test_a_million_tokens_and_32_patterns_compile():
    """Scalar memory holds one row of a table, whatever the length."""
    mask = per_head([Causal() & (Sink(64 + h) | Window(2048) | Stride(64, 64, h)) for h in range(32)])
    compile_call("v5p", mask, 128, length=2**20, heads=32, kv_heads=8)  # q and o alone are more than v5e holds


@pytest.mark.slow
def test_lists_of_a_million_tokens_compile():
    """A list for each of 32 heads; scalar memory holds one chunk of it."""
    lists = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), listed(2**20, heads=32, width=16))
    array = lambda n: jax.ShapeDtypeStruct((1, 2**20, n, 128), jnp.bfloat16)
    run = lambda q, k, v, lists: block_sparse_attention(q, k, v, STREAMING, lists=lists, implementation="mosaic_tpu")
    aot.compile_for("v5p", run, array(32), array(8), array(8), lists)
