"""The chunked loss equals the plain one, in value and gradient, and never holds T x V logits."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lcjax.parallel.collectives import collectives
from lcjax.parallel.mesh import make_mesh
from lcjax.parallel.rules import batch_sharding, partition
from lcjax.train.losses import CrossEntropy, chunked

B, T, W, V = 3, 37, 8, 50
SPREAD = ((4, 40, W), (W, 64), (4, 40), (4, 40))  # hidden, kernel, targets, weights that split over eight devices


class Head:
    """An unembedding with a soft cap, as a decoder has it."""

    def __init__(self, kernel, cap=None):
        self.kernel, self.spec = kernel, SimpleNamespace(logit_soft_cap=cap)

    def unembedding(self):
        return self.kernel

    def logits(self, x, unembedding=None):
        y = (x @ (self.kernel if unembedding is None else unembedding)).astype(jnp.float32)
        return (
            y if self.spec.logit_soft_cap is None else self.spec.logit_soft_cap * jnp.tanh(y / self.spec.logit_soft_cap)
        )


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    weights = rng.choice([0.0, 1.0, 0.5], size=(B, T)).astype(np.float32)
    return (
        jnp.asarray(rng.normal(size=(B, T, W)), jnp.float32),
        jnp.asarray(rng.normal(size=(W, V)), jnp.float32),
        jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        jnp.asarray(weights),
    )


def plain(hidden, kernel, targets, weights, cap, z_loss):
    logits = Head(kernel, cap).logits(hidden)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * nll) + z_loss * jnp.sum(weights * log_z**2)


@pytest.mark.parametrize("chunk", [1, 7, 40, 10_000])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_chunked_equals_plain(arrays, chunk, cap):
    hidden, kernel, targets, weights = arrays

    def ours(hidden, kernel):
        sums = chunked(Head(kernel, cap), hidden, targets, weights, chunk)
        return sums.nll + 0.1 * sums.z

    value, grads = jax.value_and_grad(ours, (0, 1))(hidden, kernel)
    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(hidden, kernel, targets, weights, cap, 0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)


@pytest.mark.parametrize("degrees", [{"fsdp": 2, "context": 4}, {"data": 2, "fsdp": 1, "context": 2, "tensor": 2}])
def test_shards_of_the_tokens_put_the_unembedding_together_once(arrays, degrees):
    """The kernel lies in parts over every axis; one gather and one sum of its gradient, both outside the loop."""
    hidden, kernel, targets, weights = (jnp.asarray(np.resize(x, s)) for x, s in zip(arrays, SPREAD, strict=True))
    loss = jax.value_and_grad(lambda h, k: chunked(Head(k), h, targets, weights, 16).nll, (0, 1))
    expected, expected_grads = loss(hidden, kernel)
    mesh = make_mesh(**degrees)
    rows, parts = batch_sharding(mesh), NamedSharding(mesh, partition(("embed", "vocab"), dict(mesh.shape)))
    with jax.set_mesh(mesh):
        step = jax.jit(loss, in_shardings=(rows, parts), out_shardings=(None, (rows, parts)))
        compiled = step.lower(hidden, kernel).compile()
        value, grads = compiled(jax.device_put(hidden, rows), jax.device_put(kernel, parts))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)
    whole = [c for c in collectives(compiled.as_text()) if c.bytes >= kernel.nbytes // mesh.shape["tensor"]]
    assert len(whole) >= 2
    assert {c.times for c in whole} == {1}, whole


def test_a_token_of_weight_zero_may_hold_nan(arrays):
    hidden, kernel, targets, weights = arrays
    loss = CrossEntropy(chunk_tokens=16)
    poisoned = jnp.where(weights[..., None] == 0, jnp.nan, hidden)
    value = lambda h: loss(Head(kernel), h, targets, weights).nll
    np.testing.assert_array_equal(value(poisoned), value(jnp.where(weights[..., None] == 0, 0, hidden)))
    grad = jax.grad(value)(poisoned)
    assert jnp.all(jnp.where(weights[..., None] == 0, grad == 0, jnp.isfinite(grad)))


def test_logits_of_all_tokens_never_exist(arrays):
    hidden, kernel, targets, weights = arrays
    loss = lambda h, k: chunked(Head(k), h, targets, weights, chunk_tokens=8).nll
    sizes = largest(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, kernel).jaxpr)
    assert sizes < B * T * V / 2
    assert (
        largest(jax.make_jaxpr(lambda h, k: plain(h, k, targets, weights, None, 0.0))(hidden, kernel).jaxpr)
        >= B * T * V
    )


def largest(jaxpr):
    """Elements of the largest array that a jaxpr makes, inner jaxprs included."""
    size = max((var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars if hasattr(var.aval, "size")), default=0)
    return max([size, *map(largest, subjaxprs(jaxpr))])


def subjaxprs(jaxpr):
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            if hasattr(value, "jaxpr"):
                yield value.jaxpr
            elif hasattr(value, "eqns"):
                yield value


def test_all_masked_is_zero_and_has_no_gradient(arrays):
    hidden, kernel, targets, _ = arrays
    value, grad = jax.value_and_grad(lambda h: chunked(Head(kernel), h, targets, jnp.zeros((B, T)), 16).nll)(hidden)
    assert value == 0
    assert not jnp.any(grad)


def test_forced_fused_kernel_says_why_it_cannot_run(arrays):
    hidden, kernel, targets, weights = arrays
    with pytest.raises(ValueError, match="implementation='tokamax' cannot run: "):
        CrossEntropy(z_loss=1e-4, implementation="tokamax")(Head(kernel), hidden, targets, weights)


@pytest.mark.parametrize("weights", [{0.0, 1.0}, {0.0, 0.5, 1.0}], ids=["binary", "fractional"])
def test_fused_kernel_equals_chunked(arrays, weights, monkeypatch):
    pytest.importorskip("tokamax", reason="tokamax is an extra")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    hidden, kernel, targets, drawn = arrays
    drawn = drawn if 0.5 in weights else jnp.ceil(drawn)
    run = lambda how: jax.value_and_grad(
        lambda h, k: CrossEntropy(implementation=how)(Head(k), h, targets, drawn).nll, (0, 1)
    )(hidden, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run("tokamax"), run("chunked"))


@pytest.mark.parametrize(("field", "value"), [("z_loss", -1.0), ("chunk_tokens", 0)])
def test_bad_settings(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        CrossEntropy(**{field: value})
