"""Pieces that the Hopper kernels of gated linear attention share.

Every decay factor of a 64-token chunk is `exp` of a signed sum of log-decays, and every such sum is one product of a
constant 0/1 matrix with the chunk's `[64, Dk]` log-decays: exact in float32, on the tensor cores, with nothing subtracted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
WIDTH = 64  # of keys and values
FLOOR = -20.0  # a stronger log-decay counts as this one: e^-20 = 2e-9 is under the rounding of bfloat16 results
LEVELS = (8, 16, 32)  # block widths of the one-sided levels; below them, pairs inside a block of 8 rows


class Sums:
    """Rows of the constant matrices, by index: what each adds up."""

    INNER, L8, L16, L32, PREFIX, TOTAL = range(6)  # INNER is signed, from the middle of the row's block of 8


def sum_matrices() -> np.ndarray:
    """`[6, 64, 64]`; row i of a matrix marks the tokens whose log-decays its sum holds."""
    i, t = np.mgrid[:CHUNK, :CHUNK]
    out = np.zeros((6, CHUNK, CHUNK), np.float32)
    middle = i // 8 * 8 + 4
    out[Sums.INNER] = np.where((t >= middle) & (t <= i), 1, 0) - np.where((t < middle) & (t > i), 1, 0)
    for n, w in enumerate(LEVELS):
        right = i // w % 2 == 1
        border = np.where(right, i // w, i // w + 1) * w
        out[Sums.L8 + n] = np.where(right, (t >= border) & (t <= i), (t > i) & (t < border))
    out[Sums.PREFIX] = t <= i
    out[Sums.TOTAL] = 1
    return out


class Split(NamedTuple):
    """How the work is cut: a unit is one head over `chunks` consecutive chunks of a row, run by one warpgroup."""

    batch: int
    heads: int
    segments: int
    chunks: int  # per segment
    total_chunks: int

    @property
    def units(self) -> int:
        return self.batch * self.segments * self.heads

    def place(self, unit):
        """Batch row, head, first chunk and number of chunks of a unit; heads are neighbours, as they are in memory."""
        h = jax.lax.rem(unit, self.heads)
        rest = jax.lax.div(unit, self.heads)
        first = jax.lax.rem(rest, self.segments) * self.chunks
        count = jnp.minimum(self.chunks, self.total_chunks - first)
        return jax.lax.div(rest, self.segments), h, first, count


def choose_split(batch: int, heads: int, total_chunks: int, slots: int = 396) -> Split:
    """Enough segments to fill the chip about once (132 multiprocessors, 3 warpgroups each)."""
    segments = max(1, min(total_chunks, slots // (batch * heads)))
    chunks = -(-total_chunks // segments)
    return Split(batch, heads, -(-total_chunks // chunks), chunks, total_chunks)


def tile(*lead: int, rows: int = CHUNK, columns: int = WIDTH, dtype=jnp.bfloat16):
    """A shared-memory buffer that TMA and wgmma both read: 128-byte swizzle."""
    return plgpu.SMEM(
        (*lead, rows, columns), dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    )


def products(pairs, init=None, *, interpret: bool):
    """`init + sum of a @ b`, float32. An `a` is a ref or registers, a `b` a ref."""
    if interpret:
        out = 0.0 if init is None else init
        for a, b in pairs:
            out = out + jnp.dot(
                a[...].astype(jnp.float32), b[...].astype(jnp.float32), preferred_element_type=jnp.float32
            )
        return out

    def run(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...] if init is None else None

    if init is None:
        shape = (pairs[0][0].shape[0], pairs[0][1].shape[1])
        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
    return pl.run_state(run)(plgpu.ACC.init(init))


def read(ref):
    """A tile as float32 registers."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def zeros(rows: int = WIDTH, columns: int = WIDTH):
    return plgpu.layout_cast(jnp.full((rows, columns), 0, jnp.float32), plgpu.Layout.WGMMA)


def distance():
    """`(i, j, i xor j)` over a chunk's score matrix: the xor's highest bit names the level that the pair belongs to."""
    i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), d, layout=plgpu.Layout.WGMMA) for d in (0, 1))
    return i, j, i ^ j


def level_mask(level: int):
    """Pairs j <= i of level 0 (same block of 8) or 1, 2, 3 (first parted at width 8, 16, 32)."""
    i, j, apart = distance()
    low, high = (0, 8) if level == 0 else (4 << level, 8 << level)
    return (j <= i) & (apart >= low) & (apart < high)


def clamp_decay(g):
    """Puts the floor under a tile of log-decays, in place."""
    g[...] = jnp.maximum(read(g), FLOOR).astype(g.dtype)
    plgpu.commit_smem()
