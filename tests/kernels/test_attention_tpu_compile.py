"""The TPU kernels through the real TPU compiler, on a machine without a TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, block_sparse_attention
from pallas_kernels.masks import Causal, Segments, Sink, Stride, Window, per_head

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu's compiler")

SPARSE = Causal() & (Sink(128) | Window(1024) | Stride(64, 16))


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
        ("v5p", Causal() & (Sink(128) | Window(512)), 128, True),
        ("v6e", Causal(), 256, False),
        ("tpu7x", Causal(), 128, False),
    ],
)
def test_compiles(generation, mask, dim, gradient):
    compile_call(generation, mask, dim, gradient=gradient, length=1024)


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mask", [SPARSE, Causal() & Segments()], ids=["sparse", "segments"])
def test_compiles_everywhere(generation, dim, mask):
    ids = {"segment_ids": jnp.zeros((1, 2048), jnp.int32)} if mask is not SPARSE else {}
    compile_call(generation, mask, dim, gradient=True, **ids)


@pytest.mark.slow
def test_a_million_tokens_and_32_patterns_compile():
    """Scalar memory holds one row of a table, whatever the length."""
    mask = per_head([Causal() & (Sink(64 + h) | Window(2048) | Stride(64, 64, h)) for h in range(32)])
    compile_call("v5e", mask, 128, length=2**20, heads=32, kv_heads=8)
