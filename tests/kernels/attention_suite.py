"""What every backend of block-sparse attention must pass; a backend's file is a short subclass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention
from pallas_kernels.attention import reference, specs
from pallas_kernels.attention.specs import Spec


def visible(spec, dtype=jnp.float32):
    """bool [B,H,T,S], from the mask's expression."""
    return np.asarray(reference.visible(spec.call(dtype)))


def evaluate(spec, implementation, dtype=jnp.float32, poison=False, mask=None):
    """{o, lse, dq, dk, dv, dsink_logits} of one call, the gradient taken through o and lse."""
    x, options = spec.arrays(dtype), spec.options()
    if mask is not None:
        options.pop("lists")
    if poison:
        seen = visible(spec).any((1, 2))  # [B,S]
        x["k"], x["v"] = (jnp.where(seen[:, :, None, None], x[n], jnp.nan) for n in ("k", "v"))
    return differentiate(x, spec.mask if mask is None else mask, options, implementation)


def differentiate(x, mask, options, implementation):
    """`evaluate` on given arrays: q, k, v, do, dlse and perhaps sink_logits."""
    x = dict(x)
    do, dlse = x.pop("do"), x.pop("dlse")

    def loss(x):
        o, lse = block_sparse_attention(
            mask=mask,
            **x,
            **options,
            return_lse=True,
            implementation=implementation,
        )
        some = lse > -jnp.inf
        return (o.astype(jnp.float32) * do).sum() + jnp.where(some, lse * dlse, 0.0).sum(), (o, lse)

    (_, (o, lse)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    found = {"o": o, "lse": lse, **{f"d{name}": grad for name, grad in grads.items()}}
    return {name: np.asarray(value.astype(jnp.float32)) for name, value in found.items()}


@functools.cache
def expected(name, dtype=jnp.float32):
    return evaluate(SPECS[name], "reference", dtype)


SPECS = {spec.name: spec for spec in specs.TESTED}
# Specs that share their code with another, here named: CI runs that one, the slow tests all.
SWEPT = {
    "causal_63": "causal_65",
    "causal_64": "causal_65",
    "groups": "documents",
    "head_dim_128": "value_dim",
    "segments": "packed_sinks_per_head",
    "packed_sinks": "packed_sinks_per_head",
    "chunk_static": "chunk",
}


def close(got, want, tolerance):
    for name, value in want.items():
        scale = max(1.0, float(np.abs(value[np.isfinite(value)]).max(initial=0)))
        np.testing.assert_allclose(got[name], value, atol=tolerance * scale, rtol=tolerance, err_msg=name)


class AttentionSuite:
    """Subclasses name the implementation and what it declines."""

    implementation: str
    tolerance = 2e-5
    dtype = jnp.float32
    declines: frozenset[str] = frozenset()

    def evaluate(self, spec, **options):
        return evaluate(spec, self.implementation, self.dtype, **options)

    @pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SWEPT)) for n in SPECS])
    def test_forward_and_gradients(self, name):
        if name in self.declines:
            pytest.skip(f"{self.implementation} declines {name}")
        spec = SPECS[name]
        got = self.evaluate(spec, poison=spec.poison)
        close(got, expected(name), self.tolerance)

    def test_rows_without_keys(self):
        spec = SPECS["no_key"]
        got, empty = self.evaluate(spec), ~visible(spec).any(-1)
        assert empty.any()
        assert (got["lse"][empty] == -np.inf).all()
        assert (got["o"][empty.swapaxes(1, 2)] == 0).all()
        assert (got["dq"][empty.swapaxes(1, 2)] == 0).all()

    def test_repeats_bit_for_bit(self):
        spec = SPECS["stride"]
        first, second = self.evaluate(spec), self.evaluate(spec)
        for name, value in first.items():
            np.testing.assert_array_equal(value, second[name])

    def test_packed_equals_separate(self):
        """Outputs and gradients of two documents in a row are those of each alone, their sinks included."""
        if "packed_sinks" in self.declines:
            pytest.skip(f"{self.implementation} declines packed rows")
        spec = Spec("two_documents", specs.Causal() & (specs.Sink(5) | specs.Window(20)), length=2 * 65)
        x, size = spec.arrays(self.dtype), 65
        ids = jnp.asarray(np.repeat([[3, 7]], size, axis=1), jnp.int32)
        packed = differentiate(x, spec.mask, {"segment_ids": ids}, self.implementation)
        cut = lambda name, y, n: y[..., n * size : (n + 1) * size] if "lse" in name else y[:, n * size : (n + 1) * size]
        for n in range(2):
            alone = {name: cut(name, y, n) for name, y in x.items()}
            want = differentiate(alone, spec.mask, {}, self.implementation)
            close({name: cut(name, y, n) for name, y in packed.items()}, want, self.tolerance)

    def test_a_planted_window_error_is_caught(self):
        spec = SPECS["sink_window"]
        wrong = dataclasses.replace(spec, mask=specs.Causal() & (specs.Sink(5) | specs.Window(34)))
        with pytest.raises(AssertionError):
            close(self.evaluate(wrong), expected(spec.name), self.tolerance)
