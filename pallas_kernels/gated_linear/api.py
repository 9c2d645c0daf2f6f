"""`gated_linear_attention`: linear attention with a forget gate, an optional delta rule and an optional normaliser."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_values
from pallas_kernels.gated_linear.problem import LinearState, Problem, fold_segments, repeat_heads, varying_like
from pallas_kernels.gated_linear.reference import gated_linear_reference, step
from pallas_kernels.gated_linear.segments import Segments, blank_padding, read_segments
from pallas_kernels.gated_linear.xla import gated_linear_xla
from pallas_kernels.op import dispatch, lazy, platform

_mosaic_gpu = lazy("pallas_kernels.gated_linear.mosaic_gpu", "attend")
_mosaic_tpu = lazy("pallas_kernels.gated_linear.mosaic_tpu", "attend")
BACKENDS: dict[str, Callable[[Problem], tuple[Array, LinearState]]] = {
    "mosaic_gpu": lambda p: _without_segments(_mosaic_gpu, p),
    "mosaic_tpu": lambda p: _without_segments(_mosaic_tpu, repeat_heads(p)),
    "xla": lambda p: _without_segments(gated_linear_xla, repeat_heads(p)),
    "reference": lambda p: gated_linear_reference(repeat_heads(p)),
}
ORDER = {"cpu": ("xla",), "gpu": ("mosaic_gpu", "xla"), "tpu": ("mosaic_tpu", "xla")}


def gated_linear_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T Hk Dk"],
    v: Float[Array, "B T Hv Dv"],
    log_decay: Float[Array, "B T Hg"] | Float[Array, "B T Hg Dk"] | None = None,
    *,
    beta: Float[Array, "B T H"] | None = None,
    initial_state: LinearState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalise: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """Runs `S <- exp(log_decay) S + k^T v; o = scale * q S` over the tokens of each head.

    The current token is included, and its own write is not decayed. With `beta` the write is the delta rule: what the
    decayed state holds at k is replaced, `S <- S + beta k^T (v - k S)` (DeltaNet, Gated DeltaNet). With `normalise` a
    second state sums the keys, `z <- exp(log_decay) z + k`, and the output is divided by `q z + 1e-10`.

    Args:
      q, k, v: queries, keys and values. k, v and log_decay may each have fewer heads than q, in number a divisor of H:
        head n serves the n-th group of query heads.
      log_decay: logarithm of the forget factor, at most 0 (-inf allowed), per head or per key channel; None keeps all.
      beta: writing strength of the delta rule.
      initial_state: what the row continues from; zeros without it. It belongs to the row's first segment.
      segment_ids: packed rows. Ids never decrease; the state starts empty at every new id. A 0 after a positive id, or
        a negative id, is padding: it leaves the state alone, its output is 0, its inputs may hold anything, even NaN.
      normalise: divide by the sum of weights; not defined together with `beta`.
      scale: factor on the output, `Dk**-0.5` by default and 1 when `normalise`.
      implementation: a backend to force; by default the first one that supports the call.

    Returns:
      Outputs in the dtype of v, and the state after the last token (float32, or float64 for float64 inputs). Both are
      differentiable, in the inputs and in `initial_state`.

    Raises:
      ValueError: a shape that does not fit, a positive concrete log_decay, a concrete segment id that decreases.
      Unsupported: no backend, or not the named one, can run the call; every reason is listed.
    """
    segments = None if segment_ids is None else read_segments(segment_ids)
    problem = make_problem(
        q, k, v, log_decay, beta=beta, state=initial_state, segments=segments, normalise=normalise, scale=scale
    )
    return solver(implementation)(problem)


def recurrent_step(
    q: Float[Array, "B H Dk"],
    k: Float[Array, "B Hk Dk"],
    v: Float[Array, "B Hv Dv"],
    log_decay: Float[Array, "B Hg"] | Float[Array, "B Hg Dk"] | None,
    state: LinearState,
    *,
    beta: Float[Array, "B H"] | None = None,
    normalise: bool = False,
    scale: float | None = None,
) -> tuple[Float[Array, "B H Dv"], LinearState]:
    """One token of `gated_linear_attention` for a batch of requests; donate the state to update it in place."""
    _check_shapes(q, k, v, log_decay, beta)
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    if normalise != (state.z is not None):
        raise ValueError(f"normalise={normalise} needs state.z {'to be an array' if normalise else 'to be None'}")
    scale = float(scale if scale is not None else 1.0 if normalise else q.shape[-1] ** -0.5)
    acc = state.s.dtype
    g = jnp.zeros((), acc)
    if log_decay is not None:
        g = jnp.repeat(log_decay, q.shape[1] // log_decay.shape[1], axis=1).astype(acc)
    decay = jnp.broadcast_to(jnp.exp(g if g.ndim in (0, 3) else g[..., None]), k.shape)
    beta = None if beta is None else beta.astype(acc)
    o, new = step(q.astype(acc), k.astype(acc), v.astype(acc), decay, beta, state, scale=scale)
    return o.astype(v.dtype), new


def solver(implementation: str | None) -> Callable[[Problem], tuple[Array, LinearState]]:
    """The backend that will run a problem: the one named, or the first that can."""
    return dispatch("gated_linear_attention", BACKENDS, ORDER[platform()], implementation)


def make_problem(q, k, v, log_decay, *, beta, state, segments: Segments | None, normalise: bool, scale) -> Problem:
    """Checks the arguments of `gated_linear_attention` and fills in its defaults."""
    _check_shapes(q, k, v, log_decay, beta)
    if normalise and beta is not None:
        raise ValueError(
            "normalise=True has no meaning with beta, whose writes are not a sum of weights: leave one of them out"
        )
    _check_decay(log_decay, segments)
    scale = float(scale if scale is not None else 1.0 if normalise else q.shape[-1] ** -0.5)
    return Problem(q, k, v, log_decay, beta, _initial_state(q, v, state, normalise), segments, scale)


def _without_segments(backend: Callable[[Problem], tuple[Array, LinearState]], p: Problem) -> tuple[Array, LinearState]:
    """Runs a backend that knows no segments."""
    o, state = backend(fold_segments(p))
    return blank_padding(o, p.segments), state


def _check_decay(log_decay, segments: Segments | None) -> None:
    if log_decay is None:
        return
    message = "log_decay has the value {found}: at most 0 is allowed, so that states never grow"
    if segments is None:
        check_values(lambda g: g <= 0, message, log_decay)
        return
    trailing = (1,) * (log_decay.ndim - 2)
    check_values(
        lambda g, valid: (g <= 0) | ~valid.reshape(*valid.shape, *trailing), message, log_decay, segments.valid
    )


def _check_shapes(q, k, v, log_decay, beta) -> None:
    *rows, heads, width = q.shape
    at = len(rows)
    features = {"k": [(width,)], "v": [v.shape[-1:]], "log_decay": [(), (width,)]}
    for (name, allowed), x in zip(features.items(), (k, v, log_decay), strict=True):
        if x is None or (x.shape[:at] == (*rows,) and x.shape[at + 1 :] in allowed and heads % x.shape[at] == 0):
            continue
        raise ValueError(
            f"{name} has shape {x.shape}, which does not fit q {q.shape}: give it {(*rows, heads, *allowed[-1])}, or "
            f"fewer heads, a divisor of {heads}"
        )
    if beta is not None and beta.shape != q.shape[:-1]:
        raise ValueError(f"beta has shape {beta.shape}: give {q.shape[:-1]}, one per token and head")


def _initial_state(q, v, given: LinearState | None, normalise: bool) -> LinearState:
    b, _, h, dk = q.shape
    acc = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    shapes = {"s": (b, h, dk, v.shape[-1]), "z": (b, h, dk) if normalise else None}
    if given is None:
        given = LinearState(jnp.zeros(shapes["s"], acc), jnp.zeros(shapes["z"], acc) if normalise else None)
    for name, shape in shapes.items():
        part = getattr(given, name)
        found = None if part is None else part.shape
        if found != shape:
            raise ValueError(f"initial_state.{name} has shape {found}: this call needs {shape} (normalise={normalise})")
    return jax.tree.map(lambda x: varying_like(x.astype(acc), q), given)
