"""Sizing a training run for a slice that is not there: `train.py --compile_for=v5p:4x4x4`."""

from jax.sharding import Mesh

from lcjax.models.flops import flops_per_token
from lcjax.parallel.sizing import Sizing, Work, described, size
from lcjax.parallel.slices import Slice
from lcjax.parallel.work import count_flops
from lcjax.train import state as states
from lcjax.train.job import Train
from lcjax.train.program import state_stacks, step_program
from lcjax.train.state import TrainState


def size_train(job: Train, where: Slice) -> Sizing:
    """The real step of `job` compiled for the slice.

    Raises ValueError when the job's mesh, batch or length does not fit it.
    """
    mesh = job.mesh.build(where.devices)
    job.check_mesh(mesh)
    job, _ = job.resolve()
    start = states.Start(job.spec, job.optimizer.build(job.steps), job.seed, job.trainable)
    shapes = states.abstract_state(start, mesh, state_stacks(job))
    program = step_program(job, shapes, mesh)
    name = f"{job.spec.name}, step of {job.batch} x {job.length:,} tokens on {described(mesh, where)}"
    return size(name, where, mesh, program.jitted, program.shapes, step_work(job, shapes, mesh))


def step_work(job: Train, shapes: TrainState, mesh: Mesh) -> Work:
    """FLOPs of one step, counted in its jaxpr and by the formula."""
    program = step_program(job, shapes, mesh)
    counted = [count_flops(program.function, *program.shapes, recomputed=again) for again in (False, True)]
    formula = flops_per_token(job.step_spec, job.length, training=True) * job.batch * job.length
    return Work(*counted, formula)
