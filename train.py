"""Train a model: `python train.py --gin_file=configs/run/quickstart.gin --output=runs/quickstart`.

The same command goes on where an interrupted run stopped.
"""

import functools
import sys

from lcjax import settings
from lcjax.checkpoint.manager import CheckpointError
from lcjax.train import loop
from lcjax.train.preempt import Preemption


def main() -> int:
    """Parse flags; prepare and train every stage."""
    launch = settings.main("train")
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


if __name__ == "__main__":
    sys.exit(main())
