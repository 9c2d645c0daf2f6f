"""dQ out of the dK/dV kernel: what a block of keys owes to each tile of rows, added to float32 in global memory.

A step leaves the two warpgroups with ds for 64 keys each. Both put theirs in shared memory, meet, and multiply all 128
keys' ds with the keys, each for its own columns of dQ. TMA adds the product to what other blocks of keys have left,
in no fixed order, so that the last bits of dQ vary from run to run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic_gpu_common import TURN, WG, WGS, Static, named_barrier, tiled

COLUMNS = 64  # of dQ in one product: half of a head dim of 128, whose halves go to the two warpgroups
SLOTS = 2  # steps whose ds shared memory holds: meeting once a step, no warpgroup is two steps ahead


def scratch(s: Static, rows: int, dtype: Any) -> dict[str, Any]:
    """Shared memory of `RowGradient`, for steps of `rows` rows."""
    add = plgpu.SMEM(
        (WGS, rows, COLUMNS), jnp.float32, transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    )
    memory = {"ds_s": tiled((SLOTS, WGS, WG, rows), dtype), "dq_s": add}
    return memory | ({"met": plgpu.Barrier(num_arrivals=WGS)} if s.interpret else {})


def empty(s: Static, key_tiles: int) -> Float[Array, "B T H D"]:
    """What the kernel adds to. The interpreter has no adding copies: there each block of keys has rows of its own."""
    return jnp.zeros((s.batch * (key_tiles if s.interpret else 1), s.rows, s.heads, s.dim), jnp.float32)


def finished(dq: Float[Array, "N T H D"], s: Static, dtype: Any) -> Float[Array, "B T H D"]:
    if s.interpret:
        dq = dq.reshape(-1, s.batch, *dq.shape[1:]).sum(0)
    return (dq * s.scale).astype(dtype)


def row_sums(o: Float[Array, "B T H Dv"], do: Float[Array, "B T H Dv"], dlse: Float[Array, "B H N"]) -> Array:
    """delta = rowsum(do * o) - dlse, float32 [B,H,N]."""
    sums = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    return jnp.pad(sums, ((0, 0), (0, 0), (0, dlse.shape[-1] - sums.shape[-1]))) - dlse


def meet(s: Static, memory: dict[str, Any]) -> None:
    """Waits for the other compute warpgroup, whose writes to shared memory can then be read."""
    if s.interpret:
        plgpu.barrier_arrive(memory["met"])
        plgpu.barrier_wait(memory["met"])
    else:
        named_barrier("sync", jnp.int32(TURN))


@dataclasses.dataclass(frozen=True)
class RowGradient:
    """One warpgroup's part in what one step gives to dQ; both go through every step."""

    s: Static
    memory: dict[str, Any]
    dq: Any  # [B,T,H,D] float32 in global memory
    block: jax.Array  # of dq's leading axis
    wg: jax.Array
    head: jax.Array
    row: jax.Array
    step: jax.Array

    def share(self, ds: jax.Array, start: Callable[[], int]) -> None:
        """Adds this step's share of dQ; ds^T [64 keys, rows]. For `start`, see `share_kept`."""
        self.keep(ds)
        self.share_kept(start)

    def keep(self, ds: jax.Array) -> None:
        self.memory["ds_s"][self._slot, self.wg] = ds
        plgpu.commit_smem()

    def share_kept(self, start: Callable[[], int]) -> None:
        """Adds the product of the ds that both warpgroups keep and the keys.

        `start` starts another product, which runs while this one is stored, and returns how many that are.
        """
        meet(self.s, self.memory)
        if self.s.dim > COLUMNS:
            self._add(self._product(start), self.wg * COLUMNS)
        else:  # one product for two warpgroups, which take turns
            start()
            pl.when(lax.rem(self.step, jnp.int32(WGS)) == self.wg)(lambda: self._add(self._product(lambda: 0), 0))

    @property
    def _slot(self) -> jax.Array:
        return lax.rem(self.step, jnp.int32(SLOTS))

    def _product(self, start: Callable[[], int]) -> jax.Array:
        ds, k = self.memory["ds_s"].at[self._slot], self.memory["k_s"]

        def compute(acc) -> jax.Array:
            for n in range(WGS):  # in an order that varies: addresses that do not would be kept, and spill
                unit = lax.rem(self.step + n, jnp.int32(WGS))
                keys = k.at[unit, :, pl.ds(self.wg * COLUMNS, COLUMNS)] if self.s.dim > COLUMNS else k.at[unit]
                plgpu.wgmma(acc, ds.at[unit].transpose((1, 0)), keys)
            return plgpu.wgmma_accumulator_load(acc, wait_n=start())

        return pl.run_scoped(compute, plgpu.ACC((ds.shape[-1], COLUMNS), jnp.float32))

    def _add(self, product: jax.Array, column: Any) -> None:
        """The copy goes on while the warpgroup computes."""
        buffer, interpret = self.memory["dq_s"].at[self.wg], self.s.interpret
        to = self.dq.at[self.block, pl.ds(self.row, buffer.shape[0]), self.head, pl.ds(column, COLUMNS)]
        plgpu.wait_smem_to_gmem(0, wait_read_only=not interpret)
        buffer[...] = product + to[...] if interpret else product
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, to, reduction_op=None if interpret else "add")
