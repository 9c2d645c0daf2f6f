"""Sizing decoding for a slice that is not there: `decode.py --compile_for=v5p:2x2x2`."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lcjax.models.decoder import abstract
from lcjax.models.spec import ModelSpec
from lcjax.parallel.rules import shardings
from lcjax.parallel.sizing import Sizing, described, size
from lcjax.parallel.slices import Slice
from lcjax.serve.job import Generate
from lcjax.serve.programs import Programs
from lcjax.serve.sampling import stack
from lcjax.serve.steps import Limits


def size_decoding(job: Generate, where: Slice) -> Iterator[Sizing]:
    """The programs that read a further chunk of the prompts and that write tokens, at the engine's full sizes.

    Raises ValueError when the job has no mesh, or one that does not fit the slice, the batch or the heads.
    """
    if job.mesh is None:
        raise ValueError("generate.mesh is not set: bind it to @Mesh(), such as Mesh.data = 1 and Mesh.tensor = 4")
    mesh = job.mesh.build(where.devices)
    spec, engine = job.spec(), job.engine
    graphdef, params = abstract(spec, spec.compute_dtype if isinstance(job.model, ModelSpec) else job.model.dtype)
    params = jax.tree.map(_with_sharding, params, shardings(params, mesh))
    sizes = engine.sizes(engine.batch, engine.capacity or spec.max_length)
    programs = Programs(graphdef, params, spec, sizes, mesh)
    state, arguments = programs.shapes(*_settings(job))
    place = f"{engine.batch} requests of {sizes['capacity']:,} tokens on {described(mesh, where)}"
    for name, does in (("extend", f"prefill of {engine.chunk:,} tokens"), ("decode", f"{engine.steps} tokens")):
        title = f"{spec.name}, {does}, {place}"
        yield size(title, where, mesh, programs.jitted[name], (params, state, *arguments[name]))


def _settings(job: Generate) -> tuple[Any, Limits]:
    """Sampling and limits of a full batch."""
    batch = job.engine.batch
    none = jnp.zeros((batch,), jnp.int32)
    limits = Limits(none, jnp.zeros((1,), jnp.int32), none)
    return stack([job.sampling] * batch), limits


def _with_sharding(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
