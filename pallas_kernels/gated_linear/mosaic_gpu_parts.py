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
from jaxtyping import Array

CHUNK = 64
WIDTH = 64  # of keys and values
FLOOR = -16.0  # a stronger log-decay counts as this one: e^-16 = 1e-7 is far under the rounding of bfloat16
RANGE = 60.0  # of the exponents of one factorisation of a chunk
LEVELS = (8, 16, 32)  # block widths of the one-sided levels; below them, pairs inside a block of 8 rows


def _from_middle(w):
    """Signed, from the middle of the row's block of w tokens to the row."""
    i, t = np.mgrid[:CHUNK, :CHUNK]
    middle = i // w * w + w // 2
    return np.where((t >= middle) & (t <= i), 1, 0) - np.where((t < middle) & (t > i), 1, 0)


def _to_border(w):
    """Between the row and the border of the pair of blocks of w tokens that it lies in."""
    i, t = np.mgrid[:CHUNK, :CHUNK]
    right = i // w % 2 == 1
    border = np.where(right, i // w, i // w + 1) * w
    return np.where(right, (t >= border) & (t <= i), (t > i) & (t < border))


def _after(n):
    """From n tokens after the row to the chunk's end."""
    return np.triu(np.ones((CHUNK, CHUNK)), n)


def _marks(*halves):
    """Row 0 marks these halves of the chunk."""
    row, t = np.mgrid[:CHUNK, :CHUNK]
    return np.isin(t // (CHUNK // 2), halves) & (row == 0)


class Sums:
    """Constant `[n, 64, 64]` matrices and the names of their rows.

    Row i of a product with a chunk's log-decays is the sum that the function's docstring says. FIRST, SECOND and ALL
    are for `over_tokens`.
    """

    PAIRS = np.stack([_from_middle(CHUNK), _from_middle(8), *map(_to_border, LEVELS), _after(0)])
    MIDDLE, INNER, L8, L16, L32, LATER = range(6)
    STATES = np.stack([_after(1), _marks(0), _marks(1), _marks(0, 1)])
    SUFFIX, FIRST, SECOND, ALL = range(4)
    OUTPUTS = np.stack([*PAIRS[:LATER], STATES[ALL]])
    OUTPUTS_ALL = LATER


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
        return Place(jax.lax.div(rest, self.segments), head, key_tile, value_tile, first, count, self.heads)


class Place(NamedTuple):
    """Where a unit works; neighbouring units take neighbouring tiles and heads, as memory does."""

    row: jax.Array
    head: jax.Array
    key_tile: jax.Array
    value_tile: jax.Array
    first: jax.Array  # chunk
    count: jax.Array  # of chunks
    heads: int

    def tokens(self, chunk, tile_index, heads: int | None = None):
        """Index of a chunk's `[64, 64]` tile in `[B, T, H, features]`; in an array of fewer heads, of the group's."""
        head = jax.lax.div(self.head, self.heads // (heads or self.heads))
        return (self.row, pl.ds(chunk * CHUNK, CHUNK), head, pl.ds(tile_index * WIDTH, WIDTH))

    def sums(self, chunk):
        """Index of a chunk's rows of `Halves.sums` (or an array of more rows)."""
        return (self.row, chunk, self.head, slice(None), pl.ds(self.key_tile * WIDTH, WIDTH))

    def keys(self, chunk):
        """Index of a chunk's row of `[B, N, H, Dk]`."""
        return (self.row, chunk, self.head, pl.ds(self.key_tile * WIDTH, WIDTH))

    def weights(self, chunk):
        """Index of a chunk's sums of weights in `[key tiles, B, H, T]`."""
        return (self.key_tile, self.row, self.head, pl.ds(chunk * CHUNK, CHUNK))

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


def products(terms, init=None, *, interpret: bool):
    """`init + sum of a @ b`, float32. An `a` is a ref or registers, a `b` a ref."""
    if interpret:
        out = 0.0 if init is None else init
        for a, b in terms:
            out = out + jnp.dot(
                a[...].astype(jnp.float32), b[...].astype(jnp.float32), preferred_element_type=jnp.float32
            )
        return out

    def run(acc):
        for a, b in terms:
            plgpu.wgmma(acc, a, b)
        return acc[...] if init is None else None

    if init is None:
        shape = (terms[0][0].shape[0], terms[0][1].shape[1])
        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
    return pl.run_state(run)(plgpu.ACC.init(init))


def bf16(x):
    return x.astype(jnp.bfloat16)


def read(ref):
    """A tile as float32 registers."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def zeros(rows: int = WIDTH, columns: int = WIDTH):
    return plgpu.layout_cast(jnp.full((rows, columns), 0, jnp.float32), plgpu.Layout.WGMMA)


def over_tokens(x, marks, mm):
    """Each channel's sum over the marked tokens of a `[tokens, channels]` tile: a product eight columns wide."""
    return mm([(x.transpose((1, 0)), marks.at[pl.ds(0, 8)].transpose((1, 0)))]).sum(1)


def vector():
    """`[64]` zeros, one to each row of a tile."""
    return plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def row_vector(ref):
    """A `[64]` vector of shared memory in registers, one entry to each row of a tile."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def causal(level=None):
    """Pairs j <= i of a chunk; of level 0 (same block of 8) or 1, 2, 3 (first parted at width 8, 16, 32) alone."""
    i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), d, layout=plgpu.Layout.WGMMA) for d in (0, 1))
    if level is None:
        return j <= i
    return (j <= i) & ((i ^ j) >= ((4 << level) & ~7)) & ((i ^ j) < (8 << level))


def clamp_decay(g):
    """Puts the floor under a tile of log-decays, in place."""
    g[...] = jnp.maximum(read(g), FLOOR).astype(g.dtype)
    plgpu.commit_smem()


def per_row(vector, at=None):
    """A `[64]` vector of shared memory with entry i along row i of a tile; `at` maps it before it is spread out."""
    x = row_vector(vector)
    return jax.lax.broadcast_in_dim(x if at is None else at(x), (CHUNK, WIDTH), (0,))


def per_column(vector, at=None):
    """The same along column i."""
    x = plgpu.load(vector, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return jax.lax.broadcast_in_dim(x if at is None else at(x), (CHUNK, WIDTH), (1,))


class Halves(NamedTuple):
    """Log-decays summed over the halves of each chunk, and where they are too strong for one factorisation.

    Pairs (i, j) of a chunk decay by `exp(x_i - x_j)`, x being the signed sum from the chunk's middle. While neither
    half sums to less than `-RANGE`, `q exp(x)` and `k exp(-x)` stay in range and one product gives all scores; a mean
    log-decay above -1.9 is enough. Units with a stronger chunk go level by level.
    """

    sums: jax.Array  # [B, N, H, 2, Dk] float32, floored
    floored: jax.Array  # [B, H, Dk / 64] bool: some log-decay is under the floor


def by_segment(x, split: Split, fill):
    """`[B, N, ...]` to `[B, segments, chunks, ...]`."""
    missing = split.segments * split.chunks - split.total_chunks
    x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
    return x.reshape(x.shape[0], split.segments, split.chunks, *x.shape[2:])


def _to_unit_rows(x, split: Split):
    """`[B, segments, H, Dk]` to `[units, 64]`, alike for all value tiles."""
    x = x.reshape(split.batch, split.segments, split.heads, split.key_tiles, 1, WIDTH)
    return jnp.broadcast_to(x, (*x.shape[:4], split.value_tiles, WIDTH)).reshape(split.units, WIDTH)


def strong_units(found: Halves, split: Split):
    """1 for each unit that has to go level by level."""
    strong = by_segment((found.sums < -RANGE).any(3), split, False).any(2)
    strong |= jnp.repeat(found.floored, WIDTH, axis=-1)[:, None]
    return _to_unit_rows(strong, split).any(1).astype(jnp.int32)


def unit_decays(found: Halves, split: Split):
    """Decay factors over each unit's tokens, `[units, 64]`."""
    return _to_unit_rows(jnp.exp(by_segment(found.sums.sum(3), split, 0).sum(2)), split)


def add_tiles(x: Array) -> Array:
    return x[0] if len(x) == 1 else x.astype(jnp.float32).sum(0).astype(x.dtype)


def add_up(x: Array, heads: int) -> Array:
    """Over tiles and the query heads of each group: `[tiles, B, T, H, features]` to `[B, T, heads, features]`."""
    if heads == x.shape[3]:
        return add_tiles(x)
    groups = x.reshape(*x.shape[:3], heads, -1, x.shape[4])
    return groups.astype(jnp.float32).sum((0, 4)).astype(x.dtype)
