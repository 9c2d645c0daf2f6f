"""LongGen: where its layers lie, what they keep, and how far they reach."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.cache import init_caches
from lcjax.methods import DuoGates, Lawcat, LongGen, MethodConflict, Positions, adapt_model
from lcjax.models import native
from lcjax.models.decoder import Decoder
from lcjax.models.patterns import Spans, Strided
from lcjax.models.registry import spec_to_hf
from lcjax.models.spec import Attention, ModelSpec
from lcjax.parallel.sparse import plan_exchange
from lcjax.positions.laws import Rope, YaRN

SPEC = ModelSpec(
    vocab_size=61, width=16, mlp_width=24, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=4, dtype="float32",
)  # fmt: skip
LLAMA2 = ModelSpec(
    vocab_size=32000, width=4096, mlp_width=11008, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
    max_length=131072,
)  # fmt: skip


def full_layers(spec):
    return [i for i, mixer in enumerate(spec.layers) if mixer.pattern is None]


@pytest.mark.parametrize(
    ("method", "full"),
    [
        (LongGen(), [2, 3]),
        (LongGen(full=3), [1, 2, 3]),
        (LongGen(full=3, layers="interleaved"), [1, 3, 5]),
        (LongGen(layers=(0, 5)), [0, 5]),
        (LongGen(full=0), []),
        (LongGen(full=6), list(range(6))),
    ],
)
def test_layer_maps(method, full):
    assert full_layers(method.model(SPEC)) == full


def test_both_variants():
    spans = LongGen(sink=3, window=7).model(SPEC).layers[0].pattern
    assert spans == Spans((3, 3), (7, 7))
    blocks = Strided(4, 2, 3)
    assert LongGen(window=None, strided=blocks).model(SPEC).layers[5].pattern == blocks


def cache_share(method, length, spec=LLAMA2):
    """Bytes of the caches of `length` tokens, as a share of full attention's; nothing is allocated."""

    def size(spec):
        caches = jax.eval_shape(lambda: init_caches(spec, 1, length))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches) if x.ndim > 2)

    return size(method.model(spec)) / size(spec)


def test_the_presets_keep_38_percent_of_the_cache():
    """12 of 32 layers full and 1,024 tokens in the others; or a third full and 16 blocks of 64 and every 16th."""
    length = 131_072
    assert cache_share(LongGen(full=12, sink=64, window=960), length) == (12 + 20 * 1024 / length) / 32
    assert round(cache_share(LongGen(full=12, sink=64, window=960), length), 4) == 0.3799
    third = dataclasses.replace(LLAMA2, num_layers=30)
    strided = LongGen(full=10, window=None, strided=Strided(64, 16, 16))
    assert cache_share(strided, length, third) == pytest.approx((10 + 20 * 9216 / length) / 30, rel=1e-6)
    assert round(cache_share(strided, length, third), 3) == 0.380


def reach(spec, query=40):
    """Which inputs the final state of token `query` depends on, by the gradient with respect to embeddings."""
    model = Decoder(spec, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def gradient(params, x):
        def state(x):
            decoder = nnx.merge(graphdef, params)
            context = decoder.context(jnp.arange(x.shape[1], dtype=jnp.int32)[None], 0, None, None)
            for block in decoder.layers:
                x, _ = block(x, context)
            return jnp.sum(jnp.sin(x[:, query]))

        return jax.grad(state)(x)

    x = jax.random.normal(jax.random.key(0), (1, query + 8, spec.width))
    return np.abs(np.asarray(gradient(params, x)))[0].max(-1) > 0


def test_windows_reach_no_further_than_they_can_and_one_full_layer_reaches_all():
    """n layers of window w see back n (w - 1) tokens, and the sinks."""
    method, query = LongGen(full=0, sink=2, window=4), 40
    spec = dataclasses.replace(SPEC, num_layers=3)
    seen = reach(method.model(spec), query)
    nearest = query - 3 * (4 - 1)
    assert seen[nearest : query + 1].all()
    assert seen[:2].all()
    assert not seen[2:nearest].any()
    assert not seen[query + 1 :].any()
    one_full = dataclasses.replace(method, full=1)
    assert reach(one_full.model(spec), query)[: query + 1].all()


@pytest.mark.parametrize("law", [Rope(8e5), YaRN(factor=4.0, original_length=8)], ids=["abf", "yarn"])
def test_positions_reach_sparse_layers_in_either_order(law):
    parts = [Positions(rope=law, max_length=128), LongGen(window=None, strided=Strided(4, 2, 3))]
    spec = adapt_model(parts, SPEC)
    assert spec == adapt_model(parts[::-1], SPEC)
    assert {mixer.rope for mixer in spec.layers} == {law}


def test_what_cannot_be_combined_is_named():
    with pytest.raises(MethodConflict, match=r"LongGen and Lawcat both write layers\.0\.pattern"):
        adapt_model([LongGen(), Lawcat(layers=(0,))], SPEC)
    with pytest.raises(ValueError, match="LongGen gives layer 0 a pattern, which is Attention"):
        LongGen().model(dataclasses.replace(SPEC, pattern=(Attention(window=3),)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LongGen(layers="pyramid"), r"LongGen.layers is 'pyramid'; choose one of 'sandwich'"),
        (lambda: LongGen(full=2, layers=(1, 2)), "keep one of them"),
        (lambda: LongGen(layers=(6,)).model(SPEC), "layers has 6, but the model has the layers 0 to 5"),
        (lambda: LongGen(full=7).model(SPEC), r"LongGen.full is 7; the model has 6 layers"),
        (lambda: LongGen(strided=Strided()), "give one of the two"),
        (lambda: LongGen(window=None), "give one of the two"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("method", [LongGen(), LongGen(window=None, strided=Strided(4, 2, 3)), DuoGates()])
def test_no_family_of_others_can_express_it_and_our_own_does(method):
    spec = method.model(SPEC)
    with pytest.raises(ValueError, match="which no HF family can express"):
        spec_to_hf(spec)
    assert native.spec_from_config(json.loads(json.dumps(native.spec_to_config(spec)))) == spec


def test_a_tile_visits_local_and_strided_blocks_only():
    """At 128K: 16 local blocks and the one on the border, and of the older ones every 16th."""
    length, block = 131_072, 64
    plan = Strided(block, 16, 16).mask(4, 2).plan(4, length, length, 128, block)
    runs = plan.row_runs(length, length, 128, block)
    row = np.arange(0, length, 128)
    sinks, _, strided, _, near = (np.asarray(x) for x in runs.run(0, row, row + 127))
    assert sinks.max() == 0
    assert near.max() <= 16 + 2
    assert strided.max() <= length // block // 16


def test_a_shard_gathers_the_strided_blocks_and_a_halo():
    exchange = plan_exchange(Strided(64, 4, 16, step=0).mask(4, 2), 4, 4096, 8, packed=False)
    assert exchange is not None
    assert exchange.halo == 256
    assert exchange.far.size * exchange.plan.block_k <= 8 * 4096 / 16
