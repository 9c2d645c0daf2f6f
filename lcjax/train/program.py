"""The step of a job as a program: what is compiled, and for which shapes and shardings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from lcjax.models.decoder import abstract
from lcjax.models.stacked import Stacks, stacks
from lcjax.parallel.rules import batch_sharding
from lcjax.train import state as states
from lcjax.train.job import Train
from lcjax.train.state import TrainState, divide
from lcjax.train.step import BATCH_DTYPES, Batch, Metrics, make_step


@dataclass(frozen=True)
class StepProgram:
    """`function` of `shapes` (state, batch and flags, with shardings), and the same jitted with its state donated.

    Beside the step's own metrics it returns `asked_to_stop`, how many of the devices' flags are raised.
    """

    function: Callable[..., tuple[TrainState, Metrics]]
    shapes: tuple[Any, ...]
    jitted: Any


def state_stacks(job: Train) -> Stacks:
    """How the state of a resolved job is stacked while it is stepped."""
    if not job.options.scan:
        return ()
    return stacks(job.step_spec, *divide(abstract(job.spec)[1], job.trainable))


def step_program(job: Train, shapes: TrainState, mesh: jax.sharding.Mesh) -> StepProgram:
    """The program of a resolved job whose state has these shapes on this mesh."""
    graphdef, _ = abstract(job.step_spec)
    optimizer, schedule = job.optimizer.build(job.steps), job.optimizer.schedule.build(job.steps)
    step = make_step(graphdef, optimizer, schedule, job.loss, job.options, job.trainable)

    def flagged(state: TrainState, batch: Batch, flags: Int[Array, " devices"]) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, batch)
        return state, metrics | {"asked_to_stop": jnp.sum(flags)}

    flags = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=flags_sharding(mesh))
    jitted = jax.jit(flagged, donate_argnums=0, out_shardings=(states.shardings(shapes), None))
    return StepProgram(flagged, (shapes, batch_shapes(job, mesh), flags), jitted)


def flags_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """One element a device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def batch_shapes(job: Train, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """One batch of the job over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((job.batch, job.length), dtype, sharding=sharding)
        for name, dtype in dtypes(job).items()
    }


def dtypes(job: Train) -> dict[str, Any]:
    """Of the arrays of a batch: sampled positions are fractions."""
    found = BATCH_DTYPES | dict.fromkeys(job.data.extra, np.int32)
    return found if job.positions is None else found | {"positions": np.float32}
