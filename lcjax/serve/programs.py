"""The compiled programs of one batch size and cache size."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lcjax.cache import init_caches
from lcjax.cache.counts import uncounted
from lcjax.cache.placing import placed
from lcjax.models.decoder import abstract
from lcjax.models.spec import ModelSpec
from lcjax.serve.sampling import SamplingArrays
from lcjax.serve.steps import DecodeState, Limits, decode, prefill


class Programs:
    """`begin` reads the first chunk of every prompt into new caches, `extend` a further one, `decode` writes tokens.

    Each is compiled once, ahead of its first run; caches are donated from call to call. `extend` and `decode` are
    compiled when needed: short prompts need no `extend`. On a mesh they take their rows where `place` puts them.
    """

    def __init__(
        self, graphdef: Any, params: Any, spec: ModelSpec, sizes: dict[str, Any], mesh: jax.sharding.Mesh | None = None
    ):
        """sizes: batch, capacity, chunk, steps, cache (a CacheLayout). mesh: the one that `params` lie on."""
        self._params, self.sizes, self._mesh = params, sizes, mesh
        self._compiled: dict[str, Any] = {}
        self.compile_seconds = 0.0
        batch, capacity = sizes["batch"], sizes["capacity"]
        if (fixed := spec.at(capacity)) != spec:
            graphdef, spec = abstract(fixed)[0], fixed

        def begin(params: Any, *rest: Any) -> DecodeState:
            held = uncounted(init_caches(spec, batch, capacity, sizes["cache"]))
            none = jnp.zeros((batch,), jnp.int32)
            return prefill(graphdef, params, DecodeState(*held, none, none, jnp.zeros((batch,), bool)), *rest)

        self.jitted = {
            "begin": jax.jit(begin),
            "extend": jax.jit(lambda *args: prefill(graphdef, *args), donate_argnums=1),
            "decode": jax.jit(lambda *args: decode(graphdef, *args, steps=sizes["steps"]), donate_argnums=1),
        }

    @property
    def compiled(self) -> tuple[str, ...]:
        """Names of the programs compiled so far."""
        return tuple(self._compiled)

    def memory(self, name: str) -> Any:
        """The compiler's account of a compiled program: argument, aliased, temporary bytes."""
        return self._compiled[name].memory_analysis()

    def prepare(self, sampling: SamplingArrays, limits: Limits, extend: bool) -> None:
        """Compile what a generation needs and is not there yet."""
        began = time.perf_counter()
        needed = ("begin", "decode", "extend") if extend else ("begin", "decode")
        if missing := [name for name in needed if name not in self._compiled]:
            state, arguments = self.shapes(sampling, limits)
            on_mesh = contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
            with on_mesh, ThreadPoolExecutor() as pool:  # one is compiled while the next is traced
                compiling = {}
                for name in missing:
                    states = () if name == "begin" else (state,)
                    lowered = self.jitted[name].lower(self._params, *states, *arguments[name])
                    compiling[name] = pool.submit(lowered.compile)
                self._compiled |= {name: future.result() for name, future in compiling.items()}
        self.compile_seconds = time.perf_counter() - began

    def shapes(self, sampling: SamplingArrays, limits: Limits) -> tuple[DecodeState, dict[str, tuple[Any, ...]]]:
        """The state's shapes, and those of what each program takes beside parameters and state.

        On a mesh with their shardings; ValueError when requests or heads don't split over it.
        """
        batch, chunk = self.sizes["batch"], self.sizes["chunk"]
        flags = jax.ShapeDtypeStruct((batch, chunk), bool), jax.ShapeDtypeStruct((batch,), bool)
        tokens = (jax.ShapeDtypeStruct((batch, chunk), jnp.int32), *flags, sampling, limits)
        state = jax.eval_shape(self.jitted["begin"], self._params, *tokens)
        arguments = {"begin": tokens, "extend": tokens, "decode": (sampling, limits)}
        return (state, arguments) if self._mesh is None else placed((state, arguments), self._mesh)

    def place[T](self, rows: T) -> T:
        """Arrays of the batch where the programs take them."""
        if self._mesh is None:
            return rows
        return jax.device_put(rows, jax.tree.map(lambda x: x.sharding, placed(rows, self._mesh)))

    def begin(
        self, tokens: Int[Array, "B C"], valid: Bool[Array, "B C"], last: Bool[Array, "B"], *settings: Any
    ) -> DecodeState:
        """Read the first chunk."""
        return self._compiled["begin"](self._params, tokens, valid, last, *settings)

    def extend(
        self, state: DecodeState, tokens: Int[Array, "B C"], valid: Bool[Array, "B C"], last: Array, *settings: Any
    ) -> DecodeState:
        """Read a further chunk; `state` is used up."""
        return self._compiled["extend"](self._params, state, tokens, valid, last, *settings)

    def decode(self, state: DecodeState, *settings: Any) -> tuple[DecodeState, Int[Array, "B N"]]:
        """Write up to `steps` tokens a row; `state` is used up."""
        return self._compiled["decode"](self._params, state, *settings)
