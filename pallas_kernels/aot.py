"""Compiling for TPUs on a machine without one, through libtpu's compiler.

    compiled = compile_for("v5p:2x2x1", step, params_shapes, batch_shapes)
    compiled.memory_analysis()

libtpu reads its environment when it loads: the first call sets what is missing. A process may use many generations.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.op import target_platform

GENERATIONS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}

_ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


@functools.cache
def devices(topology: str, slices: int = 1) -> tuple[jax.Device, ...]:
    """The devices of a TPU slice such as 'v5e:4x4' (or a key of GENERATIONS), or of several, for compiling only.

    Raises:
      RuntimeError: libtpu is missing or does not know the slice.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    name = GENERATIONS.get(topology, topology)
    try:
        # The two cores of a v4 chip are one device to its users; libtpu takes them apart unless it is told.
        cores = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", num_slices=slices, **cores)
        return tuple(found.devices)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"no compiler for TPU slice {name!r}: {error}. Install libtpu (the `dev` extra) and name a slice such as"
            " 'v5p:2x2x1'"
        ) from error


def compile_for(topology: str, function: Callable, *shapes: Any, donate: Sequence[int] = ()) -> jax.stages.Compiled:
    """`function` compiled for one chip of `topology`; `shapes` are pytrees of arrays or `jax.ShapeDtypeStruct`."""
    mesh = jax.sharding.Mesh(np.asarray(devices(topology)[:1]), ("chip",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    # Kernels ask the abstract mesh which generation they are lowered for.
    with target_platform("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function, donate_argnums=tuple(donate)).trace(*jax.tree.map(place, shapes))
        return traced.lower(lowering_platforms=("tpu",)).compile()
