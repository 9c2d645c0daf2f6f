"""The step: micro-batches add up, a step that is not finite changes nothing, schedules act where they should."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.train.losses import CrossEntropy
from lcjax.train.optimizers import AdamW, Cosine, WarmupStableDecay
from lcjax.train.state import TrainState
from lcjax.train.step import StepOptions, make_step

V, W, B, T = 11, 8, 4, 6


class Toy(nnx.Module):
    """The smallest thing that trains like a decoder: an embedding, a norm scale and a tied head."""

    def __init__(self):
        self.embed = nnx.Param(jax.random.normal(jax.random.key(0), (V, W)))
        self.mix = nnx.Param(jax.random.normal(jax.random.key(1), (W, W)))
        self.scale = nnx.Param(jnp.ones(W))
        self.spec = SimpleNamespace(logit_soft_cap=None)

    def hidden(self, tokens, **options):
        return self.embed[...][tokens] @ self.mix[...] * self.scale[...], None

    def logits(self, x, unembedding=None):
        return x @ (self.embed[...].T if unembedding is None else unembedding)

    def unembedding(self):
        return self.embed[...].T


def batch(seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (B, T + 1), 0, V)
    weights = (jax.random.uniform(jax.random.key(seed + 1), (B, T)) > 0.3).astype(jnp.float32)
    ones = jnp.ones((B, T), jnp.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": ones,
        "segment_ids": ones,
        "loss_weights": weights,
    }


def setup(optimizer=None, **options):
    optimizer = optimizer or AdamW(Cosine(0.01, warmup=2))
    graphdef, params = nnx.split(Toy(), nnx.Param)
    chain = optimizer.build(100)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, chain.init(params), jax.random.key(5), zero, zero)
    step = make_step(graphdef, chain, optimizer.schedule.build(100), CrossEntropy(z_loss=1e-3), StepOptions(**options))
    return jax.jit(step), state


def same_bits(a, b):
    raw = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(raw(x)), np.asarray(raw(y))), a, b)


def test_loss_falls():
    step, state = setup(AdamW(WarmupStableDecay(0.03)))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 30


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_update_of_the_whole_batch(parts):
    whole, state = setup()
    cut, _ = setup(accumulate=parts)
    for i in range(3):
        expected, told = whole(state, batch(i))
        state, metrics = cut(state, batch(i))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), state.params, expected.params)
        np.testing.assert_allclose(metrics["loss"], told["loss"], rtol=1e-6)


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(poison):
    step, state = setup()
    state, _ = step(state, batch())
    poisoned = {**batch(1), "loss_weights": jnp.full((B, T), poison)}
    skipped, metrics = step(state, poisoned)
    same_bits((skipped.params, skipped.opt_state), (state.params, state.opt_state))
    assert (int(skipped.step), int(skipped.skipped), int(metrics["skipped_in_row"])) == (2, 1, 1)
    skipped, metrics = step(skipped, poisoned)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (2, 2)
    good, metrics = step(skipped, batch(2))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (2, 0)
    assert metrics["learning_rate"] == step(state, batch(2))[1]["learning_rate"]
    # One poisoned micro-batch spoils its whole update, and only that.
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(good.params))


def test_an_exploding_gradient_alone_is_skipped_too():
    step, state = setup()
    state.params["mix"][...] = jnp.full((W, W), 3e38)
    after, metrics = step(state, batch())
    assert int(metrics["skipped"]) == 1
    same_bits(after.params, state.params)


def test_a_batch_without_targets_changes_no_direction():
    step, state = setup(AdamW(Cosine(0.01), weight_decay=0.0))
    after, metrics = step(state, {**batch(), "loss_weights": jnp.zeros((B, T))})
    assert float(metrics["loss"]) == 0
    same_bits(after.params, state.params)


def test_decay_leaves_vectors_and_named_weights_alone():
    decayed = AdamW(Cosine(1e-3), no_decay=("embed",)).decayed(nnx.split(Toy(), nnx.Param)[1])
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): flag
        for path, flag in jax.tree_util.tree_leaves_with_path(decayed)
    }
    assert [name for name, flag in named.items() if flag] == [name for name in named if name.startswith("mix")]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Cosine(1.0, warmup=10, final=0.1), {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        (WarmupStableDecay(1.0, warmup=10, decay=20), {0: 0.0, 5: 0.5, 10: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
    ],
    ids=["cosine", "wsd"],
)
def test_schedules(schedule, expected):
    rate = schedule.build(100)
    np.testing.assert_allclose([rate(step) for step in expected], list(expected.values()), atol=1e-6)


@pytest.mark.parametrize("schedule", [Cosine(1.0, warmup=11), WarmupStableDecay(1.0, warmup=6, decay=6)])
def test_phases_longer_than_the_run_are_refused(schedule):
    with pytest.raises(ValueError, match="do not fit a run of 10 steps"):
        schedule.build(10)
