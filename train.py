"""Train a model: `python train.py --gin_file=configs/run/quickstart.gin --output=runs/quickstart`.

The same command goes on where an interrupted run stopped.
"""

import sys

from lcjax import settings
from lcjax.checkpoint.manager import CheckpointError
from lcjax.train import loop
from lcjax.train.preempt import Preemption


def main() -> int:
    """Parse flags, prepare the run, train."""
    launch = settings.main("train")
    if launch.output is None:
        print("train.py: --output is missing: name the folder for checkpoints and metrics", file=sys.stderr)
        return 2
    with Preemption() as stop:
        with settings.refusals("train.py"):
            run = stop.interruptible("preparation", lambda: loop.prepare(launch.job, launch.output, launch.config))
        with settings.refusals("train.py", (CheckpointError, loop.TrainingStopped)):
            return loop.train(run, stop)


if __name__ == "__main__":
    sys.exit(main())
