"""A sequence in shards gives what one device gives: outputs, states and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    causal_conv1d,
    causal_conv1d_sharded,
    gated_linear_attention,
    gated_linear_attention_sharded,
    gated_linear_attention_truncated,
)
from pallas_kernels.gated_linear import sharded
from tests.kernels.linear_cases import assert_close, make_case

LENGTH = 32
IDS = jnp.asarray([[1] * 3 + [2] * 15 + [5] * 9 + [0] * 5, [3] * 24 + [-1] * 3 + [4] * 5])  # segments cross shards of 4


def with_gradients(case, shards: int | None):
    """Outputs and gradients over a context axis; with `shards` None, of the definition on one device."""
    ids, normalise = case.options["segment_ids"], case.options["normalise"]

    def one(q, k, v, g, beta, state, ids):
        given = {"beta": beta, "initial_state": state, "segment_ids": ids, "normalise": normalise}
        return gated_linear_attention(q, k, v, g, **given, implementation="reference")

    def shard(q, k, v, g, beta, state, ids):
        given = {"beta": beta, "initial_state": state, "segment_ids": ids, "normalise": normalise}
        return gated_linear_attention_sharded(q, k, v, g, **given, axis_name="context")

    if shards is not None:
        mesh = jax.sharding.Mesh(jax.devices()[:shards], ("context",))
        along = P(None, "context")
        specs = (*[along] * 5, P(), along)
        one = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=(along, P()))

    def run(inputs, cotangents):
        out, vjp = jax.vjp(lambda *x: one(*x, ids), *inputs)
        return out, vjp(cotangents)

    return jax.jit(run)(case.inputs, case.cotangents)


def check(*shards, ids=None, **options):
    case = make_case(LENGTH, shape=(2, 2, 4, 3), segment_ids=ids, **options)
    expected = with_gradients(case, None)
    for n in shards:
        assert_close(with_gradients(case, n), expected, 1e-10)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def test_any_number_of_shards():
    check(1, 2, 4, 8, ids=IDS)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "none"},
        {"kind": "vector", "mean": -np.inf},
        {"kind": "vector", "normalise": True, "ids": IDS},
        {"kind": "scalar", "delta": True, "ids": IDS},
    ],
    ids=["none", "infinite", "normalised", "delta rule"],
)
def test_kinds(options):
    check(4, **options)


def test_planted_bug_states_that_pass_shards_undecayed(monkeypatch):
    original = sharded.transfer

    def broken(*args):
        reader, transition = original(*args)
        return reader, jnp.ones_like(transition)

    monkeypatch.setattr(sharded, "transfer", broken)
    with pytest.raises(AssertionError):
        check(4)


class TestConvolution:
    @pytest.mark.parametrize(("shards", "width", "packed"), [(1, 4, True), (2, 2, True), (8, 4, True), (8, 5, False)])
    def test_halo(self, shards, width, packed):
        rng = np.random.default_rng(width)
        x, w, bias = rng.normal(size=(2, LENGTH, 3)), rng.normal(size=(width, 3)), rng.normal(size=3)
        tail, y_bar = rng.normal(size=(2, width - 1, 3)), rng.normal(size=x.shape)
        ids = IDS if packed else None
        mesh, along = jax.sharding.Mesh(jax.devices()[:shards], ("context",)), P(None, "context")

        def one(x, w, bias, tail, ids):
            return causal_conv1d(x, w, bias=bias, tail=tail, segment_ids=ids, activation="silu")

        def shard(x, w, bias, tail, ids):
            return causal_conv1d_sharded(
                x, w, bias=bias, tail=tail, segment_ids=ids, activation="silu", axis_name="context"
            )

        specs = (along, P(), P(), P(), along)
        in_shards = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=(along, P()))

        def run(f):
            out, vjp = jax.vjp(lambda *x: f(*x, ids), x, w, bias, tail)
            return out, vjp((y_bar, tail))

        assert_close(jax.jit(run, static_argnums=0)(in_shards), jax.jit(run, static_argnums=0)(one), 1e-10)

    def test_refuses_shards_shorter_than_the_halo(self):
        mesh, along = jax.sharding.Mesh(jax.devices(), ("context",)), P(None, "context")
        run = jax.shard_map(
            lambda x: causal_conv1d_sharded(x, jnp.ones((6, 3)), axis_name="context")[0],
            mesh=mesh,
            in_specs=along,
            out_specs=along,
        )
        with pytest.raises(ValueError, match="x has 4 tokens on each shard: a convolution of width 6 needs 5"):
            run(jnp.ones((1, LENGTH, 3)))


class TestTruncatedGradient:
    """Outputs are exact; gradients are those of blocks that restart from a constant state one block back."""

    window = 8

    def restarted(self, q, k, v, g, beta, state):
        """Each block's outputs from a run over it and the block before, which starts from a constant."""
        run = lambda start, stop, s: gated_linear_attention(
            q[:, start:stop], k[:, start:stop], v[:, start:stop], g[:, start:stop],
            beta=None if beta is None else beta[:, start:stop], initial_state=s, implementation="reference",
        )  # fmt: skip
        o, entry, w = [run(0, self.window, state)[0]], state, self.window
        for start in range(w, LENGTH, w):
            entry = jax.lax.stop_gradient(entry)
            o.append(run(start - w, start + w, entry)[0][:, w:])
            entry = run(start - w, start, entry)[1]
        return jnp.concatenate(o, axis=1), run(LENGTH - w, LENGTH, jax.lax.stop_gradient(entry))[1]

    def gradients(self, f, case):
        def run(inputs, cotangents):
            out, vjp = jax.vjp(lambda *x: f(*x), *inputs)
            return out, vjp(cotangents)

        return jax.jit(run)(case.inputs, case.cotangents)

    @pytest.mark.parametrize(("shards", "delta"), [(None, True), (2, False)])
    def test_is_that_of_restarted_blocks(self, shards, delta):
        case = make_case(LENGTH, "scalar" if delta else "vector", shape=(2, 2, 4, 3), delta=delta, mean=-0.1)
        axis = None if shards is None else "context"

        def run(q, k, v, g, beta, state):
            given = {"beta": beta, "initial_state": state, "axis_name": axis}
            return gated_linear_attention_truncated(q, k, v, g, window=self.window, **given)

        if shards is not None:
            mesh, along = jax.sharding.Mesh(jax.devices()[:shards], ("context",)), P(None, "context")
            run = jax.shard_map(run, mesh=mesh, in_specs=(*[along] * 5, P()), out_specs=(along, P()))
        found, grads = self.gradients(run, case)
        expected, expected_grads = self.gradients(self.restarted, case)
        assert_close(found, expected, 1e-10)
        assert_close(grads, expected_grads, 1e-10)
        exact, exact_grads = with_gradients(case, None)
        assert_close(found, exact, 1e-10)
        assert_close(grads[0], exact_grads[0], 1e-10)
        assert np.abs(grads[1] - exact_grads[1]).max() > 1e-2  # it is not the true gradient

    def test_refuses_a_window_that_does_not_divide(self):
        x = jnp.ones((1, 32, 1, 4))
        with pytest.raises(ValueError, match="window is 12: it must be a divisor of the 32 tokens"):
            gated_linear_attention_truncated(x, x, x, window=12)
