"""Random calls of gated linear attention, and the checks that every backend passes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import LinearState, gated_linear_attention


class Case(NamedTuple):
    """Differentiable inputs, cotangents of the outputs, and what stays fixed."""

    inputs: tuple
    cotangents: tuple
    options: dict


def make_case(t=65, kind="vector", *, shape=(2, 2, 8, 5), dtype=np.float64, mean=-0.5, **options) -> Case:
    """`options`: delta (use the delta rule), normalise, segment_ids, group (query heads for each v and decay)."""
    delta, normalise, segment_ids = (options.pop(name, None) for name in ("delta", "normalise", "segment_ids"))
    group = options.pop("group", 1)
    assert not options
    b, h, dk, dv = shape
    rng = np.random.default_rng(t)

    def draw(*size):
        return rng.normal(size=size).astype(dtype)

    q, k, v = draw(b, t, h, dk), draw(b, t, h, dk), draw(b, t, h // group, dv)
    if normalise:
        q, k = np.abs(q), np.abs(k)
    if delta:
        k = (k / np.linalg.norm(k.astype(np.float64), axis=-1, keepdims=True)).astype(dtype)
    size = {"none": None, "scalar": (b, t, h // group), "vector": (b, t, h // group, dk)}[kind]
    g = None if size is None else (mean * rng.exponential(size=size)).astype(dtype)
    beta = rng.uniform(size=(b, t, h)).astype(dtype) if delta else None
    state = LinearState(draw(b, h, dk, dv), np.abs(draw(b, h, dk)) if normalise else None)
    cotangents = (draw(b, t, h, dv), LinearState(draw(b, h, dk, dv), draw(b, h, dk) if normalise else None))
    return Case((q, k, v, g, beta, state), cotangents, {"normalise": bool(normalise), "segment_ids": segment_ids})


def forward(case: Case, implementation: str):
    return _program(_call, implementation)(case.inputs, case.options["segment_ids"], case.options["normalise"])


def with_gradients(case: Case, implementation: str, *, anew: bool = False):
    """Outputs and every gradient (the decay, delta strength and both states included) of one call.

    Calls of one shape share a program, unless it is traced `anew`, for a backend that was just tampered with.
    """
    program = _program(_graded, implementation, anew)
    return program(case.inputs, case.options["segment_ids"], case.options["normalise"], case.cotangents)


def _program(run, implementation: str, anew: bool = False):
    if anew or implementation.startswith("mosaic"):  # how it is interpreted is no part of a program's key
        return _compiled.__wrapped__(run, implementation)
    return _compiled(run, implementation)


@functools.cache
def _compiled(run, implementation: str):
    return jax.jit(lambda *args: run(implementation, *args), static_argnums=2)


def _call(implementation, inputs, segment_ids, normalise):
    q, k, v, g, beta, state = inputs
    options = {"segment_ids": segment_ids, "normalise": normalise, "implementation": implementation}
    return gated_linear_attention(q, k, v, g, beta=beta, initial_state=state, **options)


def _graded(implementation, inputs, segment_ids, normalise, cotangents):
    out, vjp = jax.vjp(lambda inputs: _call(implementation, inputs, segment_ids, normalise), inputs)
    return out, vjp(jax.tree.map(lambda c, o: c.astype(o.dtype), cotangents, out))[0]


def assert_close(found, expected, tolerance: float) -> None:
    """Largest error over the root mean square of what is expected, array by array; NaN and inf never pass."""
    found_leaves, expected_leaves = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found_leaves) == len(expected_leaves)
    for x, y in zip(found_leaves, expected_leaves, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.isfinite(x).all()
        assert np.abs(x - y).max(initial=0) <= tolerance * max(np.sqrt(np.mean(y * y)), 1e-30)


def assert_near(found, expected, tolerance: float, floor: float = 0.0) -> None:
    """Root mean square of the error over that of what is expected: for bfloat16, whose sums have stray large errors.

    An error below `floor` is none.
    """
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        error, size = (np.sqrt(np.mean(a * a)) for a in (x - y, y))
        assert error <= max(tolerance * size, floor), f"{error:.2e} where {size:.2e} is expected"


def packed(lengths, t) -> np.ndarray:
    """Ids 1, 2 ... for segments of these lengths, then padding."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return jnp.asarray(np.pad(ids, (0, t - len(ids)))[None], jnp.int32)
