"""LongLoRA: groups that leak nothing, shifted heads, what is trained, and a merged model of full attention."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels as pk
from lcjax.cache import Room
from lcjax.methods import LongLora, Lora, Positions, ShiftedSparse, adapt_job, adapt_model
from lcjax.methods.lora import merge
from lcjax.models.decoder import abstract
from lcjax.models.groups import ShiftedGroups
from lcjax.models.spec import Attention, ModelSpec
from lcjax.models.weights import dotted
from lcjax.parallel.mesh import make_mesh
from lcjax.positions import Linear
from lcjax.train.losses import CrossEntropy
from lcjax.train.optimizers import AdamW, WarmupStableDecay
from lcjax.train.state import Start, divide
from lcjax.train.step import make_step
from tests.methods.test_protocol import Job

KEYS = jax.random.split(jax.random.key(1), 3)
SPEC = ModelSpec(
    vocab_size=31, width=36, mlp_width=24, num_layers=2, num_heads=9, num_kv_heads=3, head_dim=4, dtype="float32"
)
NINE = ShiftedGroups(8, 32, (False, True, False))


def explicit(length, group, shift):
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    return (j <= i) & ((i + shift) // group == (j + shift) // group)


def rolled(length, group):
    """The paper's own form: tokens move half a group to the left, around the end, and groups are cut from there."""
    place = (np.arange(length) - group // 2) % length
    return (place[None] <= place[:, None]) & (place[None] // group == place[:, None] // group)


def test_groups_are_cut_without_wrapping_around():
    mask = np.asarray(NINE.mask(9, 3).to_array(32, 32))
    for head in range(9):
        np.testing.assert_array_equal(mask[head], explicit(32, 8, 4 if head // 3 == 1 else 0))
    around = rolled(32, 8)
    leak = around & ~np.tri(32, dtype=bool)
    rows, columns = np.nonzero(leak)
    assert {*rows} == {*range(4)}
    assert {*columns} == {*range(28, 32)}
    np.testing.assert_array_equal(around & ~leak, explicit(32, 8, 4))
    one = ShiftedGroups(32, 32, (False,)).mask(1, 1).to_array(32, 32)
    np.testing.assert_array_equal(one, np.tri(32, dtype=bool))


def test_the_op_on_groups_is_masked_attention_with_its_gradients():
    """Nine heads in groups of three, a row that is no multiple of the group, packed documents and padding."""
    length = 27
    keys = jax.random.split(jax.random.key(0), 4)
    q, do = (jax.random.normal(key, (2, length, 9, 4)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, 3, 4)) for key in keys[2:])
    column = jnp.arange(length)
    segments = jnp.stack([jnp.where(column < 11, 1, 2), jnp.where(column < 20, 1, 0)]).astype(jnp.int32)
    mask = NINE.mask(9, 3)

    def plain(q, k, v):
        seen = mask.to_array(length, length) & (segments[:, None, :, None] == segments[:, None, None, :])
        scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 3, 2)) / 2
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 3, 2))

    real = (segments > 0)[..., None, None]

    @jax.jit
    def both(*qkv):
        pull = lambda f: jax.vjp(lambda *x: jnp.where(real, f(*x), 0), *qkv)
        results = [pull(plain), pull(lambda *x: pk.block_sparse_attention(*x, mask, segment_ids=segments))]
        return [(o, back(do)) for o, back in results]

    want, got = both(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_no_output_depends_on_a_later_token():
    """The Jacobian of every head: the shifted heads' ends are where the rolled form leaks."""
    q, k, v = (jax.random.normal(key, (1, 16, heads, 2)) for key, heads in zip(KEYS, (9, 3, 3), strict=True))
    mask = ShiftedGroups(8, 16, (False, True, False)).mask(9, 3)

    @jax.jit
    def jacobians(q, k, v):
        run = lambda k, v: pk.block_sparse_attention(q, k, v, mask)[0].sum(-1)  # [T,H]
        return jax.jacrev(run, argnums=(0, 1))(k, v)  # [T,H,1,T,K,D] each

    depends = sum(np.abs(found).max((2, 4, 5)) for found in jacobians(q, k, v))  # [T,H,T]
    np.testing.assert_array_equal(depends.transpose(1, 0, 2) > 0, mask.to_array(16, 16))
    seen = [np.asarray(mask.to_array(16, 16))[head].astype(int) for head in (0, 3)]
    assert (seen[0] @ seen[1])[15, 6] > 0  # two layers carry information across a border of the groups


def test_half_of_the_heads_are_shifted():
    layers = ShiftedSparse(8, 32).model(dataclasses.replace(SPEC, num_heads=12, num_kv_heads=4)).layers
    assert [mixer.pattern.shifted for mixer in layers] == [(False, True, False, True), (True, False, True, False)]
    odd = ShiftedSparse(8, 32).model(SPEC).layers
    assert sum(sum(mixer.pattern.shifted) for mixer in odd) == 3  # of six in two layers
    windows = dataclasses.replace(SPEC, pattern=(Attention(window=5), Attention()))
    assert ShiftedSparse(8, 32).model(windows).layers[0] == Attention(window=5)
    assert ShiftedSparse().model(SPEC) == SPEC


def test_what_is_trained_and_what_a_step_runs():
    job = adapt_job([Positions(Linear(factor=4.0)), LongLora(groups=2)], Job())
    assert job.step_methods == (ShiftedSparse(32, 64),)
    spec = adapt_model([Positions(Linear(factor=4.0)), LongLora()], SPEC)
    assert spec.layers == (Attention(rope=Linear(factor=4.0)),) * 2
    trained, frozen = divide(abstract(spec)[1], job.trainable)
    names = {re.sub(r"\d+", "*", dotted(path)) for path, _ in nnx.to_flat_state(trained)}
    adapters = {f"layers.*.mixer.{x}.adapter.{y}" for x in ("query", "key", "value", "out") for y in ("down", "up")}
    norms = {"layers.*.mixer_norm.weight", "layers.*.mlp_norm.weight", "norm.weight"}
    assert names == {*adapters, *norms, "embed.table"}
    assert all(dotted(path).endswith("kernel") for path, _ in nnx.to_flat_state(frozen))
    untied = abstract(LongLora().model(dataclasses.replace(SPEC, tie_embeddings=False)))[1]
    assert "head.kernel" in {dotted(path) for path, _ in nnx.to_flat_state(divide(untied, job.trainable)[1])}
    assert LongLora(groups=1, rank=0).recipe(Job()) == Job()
    assert LongLora(groups=1, rank=0).model(SPEC) == SPEC
    assert LongLora(groups=1).recipe(Job()) == Lora(also=("embed", "norm")).recipe(Job())


def test_a_step_trains_in_groups_and_the_merged_model_is_full_attention():
    """Frozen weights stay as they are, without optimiser state; what is merged has neither adapters nor groups."""
    method, given = LongLora(groups=4), dataclasses.replace(SPEC, num_layers=1)
    spec, job = method.model(given), method.recipe(dataclasses.replace(Job(), length=32))
    optimizer = AdamW(WarmupStableDecay(1e-2), weight_decay=0.0)
    start = Start(spec, optimizer.build(3), trainable=job.trainable)
    graphdef = abstract(adapt_model(job.step_methods, spec))[0]
    step = make_step(graphdef, start.optimizer, optimizer.schedule.build(3), CrossEntropy(), trainable=job.trainable)
    tokens = jax.random.randint(jax.random.key(2), (2, 33), 0, 31)
    where = jnp.broadcast_to(jnp.arange(32), (2, 32))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "positions": where}
    batch |= {"segment_ids": jnp.ones_like(where), "loss_weights": jnp.ones((2, 32))}
    before, run = start.state(), jax.jit(step)
    after, measured = before, []
    for _ in range(3):
        after, metrics = run(after, batch)
        measured.append(metrics)
    assert measured[-1]["loss"] < measured[0]["loss"]
    with jax.set_mesh(make_mesh(fsdp=1, context=4, devices=jax.devices()[:4])):
        split = jax.jit(step)(before, batch)[1]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(split[name], measured[0][name], rtol=1e-4, err_msg=f"{name} over a split sequence")
    frozen = [nnx.to_flat_state(divide(state.params, job.trainable)[1]) for state in (before, after)]
    for (path, old), (_, new) in zip(*frozen, strict=True):
        np.testing.assert_array_equal(old.get_value(), new.get_value(), err_msg=dotted(path))
    trained = divide(before.params, job.trainable)[0]
    assert sum(x.size for x in jax.tree.leaves(after.opt_state) if x.ndim) == 2 * sum(
        x.size for x in jax.tree.leaves(trained)
    )

    plain, params = merge(spec, after.params)
    assert plain == given
    query, merged = (state["layers"][0]["mixer"]["query"] for state in (after.params, params))
    assert "adapter" not in merged
    assert np.abs(merged["kernel"].get_value() - query["kernel"].get_value()).max() > 1e-4  # merging copies


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LongLora(groups=0), "groups is 0"),
        (lambda: LongLora(groups=3).recipe(Job()), r"rows of 64 tokens don't divide into 3 groups .* multiple of 6"),
        (lambda: ShiftedSparse(7, 28).model(SPEC), "group is 7; it must be even"),
        (
            lambda: ShiftedSparse(8, 32).model(ShiftedSparse(8, 32).model(SPEC)),
            r"both write layers\.0\.pattern",
        ),
        (lambda: NINE.check(4, 4), "made for 3 KV heads, the model has 4"),
        (lambda: NINE.cache(Room(1, 64, 9, 3, 4, "float32")), "ShiftedGroups is for training"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
