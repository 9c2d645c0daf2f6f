"""Which rows and columns of a global batch a process has to read."""

import itertools
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh


@dataclass(frozen=True)
class Part:
    """A process reads part `index` of `count` parts of the rows; of each it holds the tokens `columns`.

    Processes that split the same rows over the mesh's context axis read the same part.
    """

    index: int
    count: int
    columns: slice


def part_of_batch(mesh: Mesh, batch: int, length: int, process: int | None = None) -> Part:
    """What `process` (default: this one) reads of a `[batch, length]` array that lies over the mesh (`batch_sharding`).

    Raises ValueError when the mesh deals rows out to processes unevenly.
    """
    process = jax.process_index() if process is None else process
    _, fsdp, context, _ = mesh.devices.shape
    tall, wide = batch // (mesh.devices.shape[0] * fsdp), length // context
    rows: dict[int, set[tuple[int, int]]] = {}
    columns: dict[int, set[tuple[int, int]]] = {}
    for (outer, inner, shard, _), device in np.ndenumerate(mesh.devices):
        first = (outer * fsdp + inner) * tall
        rows.setdefault(device.process_index, set()).add((first, first + tall))
        columns.setdefault(device.process_index, set()).add((shard * wide, (shard + 1) * wide))
    groups = sorted({tuple(sorted(found)) for found in rows.values()})
    held = sorted(span for group in groups for span in group)
    own = sorted(columns[process])
    together = all(a[1] == b[0] for a, b in itertools.pairwise(own))
    if len(set(held)) < len(held) or len({len(group) for group in groups}) > 1 or not together:
        degrees = ", ".join(f"{axis}={degree}" for axis, degree in mesh.shape.items())
        raise ValueError(
            f"mesh {degrees} deals rows out to {len(rows)} processes unevenly: make data x fsdp a multiple or a "
            "divisor of the number of processes"
        )
    return Part(groups.index(tuple(sorted(rows[process]))), len(groups), slice(own[0][0], own[-1][1]))
