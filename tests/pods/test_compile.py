"""Every shipped pod configuration compiles for the slice that it names, fits it, and moves no more than it must."""

import dataclasses
import math
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcjax import settings
from lcjax.models.decoder import abstract
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention, ModelSpec
from lcjax.parallel import ops
from lcjax.parallel.mesh import MeshSpec
from lcjax.parallel.sizing import size
from lcjax.parallel.slices import named_slice
from lcjax.serve import Engine
from lcjax.serve.job import Generate
from lcjax.serve.size import size_decoding
from lcjax.train.size import size_train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = sorted((CONFIGS / "run" / "pod").glob("*.gin"))
QUICK = [run for run in RUNS if run.stem == "llama3_8b_128k"]

pytestmark = [
    pytest.mark.usefixtures("optimized"),
    pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu, the compiler for TPUs"),
]


def necessary(job) -> int:
    """Bytes of the largest array that one collective has a reason to make: a weight, or a shard of q or of k and v."""
    spec, mesh = job.model, job.mesh
    weight = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(spec)[1])) * 4 // mesh.tensor
    rows = job.batch // (mesh.data * mesh.fsdp)
    heads, kv_heads = spec.num_heads // mesh.tensor, spec.num_kv_heads // mesh.tensor
    queries = rows * job.length // mesh.context * heads * spec.head_dim * 2
    keys = 2 * rows * job.length // mesh.context * kv_heads * spec.head_dim * 2
    return max(weight, queries, keys)


def sized(job):
    """The report of a job that fits its slice and sends nothing larger than necessary, weights neither twice."""
    sizing = size_train(job, named_slice(job.mesh.slice))
    print(sizing.text())
    assert sizing.fits, sizing.text()
    assert sizing.work is not None
    assert abs(sizing.work.error) < 0.05
    largest = max(sizing.traffic, key=lambda c: c.bytes)
    assert largest.bytes <= necessary(job), largest
    assert {"all-gather", "reduce-scatter"} <= {c.kind for c in sizing.traffic}
    return sizing


@pytest.mark.timeout(900)
@pytest.mark.parametrize("run", QUICK, ids=lambda run: run.stem)
def test_two_layers_of_a_pod_configuration(run):
    """Layers are scanned, so two of them move what all do."""
    job, _ = settings.load("train", [run])
    two = sized(dataclasses.replace(job, model=dataclasses.replace(job.model, num_layers=2)))
    layer = [c for c in two.traffic if c.times == 2]
    assert {"all-gather", "reduce-scatter"} <= {c.kind for c in layer}
    summed = [c for c in layer if c.kind == "all-reduce"]
    spec = job.model
    query = spec.width * spec.num_heads * spec.head_dim * 2
    assert max((c.bytes for c in summed), default=0) < query, "no query or feed-forward matrix is summed whole"


@pytest.mark.usefixtures("unchecked")  # specs of shards stand in for a cache's arrays
def test_decoding_of_a_small_model():
    """Prefill and decoding as `decode.py --compile_for` sizes them: caches are updated in place and lie in parts."""
    spec = ModelSpec(vocab_size=512, width=256, mlp_width=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128)
    engine = Engine(batch=4, capacity=8192, chunk=256, steps=4)
    job = Generate(spec, engine=engine, mesh=MeshSpec(data=2, fsdp=1, tensor=2))
    prefill, decoding = size_decoding(job, named_slice("v5e:2x2"))
    cache = 2 * 2 * 4 * 8192 * 2 * 128 * 2 // 4  # layers, k and v, rows, slots, heads, bf16; over four chips
    for sizing in (prefill, decoding):
        assert sizing.fits, sizing.text()
        assert cache < sizing.arguments < 1.5 * cache
        assert sizing.peak < 2 * cache, "no second cache"
    assert "4 requests of 8,192 tokens on v5e:2x2 (4 chips): data=2 tensor=2" in decoding.name


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("unchecked")
def test_decoding_of_one_layer_of_a_shipped_configuration():
    """Decoding runs its layers one after the other, all alike; one costs half the compile time of two."""
    job, _ = settings.load("generate", [CONFIGS / "decode" / "llama3_8b_128k.gin"])
    assert isinstance(job.model, ModelSpec)
    spec = dataclasses.replace(job.model, num_layers=1)
    prefill, decoding = size_decoding(dataclasses.replace(job, model=spec), named_slice(job.mesh.slice))
    batch, capacity, chunk = job.engine.batch, job.engine.capacity, job.engine.chunk
    cache = 2 * batch * capacity * spec.num_kv_heads * spec.head_dim * 2 // job.mesh.tensor
    weights = sum(leaf.size for leaf in jax.tree.leaves(abstract(spec)[1])) * 2 // job.mesh.tensor
    for sizing in (prefill, decoding):
        print(sizing.text())
        assert sizing.fits, sizing.text()
        assert cache + weights < sizing.arguments < 1.05 * (cache + weights)
    assert decoding.peak < 1.05 * decoding.arguments, "the cache is written in place"
    largest = [max(c.bytes for c in sizing.traffic) for sizing in (prefill, decoding)]
    assert largest[0] <= batch * chunk * spec.width * 2, "activations travel, weights and caches stay"
    assert largest[1] <= batch * spec.vocab_size * 4, "logits travel"


def test_a_recurrence_with_one_decay_a_head():
    """Its gradient scatters cotangents of the shards' states and decays, and libtpu none whose last axis is 1."""
    where = named_slice("v6e:2x4")
    mesh = MeshSpec(fsdp=1, context=8).build(where.devices)
    wide = NamedSharding(mesh, PartitionSpec(None, "context", None, None))
    narrow = NamedSharding(mesh, PartitionSpec(None, "context", None))
    x = jax.ShapeDtypeStruct((1, 1024, 16, 128), jnp.bfloat16, sharding=wide)
    decay = jax.ShapeDtypeStruct((1, 1024, 16), jnp.float32, sharding=narrow)

    def gradient(q, k, v, decay, cotangent):
        return jax.vjp(lambda *x: ops.gated_linear(*x)[0], q, k, v, decay)[1](cotangent)

    sizing = size("recurrence", where, mesh, jax.jit(gradient), (x, x, x, decay, x))
    scattered = [c for c in sizing.traffic if c.kind == "reduce-scatter"]
    assert [c.bytes for c in scattered] == [8 * 16 * 128 * 129 * 4], "one exchange of states, with their decays"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("where", ["v4:2x2x2", "v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"])
def test_a_whole_step_for_every_generation(where):
    """Full, windowed and linear attention over a split sequence, on eight devices of each (v5p: the runs above)."""
    job, _ = settings.load("train", QUICK)
    mixers = (Attention(), Attention(window=256, sink=64), GatedLinear(feature_map="softmax", conv_width=4))
    spec = ModelSpec(
        vocab_size=512, width=256, mlp_width=512, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=128,
        max_length=4096, pattern=mixers, tie_embeddings=False,
    )  # fmt: skip
    job = dataclasses.replace(job, model=spec, batch=8, length=4096, mesh=MeshSpec(fsdp=4, context=2))
    sizing = size_train(job, named_slice(where))
    print(sizing.text())
    assert sizing.fits, sizing.text()
    assert {"all-gather", "reduce-scatter"} <= {c.kind for c in sizing.traffic}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_a_pod_configuration_fits_its_slice(run):
    job, _ = settings.load("train", [run])
    sized(job)
