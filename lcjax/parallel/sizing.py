"""What a program needs on a slice that is not there: compiled by libtpu's compiler, measured from the result."""

import re
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from lcjax.observe.hardware import peak_flops
from lcjax.parallel.collectives import Collective, collectives
from lcjax.parallel.slices import GIB, Slice
from pallas_kernels.op import target_platform


@dataclass(frozen=True)
class Work:
    """FLOPs of one call, all chips: `counted` from the jaxpr, `executed` with recomputation, `formula` of models."""

    counted: int
    executed: int
    formula: float

    @property
    def error(self) -> float:
        """Relative difference of the count from the formula."""
        return self.counted / self.formula - 1


@dataclass(frozen=True)
class Sizing:
    """One compiled program. Bytes are one device's; `peak` includes arguments, temporaries and new outputs.

    refusal: the compiler's word where the program does not fit, in which case nothing else of it is known.
    """

    name: str
    slice: Slice
    seconds: float
    work: Work | None = None
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    traffic: tuple[Collective, ...] = ()
    refusal: str = ""

    @property
    def fits(self) -> bool:
        return not self.refusal and self.peak <= self.slice.hbm

    def text(self) -> str:
        """The report, a line per finding."""
        lines = [f"{self.name}: compiled in {self.seconds:.0f} s"]
        if self.refusal:
            return "\n".join([*lines, f"  does not fit: {self.refusal}"])
        hbm = self.slice.hbm
        lines += [
            f"  HBM of a device       {hbm / GIB:8.2f} GiB",
            f"    arguments           {self.arguments / GIB:8.2f}",
            f"    temporaries         {self.temporaries / GIB:8.2f}",
            f"    peak                {self.peak / GIB:8.2f}  {self.peak / hbm:.0%}: "
            + ("fits" if self.fits else "DOES NOT FIT"),
        ]
        return "\n".join(lines + self._work_lines() + self._traffic_lines())

    def _work_lines(self) -> list[str]:
        if self.work is None:
            return []
        work, devices = self.work, len(self.slice.devices)
        rate = peak_flops(self.slice.devices[0])
        least = "" if rate is None else f", {work.counted / devices / rate:.3g} s at a chip's peak"
        return [
            f"  FLOPs                 {work.counted:.3e} ({work.error:+.1%} of the formula's){least}",
            f"    with recomputation  {work.executed:.3e}",
        ]

    def _traffic_lines(self) -> list[str]:
        lines = ["  collectives of a device, GiB a call (times run; largest one)"]
        for kind in sorted({c.kind for c in self.traffic}):
            ones = [c for c in self.traffic if c.kind == kind]
            largest = max(ones, key=lambda c: c.bytes)
            total, times = sum(c.bytes * c.times for c in ones), sum(c.times for c in ones)
            lines.append(f"    {kind:<20}{total / GIB:8.2f} ({times}; {largest.shape} {largest.bytes / GIB:.3f} GiB)")
        return lines if len(lines) > 1 else ["  no collectives"]


def described(mesh: Mesh, where: Slice) -> str:
    """The slice and the mesh's degrees above 1, as `v5p:4x4x4 (64 chips): fsdp=4 context=16`."""
    degrees = " ".join(f"{axis}={degree}" for axis, degree in mesh.shape.items() if degree > 1)
    devices = "" if where.chips == len(where.devices) else f", {len(where.devices)} devices"
    return f"{where.name} ({where.chips} chips{devices}): {degrees or 'one device'}"


def size(name: str, where: Slice, mesh: Mesh, jitted: Any, shapes: tuple[Any, ...], work: Work | None = None) -> Sizing:
    """Compile a function from `jax.jit` for shapes that carry shardings on a mesh of the slice's devices."""
    began = time.perf_counter()
    # Kernels ask the abstract mesh which generation they are lowered for.
    with target_platform("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jitted.trace(*shapes).lower(lowering_platforms=("tpu",))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not (told := re.search(r"Ran out of memory[^.]*\.[^.]*\.[^.\n]*", str(error))):
                raise
            return Sizing(name, where, time.perf_counter() - began, refusal=" ".join(told[0].split()))
    memory = compiled.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Sizing(
        name,
        where,
        time.perf_counter() - began,
        work,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh,
        traffic=tuple(collectives(compiled.as_text())),
    )
