"""Writing the gates that DuoAttention learned into a plan file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax import nnx

from lcjax.eval.measure import Table
from lcjax.methods.duo import Gates
from lcjax.models.weights import dotted
from lcjax.serve.source import Loaded


@dataclass(frozen=True)
class DuoPlan:
    """plan.json in the output folder, from the gates of a run that was trained with @DuoGates()."""

    name: str = "duo_plan"

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """{name: {layer: mean gate}}."""
        gates = learned_gates(model)
        plan = Gates.made(model.spec, model.params, gates)
        plan.save(output / "plan.json")
        print(f"{self.name}: {output / 'plan.json'}", flush=True)
        return {self.name: {str(layer): float(np.mean(mine)) for layer, mine in plan.gates.items()}}


def learned_gates(model: Loaded) -> dict[int, np.ndarray]:
    """The gates `[K]` of each layer that has them, within [0, 1]."""
    held = {dotted(path): variable for path, variable in nnx.to_flat_state(model.params) if path[-1] == "gates"}
    if not held:
        raise ValueError(f"duo_plan: {model.source} has no gates; train some with configs/run/duo_smollm2.gin")
    found = {int(path.split(".")[1]): np.asarray(gates[...], np.float64) for path, gates in held.items()}
    return {layer: np.clip(found[layer], 0, 1) for layer in sorted(found)}
