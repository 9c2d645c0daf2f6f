"""TPU slices by name, and what one of their chips holds."""

import re
from dataclasses import dataclass

import jax

from pallas_kernels import aot

GIB = 2**30
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}
"""High-bandwidth memory of a chip, by generation (Google Cloud TPU documentation)."""


@dataclass(frozen=True)
class Slice:
    """A slice such as 'v5p:4x4x4', or two as 'v5p:4x4x4*2'. A chip that shows as two devices halves its memory."""

    name: str
    devices: tuple[jax.Device, ...]

    @property
    def chips(self) -> int:
        return len({(getattr(device, "slice_index", 0), *device.coords) for device in self.devices})

    @property
    def hbm(self) -> int:
        """Bytes of one device."""
        return HBM_GIB[self.name.split(":")[0]] * GIB * self.chips // len(self.devices)


def named_slice(name: str) -> Slice:
    """The slice, or several of them, for compiling only.

    Raises:
      ValueError: an unknown generation, or a shape that libtpu does not know for it.
    """
    parts = re.fullmatch(r"(\w+):\d+(x\d+)+(\*[1-9]\d*)?", name)
    if parts is None or parts[1] not in HBM_GIB:
        raise ValueError(f"slice {name!r}: name a generation and its chips, such as {' or '.join(EXAMPLES)}")
    topology, _, count = name.partition("*")
    try:
        return Slice(name, aot.devices(topology, int(count or 1)))
    except RuntimeError as error:
        raise ValueError(str(error)) from None


EXAMPLES = ("v5p:4x4x4", "v5e:4x4", "v6e:8x8", "v4:2x2x4", "tpu7x:2x2x2", "v5p:4x4x4*2 (two slices)")
