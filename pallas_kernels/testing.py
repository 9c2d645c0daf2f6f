"""Running TPU kernels on a CPU, with memory poisoned and races looked for.

with testing.interpret_tpu(races=True):
    o = block_sparse_attention(q, k, v, mask, implementation="mosaic_tpu")
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.op import interpret


class RaceFound(AssertionError):
    """Two accesses to one buffer were not ordered."""


@contextlib.contextmanager
def interpret_tpu(*, races: bool = False, eager_copies: bool = False) -> Generator[None]:
    """Interpret TPU kernels: unwritten memory is NaN, reads out of bounds raise, copies land when waited for.

    `eager_copies` lets copies land at once: a kernel must be right under both. With `races`, leaving the context
    raises RaceFound if two unordered accesses met.
    """
    parameters = pltpu.InterpretParams(
        detect_races=races,
        out_of_bounds_reads="raise",
        uninitialized_memory="nan",
        dma_execution_mode="eager" if eager_copies else "on_wait",
    )
    try:
        with interpret(parameters):
            yield
        found = races and interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    if found:
        raise RaceFound("the interpreter found unordered accesses to one buffer; its report is on standard output")
