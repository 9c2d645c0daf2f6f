"""The first state of a run that goes on from another run's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import optax

from lcjax.checkpoint.manager import CheckpointError, CheckpointManager
from lcjax.checkpoint.run import is_run
from lcjax.train.state import TrainState


def continued(fresh: TrainState, shapes: TrainState, source: Path) -> TrainState:
    """A fresh state with the parameters and the optimiser's moments of the run in `source`, bit for bit.

    Adam goes on counting its updates; the schedule begins anew, as do the step, the key and the data. `shapes` says
    where everything lies. Raises CheckpointError where the two runs don't train the same parameters with the same kind
    of optimiser.
    """
    if not is_run(source):
        raise CheckpointError(f"train.moments: {source} is not the folder of a training run: name one, or leave it out")
    manager = CheckpointManager(source / "checkpoints", keep=None)
    try:
        found = manager.newest()
        if found is None:
            raise CheckpointError(f"train.moments: {source} holds no finished checkpoint yet: train further")
        kept = _parameters_and_moments(manager, found[0], shapes)
    finally:
        manager.close()
    return replace(fresh, params=kept["params"], opt_state=_with_schedule(kept["opt_state"], fresh.opt_state))


def _parameters_and_moments(manager: CheckpointManager, path: Path, shapes: TrainState) -> dict[str, Any]:
    try:
        return manager.restore_part(path, {"params": shapes.params, "opt_state": shapes.opt_state})
    except CheckpointError as error:
        raise CheckpointError(
            f"moments cannot be kept: {error}; train the same parameters with the same kind of optimiser, or start anew"
        ) from None


def _with_schedule(opt_state: Any, fresh: Any) -> Any:
    """The optimiser's state with the place in the schedule of a fresh one."""
    is_place = lambda node: isinstance(node, optax.ScaleByScheduleState)
    return jax.tree.map(lambda old, new: new if is_place(new) else old, opt_state, fresh, is_leaf=is_place)
