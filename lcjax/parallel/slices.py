"""TPU slices by name, and what one of their chips holds."""

from dataclasses import dataclass

import jax

from pallas_kernels import aot

GIB = 2**30
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}
"""High-bandwidth memory of a chip, by generation (Google Cloud TPU documentation)."""


@dataclass(frozen=True)
class Slice:
    """A slice such as 'v5p:4x4x4'. Where a chip shows as two devices, each has half of its memory."""

    name: str
    devices: tuple[jax.Device, ...]

    @property
    def chips(self) -> int:
        return len({tuple(device.coords) for device in self.devices})

    @property
    def hbm(self) -> int:
        """Bytes of one device."""
        return HBM_GIB[self.name.split(":")[0]] * GIB * self.chips // len(self.devices)


def named_slice(name: str) -> Slice:
    """The slice, for compiling only.

    Raises:
      ValueError: an unknown generation, or a shape that libtpu does not know for it.
    """
    generation = name.split(":")[0]
    if generation not in HBM_GIB or ":" not in name:
        raise ValueError(f"slice {name!r}: name a generation and its chips, such as {' or '.join(EXAMPLES)}")
    try:
        return Slice(name, aot.devices(name))
    except RuntimeError as error:
        raise ValueError(str(error)) from None


EXAMPLES = ("v5p:4x4x4", "v5e:4x4", "v6e:8x8", "v4:2x2x4", "tpu7x:2x2x2")
