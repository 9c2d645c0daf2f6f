"""The one mesh builder."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(
    data: int = 1, fsdp: int = -1, context: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with axes data, fsdp, context, tensor (auto sharding) over all devices; one degree may be -1 (inferred).

    Raises ValueError when the degrees don't multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    degrees = dict(zip(AXES, (data, fsdp, context, tensor), strict=True))
    for name, degree in degrees.items():
        if degree < 1 and degree != -1:
            raise ValueError(f"mesh axis {name} is {degree}; use a positive degree, or -1 to infer it")
    free = [name for name, degree in degrees.items() if degree == -1]
    if len(free) > 1:
        raise ValueError(f"mesh axes {' and '.join(free)} are both -1; at most one can be inferred")
    fixed = math.prod(degree for degree in degrees.values() if degree != -1)
    if free and len(devices) % fixed == 0:
        degrees[free[0]] = len(devices) // fixed
    if math.prod(degrees.values()) != len(devices):
        asked = ", ".join(f"{name}={degree}" for name, degree in degrees.items())
        raise ValueError(f"mesh {asked} does not fit {len(devices)} devices: the degrees must multiply to that number")
    shape = tuple(degrees.values())
    grid = mesh_utils.create_device_mesh(shape, devices=devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
