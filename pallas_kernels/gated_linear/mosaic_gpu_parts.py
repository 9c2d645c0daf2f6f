"""Pieces that the Hopper kernels of gated linear attention share.

Every decay factor of a 64-token chunk is `exp` of a signed sum of log-decays, and every such sum is one product of a
constant matrix of 0 and 1 with the chunk's `[64, Dk]` log-decays, on the tensor cores, accumulated in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
WIDTH = 64  # of keys and values
FLOOR = -16.0  # a stronger log-decay counts as this one: e^-16 = 1e-7 is far under the rounding of bfloat16
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
    """How the work is cut. A unit, run by one warpgroup, is a 64 x 64 tile of a head's state over `chunks` chunks.

    Tiles are independent: outputs and value gradients add up over key tiles, the other gradients over value tiles.
    """

    batch: int
    heads: int
    key_tiles: int
    value_tiles: int
    segments: int
    chunks: int  # per segment
    total_chunks: int

    @property
    def lanes(self) -> int:
        return self.heads * self.key_tiles * self.value_tiles

    @property
    def units(self) -> int:
        return self.batch * self.segments * self.lanes

    def place(self, unit) -> "Place":
        lane, rest = jax.lax.rem(unit, self.lanes), jax.lax.div(unit, self.lanes)
        value_tile, lane = jax.lax.rem(lane, self.value_tiles), jax.lax.div(lane, self.value_tiles)
        key_tile, head = jax.lax.rem(lane, self.key_tiles), jax.lax.div(lane, self.key_tiles)
        first = jax.lax.rem(rest, self.segments) * self.chunks
        count = jnp.minimum(self.chunks, self.total_chunks - first)
        return Place(jax.lax.div(rest, self.segments), head, key_tile, value_tile, first, count)


class Place(NamedTuple):
    """Where a unit works; neighbouring units take neighbouring tiles and heads, as memory does."""

    row: jax.Array
    head: jax.Array
    key_tile: jax.Array
    value_tile: jax.Array
    first: jax.Array  # chunk
    count: jax.Array  # of chunks

    def tokens(self, chunk, tile_index):
        """Index of a chunk's `[64, 64]` tile in `[B, T, H, features]`."""
        return (self.row, pl.ds(chunk * CHUNK, CHUNK), self.head, pl.ds(tile_index * WIDTH, WIDTH))

    def state(self, chunk):
        """Index of a chunk's tile in `[B, N, H, Dk, Dv]`."""
        return (self.row, chunk, self.head, pl.ds(self.key_tile * WIDTH, WIDTH), pl.ds(self.value_tile * WIDTH, WIDTH))


def choose_split(batch: int, heads: int, tokens: int, widths: tuple[int, int], slots: int) -> Split:
    """Enough segments to fill `slots` warpgroups about once."""
    tiles = tuple(w // WIDTH for w in widths)
    total = tokens // CHUNK
    segments = max(1, min(total, slots // (batch * heads * tiles[0] * tiles[1])))
    chunks = -(-total // segments)
    return Split(batch, heads, *tiles, -(-total // chunks), chunks, total)


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
