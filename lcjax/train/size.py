"""Sizing a training run for a slice that is not there: `train.py --compile_for=v5p:4x4x4`."""

import dataclasses
from typing import Any

import jax

from lcjax.models.flops import flops_per_token
from lcjax.parallel.sizing import Sizing, Work, size
from lcjax.parallel.slices import Slice
from lcjax.train.job import Train
from lcjax.train.step import StepProgram, step_program


def size_train(job: Train, where: Slice) -> Sizing:
    """The real step of `job` compiled for the slice.

    Raises ValueError when the job's mesh, batch or length does not fit it.
    """
    mesh = job.mesh.build(where.devices)
    job.check_mesh(mesh, processes=1)
    program = step_program(job, mesh)
    name = f"{job.model.name}, {job.batch} x {job.length:,} tokens, {described(mesh)} of {where.name}"
    return size(name, where, mesh, program.jitted, program.shapes, _work(job, program))


def described(mesh: jax.sharding.Mesh) -> str:
    """The mesh's degrees above 1, as `data=2 x fsdp=4`."""
    return " x ".join(f"{axis}={degree}" for axis, degree in mesh.shape.items() if degree > 1) or "one device"


def _work(job: Train, program: StepProgram) -> Work:
    from lcjax.parallel.work import count_flops

    def counted(remat: Any) -> int:
        plain = dataclasses.replace(job, options=dataclasses.replace(job.options, remat=remat))
        step = step_program(plain, program.mesh)
        return count_flops(step.function, *step.shapes)

    formula = flops_per_token(job.model, job.length, training=True) * job.batch * job.length
    return Work(counted("none"), counted(job.options.remat), formula)
