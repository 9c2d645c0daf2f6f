"""The short convolution on Hopper, at the rate of its bytes.

A tile of 64 tokens by 64 channels comes to shared memory with the 8 rows beside it, and a tap is that tile read some
rows further up: a plain vector load, whereas a fusion of shifted slices works out each element's row and bounds anew.
The input's gradient is the same sum over later rows of the output's, `dx[s] = sum_d w[d] dy[s + d]`, and the gradient
of tap d sums `x[s] dy[s + d]` over the same rows, so that one kernel serves both ways and the backward reads x and dy
once. Which taps count is a word of bits for each token.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_conv.problem import Problem, ids_with_tail
from pallas_kernels.gated_linear.segments import Segments
from pallas_kernels.op import Unsupported, interpreter, require_hopper

ROWS = 64  # tokens of a tile
HALO = 8  # rows beside it, one more than the widest convolution reaches
MARKS = 96  # words for a tile: its tokens, those after it, and as many more as make whole lines of 128 bytes
WIDTH = 64  # channels of a tile
STEP = 16  # tokens in registers at once: eight neighbouring channels of one of them to a thread
SLOTS = 396  # programs that the chip runs at once: the backward takes 130 registers a thread
STAGES = 4  # tiles on their way or in use
LAYOUT = plgpu.Layout.TILED(
    Tiling(((STEP, WIDTH), (4, WIDTH), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


class Split(NamedTuple):
    """How the work is cut: a program takes `per_part` tiles of one row and column, one after another."""

    columns: int  # groups of channels
    tiles: int  # of a row
    parts: int  # of a row
    per_part: int  # tiles

    def place(self, program) -> "Place":
        column, rest = jax.lax.rem(program, self.columns), jax.lax.div(program, self.columns)
        first = jax.lax.rem(rest, self.parts) * self.per_part
        count = jnp.minimum(self.per_part, self.tiles - first)
        return Place(jax.lax.div(rest, self.parts), column, first, count)


class Place(NamedTuple):
    """Where a program works; neighbouring programs take neighbouring channels, as memory does."""

    row: jax.Array
    column: jax.Array
    first: jax.Array  # tile
    count: jax.Array  # of tiles


def choose_split(batch: int, tokens: int, columns: int, slots: int) -> Split:
    """Enough parts to fill `slots` programs about once."""
    tiles = -(-tokens // ROWS)
    parts = max(1, min(tiles, slots // (batch * columns)))
    per_part = -(-tiles // parts)
    return Split(columns, tiles, -(-tiles // per_part), per_part)


class Refs(NamedTuple):
    """Operands of a sweep, in global memory."""

    source: Any  # [B, T, C]
    beside: Any  # [B, 8, C], the rows before the first tile, of a backward sweep those after the last
    taps: Any  # [W, C] float32, first that of the current token
    marks: Any  # [B, tiles, 96] int32, or None where all taps count
    partner: Any  # [B, T, C] or None


def whole_rows(*shape: int):
    """A buffer of rows of 64 channels, each whole: a swizzle would start anew at every row that a load begins with."""
    return plgpu.SMEM((*shape, WIDTH), jnp.bfloat16, transforms=(plgpu.TilingTransform((1, WIDTH)),))


def copy_tile(source, beside, buffer, tile, signal, *, last: int | None = None):
    """Starts the copies of a tile of `source` [T, 64] and of the 8 rows before it, in a row of tiles up to `last`
    after it; `beside` [8, 64] has those outside of the row."""
    tile_at, halo_at, edge, near = (HALO, 0, 0, -HALO) if last is None else (0, ROWS, last, ROWS)
    halo = buffer.at[pl.ds(halo_at, HALO)]
    inside = source.at[pl.ds(tile * ROWS + near, HALO)]
    pl.when(tile == edge)(lambda: plgpu.copy_gmem_to_smem(beside, halo, signal))
    pl.when(tile != edge)(lambda: plgpu.copy_gmem_to_smem(inside, halo, signal))
    plgpu.copy_gmem_to_smem(source.at[pl.ds(tile * ROWS, ROWS)], buffer.at[pl.ds(tile_at, ROWS)], signal)


def load_taps(ref, width: int):
    """Float32 registers of the taps `ref` [W, 64], each for 16 tokens."""
    taps = [plgpu.load(ref.at[d], layout=LAYOUT.reduce(0), optimized=False) for d in range(width)]
    return [jax.lax.broadcast_in_dim(tap.astype(jnp.float32), (STEP, WIDTH), (1,)) for tap in taps]


def pick(ref, rows: int):
    """16 rows of a tile as float32 registers."""
    return plgpu.load(ref.at[pl.ds(rows, STEP)], layout=LAYOUT, optimized=False).astype(jnp.float32)


def kept(x, marks, rows: int, tap: int):
    """x with zeros in the rows whose mark lacks this tap."""
    if marks is None:
        return x
    words = plgpu.load(marks.at[pl.ds(rows, STEP)], layout=LAYOUT.reduce(1), optimized=False)
    bits = jax.lax.broadcast_in_dim(words & (1 << tap), x.shape, (0,))
    return jnp.where(bits != 0, x, 0.0)


def _tile(buffers, taps, sums, out, start, *, reverse: bool):
    """Writes a tile's outputs to global memory; `sums` with each tap's products with the partner added."""
    source, marks, partner = buffers
    sums = list(sums)
    for row in range(0, ROWS, STEP):
        y: Any = None
        own = None if partner is None else kept(pick(partner, row), marks, row, 0)
        for d, tap in enumerate(taps):
            x = pick(source, row + d if reverse else HALO + row - d)
            x = kept(x, marks, row + d if reverse else row, d)
            y = x * tap if y is None else y + x * tap
            if own is not None:
                sums[d] += x * own
        out[pl.ds(start + row, STEP)] = y.astype(out.dtype)
    return tuple(sums)


def _body(*refs, present: tuple[bool, ...], split: Split, width: int, reverse: bool):
    """A program's tiles, `STAGES` of them on their way or in use, each with its halo, marks and partner."""
    given = iter(refs)
    r = Refs(*(next(given) if there else None for there in present))
    out_gmem, *sums_gmem = given
    program = jax.lax.axis_index("program")
    place = split.place(program)
    channels = pl.ds(place.column * WIDTH, WIDTH)
    taps = load_taps(r.taps.at[:, channels], width)

    def scoped(source, marks, partner, arrived):
        def load(i):
            slot, tile = jax.lax.rem(i, STAGES), place.first + i
            rows, signal, last = pl.ds(tile * ROWS, ROWS), arrived.at[slot], split.tiles - 1 if reverse else None
            row, beside = (ref.at[place.row, :, channels] for ref in (r.source, r.beside))
            copy_tile(row, beside, source.at[slot], tile, signal, last=last)
            if r.marks is not None:
                plgpu.copy_gmem_to_smem(r.marks.at[place.row, tile], marks.at[slot], signal)
            if r.partner is not None:
                plgpu.copy_gmem_to_smem(r.partner.at[place.row, rows, channels], partner.at[slot], signal)

        for ahead in range(STAGES - 1):
            pl.when(ahead < place.count)(functools.partial(load, jnp.int32(ahead)))

        def turn(i, sums):
            slot = jax.lax.rem(i, STAGES)
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.commit_smem()  # a barrier: every warp is done with the slot that is filled next
            pl.when(i + STAGES - 1 < place.count)(lambda: load(i + STAGES - 1))
            buffers = [None if ref is None else ref.at[slot] for ref in (source, marks, partner)]
            out = out_gmem.at[place.row, :, channels]
            return _tile(buffers, taps, sums, out, (place.first + i) * ROWS, reverse=reverse)

        blank = lambda: plgpu.layout_cast(jnp.zeros((STEP, WIDTH), jnp.float32), LAYOUT)
        sums = jax.lax.fori_loop(0, place.count, turn, tuple(blank() for _ in taps) if r.partner is not None else ())
        for d, total in enumerate(sums):
            sums_gmem[0][program, d] = total

    pl.run_scoped(
        scoped,
        whole_rows(STAGES, ROWS + HALO),
        None if r.marks is None else plgpu.SMEM((STAGES, MARKS), jnp.int32),
        None if r.partner is None else whole_rows(STAGES, ROWS),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=2 + (r.marks is not None) + (r.partner is not None)),
    )


@functools.partial(jax.jit, static_argnames=("reverse", "interpret"))  # the layers of a model share one lowering
def sweep(r: Refs, *, reverse: bool, interpret=None) -> tuple[Float[Array, "B T C"], Float[Array, "W C"] | None]:
    """`sum_d taps[d] source[t - d]` (of a reverse sweep `t + d`) over the taps that count, T a multiple of 64.

    With a partner also its product with each `source[t + d]` summed over all tokens, in float32. Bit d of a token's
    mark says that it reads the one d before it; bit 0 that it is no padding.
    """
    (batch, tokens, channels), width = r.source.shape, len(r.taps)
    split = choose_split(batch, tokens, channels // WIDTH, SLOTS)
    programs = batch * split.parts * split.columns
    out_type = [jax.ShapeDtypeStruct(r.source.shape, r.source.dtype)]
    if r.partner is not None:
        out_type.append(jax.ShapeDtypeStruct((programs, width, STEP, WIDTH), jnp.float32))
    present = tuple(x is not None for x in r)

    def causal_conv(*refs):
        _body(*refs, present=present, split=split, width=width, reverse=reverse)

    # no thread reads shared memory that another one stores to, so the copies' own barriers are enough
    params = None if interpret else plgpu.CompilerParams(unsafe_no_auto_barriers=True)
    kernel = plgpu.kernel(
        causal_conv,
        out_type=out_type,
        grid=(programs,),
        grid_names=("program",),
        compiler_params=params,
        interpret=interpret or False,
    )
    y, *sums = kernel(*(x for x in r if x is not None))
    if not sums:
        return y, None
    by_column = sums[0].reshape(-1, split.columns, width, STEP, WIDTH).sum((0, 3))
    return y, jnp.moveaxis(by_column, 0, 1).reshape(width, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _kernel(x, before, w, marks, interpret):
    beside = jnp.zeros((x.shape[0], HALO, x.shape[2]), x.dtype) if before is None else before
    return sweep(Refs(x, beside, float_taps(w), marks, None), reverse=False, interpret=interpret)[0]


def _kernel_forward(x, before, w, marks, interpret):
    return _kernel(x, before, w, marks, interpret), (x, before, w, marks)


def _kernel_backward(interpret, residuals, dy):
    x, before, w, marks = residuals
    after = jnp.zeros((x.shape[0], HALO, x.shape[2]), x.dtype)
    dx, dw = sweep(Refs(dy, after, float_taps(w), marks, x), reverse=True, interpret=interpret)
    assert dw is not None
    dw, d_before = dw[::-1], None
    if before is not None:
        _, pull = jax.vjp(lambda before, w: _from_before(before, w, marks), before, w.astype(jnp.float32))
        d_before, more = pull(dy[:, : len(w) - 1].astype(jnp.float32))
        dw = dw + more
    return dx, d_before, dw.astype(w.dtype), None


_kernel.defvjp(_kernel_forward, _kernel_backward)


def float_taps(w: Float[Array, "W C"]) -> Float[Array, "W C"]:
    return w[::-1].astype(jnp.float32)


def _from_before(before: Float[Array, "B 8 C"], w: Float[Array, "W C"], marks) -> Float[Array, "B W1 C"]:
    """What the inputs before a row add to its first W-1 outputs."""
    reach = len(w) - 1
    inputs = jnp.pad(before[:, HALO - reach :].astype(jnp.float32), ((0, 0), (0, reach), (0, 0)))
    y = jnp.zeros_like(inputs[:, :reach])
    for d, tap in enumerate(w[::-1]):
        x = inputs[:, reach - d : 2 * reach - d] * tap
        y += x if marks is None else jnp.where(marks[:, 0, :reach, None] & (1 << d) != 0, x, 0)
    return y


def mark_tokens(segments: Segments | None, width: int, tokens: int) -> Int[Array, "B N 96"] | None:
    """The marks of each tile's tokens and of the 32 after it, in a row padded up to `tokens`; None where all count."""
    if segments is None:
        return None
    reach, valid = width - 1, segments.valid
    ids = ids_with_tail(segments, width)
    there = jnp.pad(valid, ((0, 0), (reach, 0)), constant_values=True)
    words = jnp.zeros(valid.shape, jnp.int32)
    for d in range(width):
        source = slice(reach - d, ids.shape[1] - d)
        counts = valid & there[:, source] & (ids[:, source] == ids[:, reach:])
        words |= counts.astype(jnp.int32) << d
    words = jnp.pad(words, ((0, 0), (0, tokens + ROWS - valid.shape[1]))).reshape(len(words), -1, ROWS)
    return jnp.concatenate([words[:, :-1], words[:, 1:, : MARKS - ROWS]], axis=2)


def convolve_mosaic_gpu(p: Problem) -> Float[Array, "B T C"]:
    """The `mosaic_gpu` backend: bfloat16 inputs and outputs, taps and sums in float32."""
    _check(p)
    length = p.x.shape[1]
    x = whole_tiles(p.x)
    before = None if p.tail is None else rows_beside(p.tail)
    return _kernel(x, before, p.w, mark_tokens(p.segments, p.width, x.shape[1]), interpreter())[:, :length]


def whole_tiles(x: Float[Array, "B T C"]) -> Float[Array, "B T1 C"]:
    """Zeros up to a multiple of 64 tokens."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % ROWS), (0, 0)))


def rows_beside(tail: Float[Array, "B W1 C"]) -> Float[Array, "B 8 C"]:
    """The rows before the first tile: zeros, then the tail."""
    return jnp.pad(tail, ((0, 0), (HALO - tail.shape[1], 0), (0, 0)))


def _check(p: Problem) -> None:
    require_hopper()
    if p.x.dtype != jnp.bfloat16:
        raise Unsupported(f"x is {p.x.dtype}, the kernel takes bfloat16")
    if p.x.shape[2] % WIDTH:
        raise Unsupported(f"x has {p.x.shape[2]} channels, the kernel takes multiples of {WIDTH}")
    if p.x.shape[1] < ROWS:
        raise Unsupported(f"x has {p.x.shape[1]} tokens, the kernel is for {ROWS} or more")
    if p.bias is not None or p.activation is not None:
        raise Unsupported("a bias or activation is applied before rounding, which the kernel does not do")
