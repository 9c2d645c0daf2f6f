"""The one mesh builder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "context", "tensor")


@dataclass(frozen=True)
class MeshSpec:
    """Degrees of the mesh axes; -1 takes the devices that are left.

    dcn_*: the factor of that degree which spans several slices. slice: the TPU slice that the degrees are meant for,
    such as 'v5p:4x4x4', which `--compile_for` takes if it names none.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    dcn_data: int = 1
    dcn_fsdp: int = 1
    dcn_context: int = 1
    dcn_tensor: int = 1
    slice: str | None = None

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over all devices of the run, or those given."""
        across = {axis: getattr(self, f"dcn_{axis}") for axis in AXES}
        degrees = {axis: getattr(self, axis) for axis in AXES}
        return make_mesh(**degrees, across_slices=across, devices=devices)


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    context: int = 1,
    tensor: int = 1,
    *,
    across_slices: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with axes data, fsdp, context, tensor (auto sharding) over all devices; one degree may be -1 (inferred).

    across_slices: by axis, the factor of its degree that spans TPU slices (or, where devices know no slices, processes)
    and so uses the slow network between them.

    Raises ValueError when the degrees don't multiply to the number of devices, or the factors to that of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    degrees = _inferred(dict(zip(AXES, (data, fsdp, context, tensor), strict=True)), len(devices))
    outer = tuple((across_slices or {}).get(axis, 1) for axis in AXES)
    shape = tuple(degrees.values())
    if math.prod(outer) == 1:
        grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    else:
        grid = _hybrid(degrees, outer, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _inferred(degrees: dict[str, int], count: int) -> dict[str, int]:
    for name, degree in degrees.items():
        if degree < 1 and degree != -1:
            raise ValueError(f"mesh axis {name} is {degree}; use a positive degree, or -1 to infer it")
    free = [name for name, degree in degrees.items() if degree == -1]
    if len(free) > 1:
        raise ValueError(f"mesh axes {' and '.join(free)} are both -1; at most one can be inferred")
    fixed = math.prod(degree for degree in degrees.values() if degree != -1)
    if free and count % fixed == 0:
        degrees[free[0]] = count // fixed
    if math.prod(degrees.values()) != count:
        asked = ", ".join(f"{name}={degree}" for name, degree in degrees.items())
        raise ValueError(f"mesh {asked} does not fit {count} devices: the degrees must multiply to that number")
    return degrees


def _hybrid(degrees: dict[str, int], outer: tuple[int, ...], devices: list[jax.Device]):
    """Devices by position, slices side by side along the axes that `outer` splits."""
    for (name, degree), factor in zip(degrees.items(), outer, strict=True):
        if factor < 1 or degree % factor:
            raise ValueError(f"dcn_{name}={factor} does not divide the mesh axis {name}={degree}")
    sliced = hasattr(devices[0], "slice_index")
    count = len({device.slice_index if sliced else device.process_index for device in devices})
    if math.prod(outer) != count:
        asked = ", ".join(f"dcn_{axis}={factor}" for axis, factor in zip(AXES, outer, strict=True) if factor > 1)
        raise ValueError(f"{asked} does not fit {count} {'slices' if sliced else 'processes'}: multiply to that number")
    inner = tuple(degree // factor for degree, factor in zip(degrees.values(), outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, process_is_granule=not sliced)
