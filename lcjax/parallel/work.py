"""The arithmetic of a program from its jaxpr, where a loop counts as often as it runs.

Kernels loop as their masks say, which no jaxpr shows; while counting, the ops of `lcjax.parallel.ops` are therefore
replaced by stand-ins that carry the exact FLOPs of what they would do.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from pallas_kernels.attention.call import KEPT
from pallas_kernels.masks import Mask

_counting = jax.make_user_context(default_value="")


def counting() -> bool:
    """Whether the program is traced only to be counted."""
    return bool(_counting.value)


def checkpoint(function: Callable[..., Any], policy: Any = None) -> Callable[..., Any]:
    """`jax.checkpoint`, but for the count of the arithmetic without recomputation."""
    return function if _counting.value == "once" else jax.checkpoint(function, policy=policy)


def count_flops(function: Callable[..., Any], *shapes: Any, recomputed: bool) -> int:
    """FLOPs of one call: 2 a multiply-add of matrix products and convolutions, ops as `stand_in` says.

    recomputed: with what the backward pass computes again under `checkpoint`. Traced without a mesh: the whole program,
    not one device's part. Of a conditional the costlier branch counts.
    """
    with _counting("executed" if recomputed else "once"):
        # A new function each time: tracing must not take the other count from its cache.
        closed = jax.make_jaxpr(lambda *arguments: function(*arguments))(*shapes)
    return _flops(closed.jaxpr)


def visible_pairs(mask: Mask, heads: int, length: int) -> int:
    """How many (query, key) pairs of one row a mask allows, over all heads, exactly."""
    plan = mask.plan(heads, length, length, 1, math.gcd(length, 128))
    key = np.arange(length, dtype=np.int64)
    block = key // plan.block_k
    first = key if plan.causal else np.zeros_like(key)
    per_pattern = []
    for p in range(plan.num_patterns):
        window = int(plan.window[p])
        end = np.where(window > 0, key + window, 0) if plan.causal else np.full_like(key, length if window else 0)
        end = np.where(key < int(plan.sink[p]), length, end)
        if plan.expiry is not None:
            end = np.maximum(end, np.asarray(plan.expiry)[p, block])
        end = np.clip(end, first, length)
        pairs = int((end - first).sum())
        if plan.second is not None:
            low, high = (np.asarray(plan.second)[p, block, n].astype(np.int64) for n in (0, 1))
            pairs += int(np.maximum(np.minimum(high, length) - np.maximum(low, end), 0).sum())
        per_pattern.append(pairs)
    return sum(per_pattern[p] for p in plan.pattern_of_head)


_work = core.Primitive("counted_work")
_work.multiple_results = True
_work.def_abstract_eval(lambda *inputs, flops, outputs: list(outputs))


def stand_in(flops: int, outputs: Any, *inputs: Any) -> Any:
    """Arrays like the shapes `outputs`, for `flops` forward and twice as many backward; nothing can run it."""
    leaves, tree = jax.tree.flatten(outputs)
    arrays = [x for x in jax.tree.leaves(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jax.tree.unflatten(tree, _stand_in(flops, _avals(leaves), arrays))


def _avals(leaves: Any) -> tuple[Any, ...]:
    return tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in leaves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stand_in(flops: int, outputs: tuple[Any, ...], inputs: list[Any]) -> list[Any]:
    return _work.bind(*inputs, flops=flops, outputs=outputs)


_stand_in.defvjp(
    lambda flops, outputs, inputs: (checkpoint_name(_stand_in(flops, outputs, inputs), KEPT), inputs),
    lambda flops, outputs, inputs, d: (_work.bind(*d, *inputs, flops=2 * flops, outputs=_avals(inputs)),),
)


def _flops(jaxpr: Any) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "counted_work":
        return parameters["flops"]
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[n] for n in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_feature = parameters["dimension_numbers"].rhs_spec[0]
        per_output = math.prod(n for axis, n in enumerate(kernel) if axis != out_feature)
        return 2 * math.prod(equation.outvars[0].aval.shape) * per_output
    if name == "cond":
        return max(_flops(branch.jaxpr) for branch in parameters["branches"])
    times = parameters["length"] if name == "scan" else 1
    inner = [_inner(value) for value in parameters.values()]
    return times * sum(_flops(jaxpr) for jaxpr in inner if jaxpr is not None)


def _inner(value: Any) -> Any:
    """The jaxpr in an equation's parameter, if it is one."""
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None
