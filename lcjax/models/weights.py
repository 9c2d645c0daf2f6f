"""Weights of one model into another that shares parameters with it."""

import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcjax.models.decoder import Decoder, abstract
from lcjax.models.spec import ModelSpec


def dotted(path: tuple[Any, ...]) -> str:
    """`layers.3.mixer.query.kernel`, from a parameter's path."""
    return ".".join(map(str, path))


def carry_over(spec: ModelSpec, params: nnx.State, *, key: jax.Array | None = None) -> nnx.State:
    """Parameters of `spec`: those of `params` at the same path as they are, the others freshly drawn in float32.

    Without `key` nothing may be new. Weights that `spec` has no place for are left behind. Raises ValueError for a
    parameter of another shape, and for a new one without a key.
    """
    held = dict(nnx.to_flat_state(params))
    wanted = list(nnx.to_flat_state(abstract(spec)[1]))
    for path, variable in wanted:
        if path in held and held[path].shape != variable.shape:
            raise ValueError(
                f"{dotted(path)} has shape {held[path].shape} in the weights and {variable.shape} in the model "
                f"{spec.name!r}: start from a model of the same sizes"
            )
    missing = [path for path, _ in wanted if path not in held]
    if missing and key is None:
        raise ValueError(
            f"the weights lack {len(missing)} parameters of {spec.name!r}, the first is {dotted(missing[0])}: "
            "train them (train.methods) and use the trained run"
        )
    fresh = _drawn(spec, missing, key) if key is not None and missing else {}
    return nnx.from_flat_state([(path, fresh[path] if path in fresh else held[path]) for path, _ in wanted])


def _drawn(spec: ModelSpec, paths: Collection[tuple[Any, ...]], key: jax.Array) -> dict[tuple[Any, ...], Any]:
    """Initial values of some parameters; the compiler leaves the others out."""
    wanted = set(paths)

    def draw(key: jax.Array) -> dict[str, Any]:
        params = nnx.split(Decoder(spec, rngs=nnx.Rngs(key)), nnx.Param)[1]
        return {dotted(path): variable for path, variable in nnx.to_flat_state(params) if path in wanted}

    drawn = jax.jit(draw)(key)
    return {path: drawn[dotted(path)] for path in paths}


def mean(params: nnx.State, other: nnx.State) -> nnx.State:
    """The mean of two models' parameters, taken in float32. Raises ValueError where they are not of the same shapes."""
    mine, theirs = (dict(nnx.to_flat_state(state)) for state in (params, other))
    for path, variable in mine.items():
        shape = theirs[path].shape if path in theirs else "missing"
        if shape != variable.shape:
            raise ValueError(
                f"a mean of weights needs two models of the same shapes; {dotted(path)} is {variable.shape} in one and "
                f"{shape} in the other"
            )
    halfway = lambda a, b: ((a.astype(jnp.float32) + b.astype(jnp.float32)) / 2).astype(a.dtype)
    return nnx.from_flat_state([(path, jax.tree.map(halfway, mine[path], theirs[path])) for path in mine])


def cast(params: nnx.State, dtype: Any) -> nnx.State:
    """The same parameters in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def matching(patterns: Collection[str]) -> Callable[[tuple[Any, ...], Any], bool]:
    """An `nnx.split_state` filter: the parameters whose dotted path one of the regular expressions finds itself in."""
    return lambda path, _: any(re.search(pattern, dotted(path)) for pattern in patterns)


def check_patterns(what: str, patterns: Collection[str], params: nnx.State) -> None:
    """Raise ValueError for a pattern that no parameter matches."""
    names = [dotted(path) for path, _ in nnx.to_flat_state(params)]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"{what} has the pattern {pattern!r}, which matches no parameter; names look like {names[-1]!r}"
            )
