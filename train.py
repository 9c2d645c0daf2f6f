"""Train a model: `python train.py --gin_file=configs/run/quickstart.gin --output=runs/quickstart`.

The same command goes on where an interrupted run stopped. With `--compile_for=v5p:4x4x4` (or `--compile_for` alone, for
the slice that the configuration names) nothing is trained: the step is compiled for that TPU slice and what it needs is
printed; the exit status says whether it fits (0) or not (1).
"""

import functools
import sys
from pathlib import Path

from lcjax import settings
from lcjax.checkpoint.manager import CheckpointError
from lcjax.parallel.slices import named_slice
from lcjax.parallel.startup import Cluster, add_flags
from lcjax.train import loop
from lcjax.train.job import Train
from lcjax.train.preempt import Preemption
from lcjax.train.size import size_train


def main() -> int:
    """Parse flags; size, or prepare and train every stage."""
    parser = settings.flags("Train a model; everything else is set by gin.")
    add_flags(parser)
    parser.add_argument("--compile_for", nargs="?", const="", metavar="SLICE", help="size the run for a TPU slice")
    launch = settings.main("train", parser=parser)
    if launch.flags.compile_for is not None:
        return size(launch.job, launch.flags.compile_for)
    with settings.refusals("train.py"):
        Cluster.of(launch.flags).join()
    if launch.output is None:
        print("train.py: --output is missing: name the folder for checkpoints and metrics", file=sys.stderr)
        return 2
    with Preemption() as stop:
        for job, folder in launch.job.runs(launch.output):
            with settings.refusals("train.py"):
                prepare = functools.partial(loop.prepare, job, folder, launch.config)
                run = stop.interruptible("preparation", prepare)
            with settings.refusals("train.py", (CheckpointError, loop.TrainingStopped)):
                status = loop.train(run, stop)
            if status:
                return status
    return 0


def size(job: Train, name: str) -> int:
    """Compile every stage for the slice `name`, or the one that the job's mesh names."""
    with settings.refusals("train.py"):
        where = named_slice(name or job.mesh.slice or "")
        fits = True
        for stage, _ in job.runs(Path()):
            sizing = size_train(stage, where)
            print(sizing.text(), flush=True)
            fits &= sizing.fits
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
