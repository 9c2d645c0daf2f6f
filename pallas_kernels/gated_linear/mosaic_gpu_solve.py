"""The delta rule on Hopper: kernels that find the values it writes, and their cotangents.

A token adds `k^T w` to the state, with `w = beta m` and `m = v - k S` what the state before it lacks. Once w is known,
the rest is gated linear attention. In a chunk of 64 tokens `m = (I + N)^-1 (V - K~ S)`: N are the decayed products of a
key with the earlier ones, each times the earlier one's beta, and K~ the keys decayed from the chunk's entry (WY form,
arXiv 2406.06484, 2412.06464). So m is `U + W S`, with U and W known before the state: one kernel finds them for all
chunks at once, another goes through the chunks of a head, 64 columns of the values to a warpgroup, with the state in
registers. The cotangents of w follow the same recurrence backwards, from the transposed inverse.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.gated_linear import mosaic_gpu_parts as parts
from pallas_kernels.gated_linear.mosaic_gpu_parts import CHUNK, WIDTH, bf16, products, read, tile

Ref = Any  # in global or shared memory


class Rows(NamedTuple):
    """A chunk's numbers per token, `[4, 64]` in shared memory: log-decays summed from its entry to the token, and from
    there to its end; beta; the first again, for columns (the compiler makes one load of two of one address, and no
    layout serves both)."""

    ref: Ref

    @classmethod
    def of(cls, g: Float[Array, "B T Hg"], beta: Float[Array, "B T H"]) -> Array:
        """`[B, N, H, 4, 64]` float32 in global memory."""
        b, t, h = beta.shape
        by_chunk = lambda x: jnp.broadcast_to(x, beta.shape).reshape(b, t // CHUNK, CHUNK, h).swapaxes(2, 3)
        sums = jnp.cumsum(by_chunk(jnp.maximum(g.astype(jnp.float32), parts.FLOOR)), axis=-1)
        return jnp.stack([sums, sums[..., -1:] - sums, by_chunk(beta), sums], axis=3)

    @classmethod
    def buffer(cls, *lead: int):
        return plgpu.SMEM((*lead, 4, CHUNK), jnp.float32)

    def prefix(self):
        return jnp.exp(parts.row_vector(self.ref.at[0]))

    def suffix(self):
        return jnp.exp(parts.row_vector(self.ref.at[1]))

    def beta(self):
        return parts.row_vector(self.ref.at[2])

    def total(self):
        """The chunk's decay, 64 times."""
        return jnp.exp(parts.row_vector(self.ref.at[0]) + parts.row_vector(self.ref.at[1]))

    def prefix_of_columns(self):
        return parts.per_column(self.ref.at[3], jnp.exp)

    def pairs(self):
        """The decay from token j to token i, for j <= i."""
        gap = parts.per_row(self.ref.at[0]) - parts.per_column(self.ref.at[3])
        return jnp.exp(jnp.minimum(gap, 0.0))


def along_rows(x):
    """A `[64]` vector with entry i along row i of a tile."""
    return jax.lax.broadcast_in_dim(x, (CHUNK, WIDTH), (0,))


def _places():
    """Row and column of each element of a tile."""
    i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), d, layout=plgpu.Layout.WGMMA) for d in (0, 1))
    return i, j


def unit_lower_inverse(n, tiles: tuple[Ref, Ref], mm):
    """`(I + n)^-1` for strictly lower n, by halving: as stable as forward substitution, and all products in bfloat16.

    A Newton step whose residual keeps 16 bits then squares their error. `tiles` are work space.
    """
    first, second = tiles
    i, j = _places()
    apart, one = i ^ j, jnp.where(i == j, 1.0, 0.0)

    def level(n_level, inverse):  # which holds the blocks of w on the diagonal; `apart` of w to 2w is between two
        w = 1 << n_level
        first[...] = bf16(jnp.where((apart >= w) & (apart < 2 * w), n, 0.0))
        second[...] = bf16(inverse)
        plgpu.commit_smem()
        return inverse - mm([(bf16(mm([(bf16(inverse), first)])), second)])

    inverse = jax.lax.fori_loop(1, CHUNK.bit_length() - 1, level, one - jnp.where(apart == 1, n, 0.0))
    high, n_high = bf16(inverse), bf16(n)
    first[...], second[...] = high, bf16(inverse - high.astype(jnp.float32))
    plgpu.commit_smem()
    rest = one - inverse - mm([(n_high, first), (bf16(n - n_high.astype(jnp.float32)), first), (n_high, second)])
    first[...] = bf16(rest)
    plgpu.commit_smem()
    return inverse + mm([(high, first)])


class Place(NamedTuple):
    """A chunk of a head."""

    row: Any
    chunk: Any
    head: Any

    def tokens(self, n):
        """Index of its tile n in `[B, T, H, features]`."""
        return (self.row, pl.ds(self.chunk * CHUNK, CHUNK), self.head, pl.ds(n * WIDTH, WIDTH))

    @property
    def rows(self):
        """Index of its `Rows`."""
        return (self.row, self.chunk, self.head)


def _kernel(body, units: int, out_type, scratch, signals: int, interpret):
    """A kernel of one warpgroup to each of `units`: `body(unit, inputs, outputs, scratch, barriers)`."""

    def entry(*refs):
        *refs, barriers = refs
        ins = len(refs) - len(out_type) - len(scratch)
        outs = ins + len(out_type)
        body(jax.lax.axis_index("unit"), refs[:ins], refs[ins:outs], refs[outs:], barriers)

    return plgpu.kernel(
        entry,
        out_type=out_type,
        grid=(units,),
        grid_names=("unit",),
        scratch_types=[*scratch, plgpu.Barrier(num_barriers=signals)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or False,
    )


def _by_chunk(body, inputs, widths: tuple[int, int], interpret) -> list[Array]:
    """Runs `body` on every chunk of every head: tiles of `inputs`, the last of which are `Rows`, come to its scratch,
    and two tiles for work. Outputs have these widths."""
    arrays = inputs[:-1]
    b, t, h, _ = arrays[0].shape
    tiles = [x.shape[-1] // WIDTH for x in arrays]
    types = [jax.ShapeDtypeStruct((b, t, h, width), jnp.bfloat16) for width in widths]
    mm = functools.partial(products, interpret=bool(interpret))

    def entry(unit, ins, outs, scratch, barriers):
        at, (*loaded, rows, work) = _place(unit, (b, t, h)), scratch
        pairs = [
            (x.at[at.tokens(n)], y.at[n]) for x, y, count in zip(ins, loaded, tiles, strict=False) for n in range(count)
        ]
        _load([*pairs, (ins[-1].at[at.rows], rows)], barriers)
        for n in range(len(pairs) + 1):
            plgpu.barrier_wait(barriers.at[n])
        body(at, loaded, Rows(rows), (work.at[0], work.at[1]), outs, mm)
        plgpu.wait_smem_to_gmem(0)

    scratch = [*map(tile, tiles), Rows.buffer(), tile(2)]
    return _kernel(entry, b * (t // CHUNK) * h, types, scratch, sum(tiles) + 1, interpret)(*inputs)


def _load(pairs, barriers, first=0) -> None:
    for n, (gmem, smem) in enumerate(pairs):
        plgpu.copy_gmem_to_smem(gmem, smem, barriers.at[first + n])


def _write_out(pairs) -> None:
    """Values to tiles of shared memory, and on to global memory."""
    for value, smem, _ in pairs:
        smem[...] = bf16(value)
    plgpu.commit_smem()
    for _, smem, gmem in pairs:
        plgpu.copy_smem_to_gmem(smem, gmem)


def _decayed_keys(k, rows: Rows, mm):
    """Products of each key with the earlier ones, decayed."""
    i, j = _places()
    found = mm([(k.at[n], k.at[n].transpose((1, 0))) for n in range(k.shape[0])])
    return jnp.where(j < i, found * rows.pairs(), 0.0)


def _place(unit, shape: tuple[int, int, int]) -> Place:
    """Of a unit among the chunks and heads of `[B, T, H]`, heads first, as memory has them."""
    _, t, heads = shape
    head, rest = jax.lax.rem(unit, heads), jax.lax.div(unit, heads)
    return Place(jax.lax.div(rest, t // CHUNK), jax.lax.rem(rest, t // CHUNK), head)


def _write_products(left: Ref | Array, tiles: Ref, out: Ref, at: Place, mm) -> None:
    """left times each tile, in its place and on to global memory."""
    for n in range(tiles.shape[0]):
        _write_out([(mm([(left, tiles.at[n])]), tiles.at[n], out.at[at.tokens(n)])])


def _missing_body(at: Place, loaded, rows: Rows, work, outs, mm):
    k, v = loaded
    strength = parts.per_column(rows.ref.at[2])
    solve = unit_lower_inverse(_decayed_keys(k, rows, mm) * strength, work, mm)
    erase = bf16(-solve * rows.prefix_of_columns())
    _write_products(bf16(solve), v, outs[0], at, mm)
    _write_products(erase, k, outs[1], at, mm)


@functools.partial(jax.jit, static_argnames="interpret")  # the layers of a model share one lowering
def missing(k, v, rows, *, interpret=None) -> list[Array]:
    """U, like v, and W, like k: a state S that enters a chunk lacks `U + W S`."""
    return _by_chunk(_missing_body, (k, v, rows), (v.shape[-1], k.shape[-1]), interpret)


def _owed_body(at: Place, loaded, rows: Rows, work, outs, mm):
    (q, k, do), (first, second) = loaded, work
    solve = unit_lower_inverse(_decayed_keys(k, rows, mm) * along_rows(rows.beta()), work, mm)
    scores = mm([(q.at[n], k.at[n].transpose((1, 0))) for n in range(k.shape[0])])
    scores = bf16(jnp.where(parts.causal(), scores * rows.pairs(), 0.0))
    first[...], second[...] = bf16(solve), bf16(solve * along_rows(rows.suffix()))
    plgpu.commit_smem()
    read_later = bf16(mm([(scores, first)]))
    first[...] = read_later
    plgpu.commit_smem()
    _write_products(first.transpose((1, 0)), do, outs[0], at, mm)
    _write_products(second.transpose((1, 0)), k, outs[1], at, mm)


@functools.partial(jax.jit, static_argnames="interpret")  # the layers of a model share one lowering
def owed(q, k, do, rows, *, interpret=None) -> list[Array]:
    """U, like do, and W, like k: what a chunk writes has the cotangent `U + W dS`, dS being that of the state after."""
    return _by_chunk(_owed_body, (q, k, do, rows), (do.shape[-1], k.shape[-1]), interpret)


class _Tiles(NamedTuple):
    """Shared memory of the recurrence: what is loaded has room for two chunks, and a buffer for each tile of keys."""

    u: Ref
    w: list[Ref]
    k: list[Ref]
    rows: Ref
    q: list[Ref]  # forward empty
    do: Ref  # forward None
    state: list[Ref]
    x: Ref
    strong: Ref  # beta x
    added: Ref

    @classmethod
    def scratch(cls, key_tiles: int, backwards: bool) -> "_Tiles":
        two = [tile(2)] * key_tiles
        late = (two, tile(2)) if backwards else ([], None)
        return cls(tile(2), two, two, Rows.buffer(2), *late, [tile()] * key_tiles, tile(), tile(), tile())

    def loads(self, arrays, at: Place, column, slot):
        """What to copy where for a chunk."""
        u, w, k, rows, *late = arrays
        pairs = [(u.at[at.tokens(column)], self.u), (rows.at[at.rows], self.rows)]
        pairs += [(late[1].at[at.tokens(column)], self.do)] if late else []
        for gmem, buffers in zip((w, k, *late[:1]), (self.w, self.k, self.q), strict=False):
            pairs += [(gmem.at[at.tokens(n)], smem) for n, smem in enumerate(buffers)]
        return [(gmem, smem.at[slot]) for gmem, smem in pairs]


def _through_body(unit, arrays, start, outs, tiles: _Tiles, barriers, *, interpret: bool):
    """Columns of a head's state through its chunks: forward, or backwards where there are q and do."""
    _, t, heads, width = arrays[0].shape
    value_tiles, chunks, backwards = width // WIDTH, t // CHUNK, bool(tiles.q)
    mm, signals = functools.partial(products, interpret=interpret), barriers.shape[0] // 2
    column, rest = jax.lax.rem(unit, value_tiles), jax.lax.div(unit, value_tiles)
    row, head = jax.lax.div(rest, heads), jax.lax.rem(rest, heads)

    def load(i, slot):
        at = Place(row, chunks - 1 - i if backwards else i, head)
        _load(tiles.loads(arrays, at, column, slot), barriers, slot * signals)
        return at.tokens(column)

    load(jnp.int32(0), jnp.int32(0))

    def chunk(i, states):
        slot = jax.lax.rem(i, 2)
        for n in range(signals):
            plgpu.barrier_wait(barriers.at[slot * signals + n])
        rows, at = Rows(tiles.rows.at[slot]), Place(row, chunks - 1 - i if backwards else i, head).tokens(column)
        for smem, state in zip(tiles.state, states, strict=True):
            smem[...] = bf16(state)
        if backwards:
            tiles.do[slot] = bf16(read(tiles.do.at[slot]) * along_rows(rows.prefix()))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()

        @pl.when(i + 1 < chunks)
        def _():
            load(i + 1, 1 - slot)

        x = mm([(w.at[slot], s) for w, s in zip(tiles.w, tiles.state, strict=True)], read(tiles.u.at[slot]))
        strong = x * along_rows(rows.beta())
        tiles.added[...] = bf16(strong * along_rows(-rows.prefix() if backwards else rows.suffix()))
        _write_out([(x, tiles.x, outs[0].at[at]), (strong, tiles.strong, outs[1].at[at])])
        total, after = along_rows(rows.total()), []
        for n, state in enumerate(states):
            terms = [(tiles.k[n].at[slot].transpose((1, 0)), tiles.added)]
            terms += [(tiles.q[n].at[slot].transpose((1, 0)), tiles.do.at[slot])] if backwards else []
            after.append(mm(terms, state * total))
        return tuple(after)

    def first(n):
        at = (row, head, pl.ds(n * WIDTH, WIDTH), pl.ds(column * WIDTH, WIDTH))
        return plgpu.load(start.at[at], layout=plgpu.Layout.WGMMA, optimized=False)

    jax.lax.fori_loop(0, chunks, chunk, tuple(first(n) for n in range(len(tiles.w))))
    plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames="interpret")  # the layers of a model share one lowering
def through_chunks(u, w, k, rows, start, reads=(), *, interpret=None) -> list[Array]:
    """x and `beta x`, like u, with `x = U + W S` chunk by chunk.

    Forward the state is S from `start` `[B, H, Dk, Dv]` on, and takes what `k` writes, `beta x`. With `reads`, the
    (scaled) queries and the cotangents of the outputs, it is dS from `start` at the end back, which takes what the
    queries read less what the keys erase.
    """
    key_tiles, units = k.shape[-1] // WIDTH, u.shape[0] * u.shape[2] * (u.shape[-1] // WIDTH)
    scratch, structure = jax.tree.flatten(_Tiles.scratch(key_tiles, bool(reads)))
    signals = 2 + 2 * key_tiles + (1 + key_tiles if reads else 0)

    def body(unit, ins, outs, buffers, barriers):
        (*arrays, start), tiles = ins, jax.tree.unflatten(structure, buffers)
        _through_body(unit, arrays, start, outs, tiles, barriers, interpret=bool(interpret))

    like_u = jax.ShapeDtypeStruct(u.shape, jnp.bfloat16)
    run = _kernel(body, units, [like_u, like_u], scratch, 2 * signals, interpret)
    return run(u, w, k, rows, *reads, start)
