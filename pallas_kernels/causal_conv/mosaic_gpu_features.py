"""The short convolution and its Hedgehog features on Hopper, in one pass that reads x once and writes the features.

A program takes tiles of 64 tokens of one head. It convolves a tile as `mosaic_gpu` does, leaves the result in shared
memory as the tensor cores read it, multiplies it by the head's map, and the softmax of the product and of its negative
take its place there, as there are as many features as channels. Several programs share an SM, so that one computes
while others wait for memory or the tensor cores.

The backward pass goes through the parts once more; only x is kept for it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.causal_conv import features, mosaic_gpu
from pallas_kernels.causal_conv.mosaic_gpu import HALO, MARKS, ROWS, STEP, WIDTH, Split, kept, pick
from pallas_kernels.gated_linear.mosaic_gpu_parts import products, tile
from pallas_kernels.op import Unsupported, interpreter, require_hopper

STAGES = 2  # tiles on their way or in use
SLOTS = {64: 660, 128: 396}  # programs that the chip runs at once, by channels of a head: 88 and 160 registers


class Refs(NamedTuple):
    """Operands, in global memory."""

    source: Any  # [B, T, K D]
    beside: Any  # [B, 8, K D], the rows before the first tile
    taps: Any  # [W, H D], last that of the current token
    maps: Any  # [H, D, 64]: W, or [W, -W] of heads of 64
    marks: Any  # [B, tiles, 96] int32, or None where all taps count


class Heads(NamedTuple):
    """How the channels of x serve the heads."""

    groups: int  # heads of x
    count: int  # of w
    tiles: int  # of 64 channels in a head

    def channels(self, head, n: int, *, shared: bool = False) -> pl.Slice:
        """Those of tile n of a head, or of its group's in x."""
        lane = jax.lax.div(head, self.count // self.groups) if shared else head
        return pl.ds((lane * self.tiles + n) * WIDTH, WIDTH)


def _convolve(source, marks, taps, y) -> None:
    """From the rows of a tile, with those before it, to the operand `y` [64, 64] of a product."""
    for row in range(0, ROWS, STEP):
        terms = (kept(pick(source, HALO + row - d), marks, row, d) * tap for d, tap in enumerate(taps))
        total = functools.reduce(lambda a, b: a + b, terms)
        y[pl.ds(row, STEP)] = total.astype(y.dtype)


def _softmax(u):
    """Over the columns of a tile."""
    weights = jnp.exp(u - _spread(u.max(1)))
    return jnp.maximum(weights * _spread(1 / weights.sum(1)), features.FEATURE_FLOOR)


def _softmax_halves(u):
    """Over either half of the columns of a tile."""
    column = plgpu.broadcasted_iota(jnp.int32, u.shape, 1, layout=plgpu.Layout.WGMMA)
    halves = column < WIDTH // 2, column >= WIDTH // 2
    left, right = (_spread(jnp.where(half, u, jnp.finfo(u.dtype).min).max(1)) for half in halves)
    weights = jnp.exp(u - jnp.where(halves[0], left, right))
    left, right = (_spread(1 / jnp.where(half, weights, 0.0).sum(1)) for half in halves)
    return jnp.maximum(weights * jnp.where(halves[0], left, right), features.FEATURE_FLOOR)


def _spread(rows):
    return jax.lax.broadcast_in_dim(rows, (ROWS, WIDTH), (0,))


def _body(r: Refs, out, split: Split, heads: Heads, *, width: int, interpret: bool) -> None:
    """A program's tiles, `STAGES` of them on their way or in use."""
    place = split.place(jax.lax.axis_index("program"))
    own = [heads.channels(place.column, n) for n in range(heads.tiles)]
    shared = [heads.channels(place.column, n, shared=True) for n in range(heads.tiles)]
    taps = [mosaic_gpu.load_taps(r.taps.at[:, channels], width)[::-1] for channels in own]

    def scoped(source, marks, maps, y, arrived, maps_arrived):
        def load(i):
            slot, at = jax.lax.rem(i, STAGES), place.first + i
            for n, channels in enumerate(shared):
                row, beside = (ref.at[place.row, :, channels] for ref in (r.source, r.beside))
                mosaic_gpu.copy_tile(row, beside, source.at[slot, n], at, arrived.at[slot])
            if marks is not None:
                plgpu.copy_gmem_to_smem(r.marks.at[place.row, at], marks.at[slot], arrived.at[slot])

        for n in range(heads.tiles):
            plgpu.copy_gmem_to_smem(r.maps.at[place.column, pl.ds(n * WIDTH, WIDTH)], maps.at[n], maps_arrived)
        for ahead in range(STAGES):
            pl.when(ahead < place.count)(functools.partial(load, jnp.int32(ahead)))
        plgpu.barrier_wait(maps_arrived)

        def turn(i, _):
            slot = jax.lax.rem(i, STAGES)
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's copy out of y
            for n in range(heads.tiles):
                _convolve(source.at[slot, n], None if marks is None else marks.at[slot], taps[n], y.at[n])
            plgpu.commit_smem()  # also a barrier: every warp is done with the slot, which is filled next
            pl.when(i + STAGES < place.count)(lambda: load(i + STAGES))
            u = products([(y.at[n], maps.at[n]) for n in range(heads.tiles)], interpret=interpret)
            plgpu.commit_smem()  # a barrier: the product has read all of y
            found = (_softmax(u), _softmax(-u)) if heads.tiles == 2 else (_softmax_halves(u),)
            for n, part in enumerate(found):
                y[n] = part.astype(y.dtype)
            plgpu.commit_smem()
            for n, channels in enumerate(own):
                rows = pl.ds((place.first + i) * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(y.at[n], out.at[place.row, rows, channels])

        jax.lax.fori_loop(0, place.count, turn, None)
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        scoped,
        mosaic_gpu.whole_rows(STAGES, heads.tiles, HALO + ROWS),
        None if r.marks is None else plgpu.SMEM((STAGES, MARKS), jnp.int32),
        tile(heads.tiles),
        tile(heads.tiles),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=2 * heads.tiles + (r.marks is not None)),
        plgpu.Barrier(num_arrivals=heads.tiles),
    )


@functools.partial(jax.jit, static_argnames=("heads", "interpret"))  # the layers of a model share one lowering
def sweep(r: Refs, heads: Heads, *, interpret=None) -> Float[Array, "B T C"]:
    """Features of every head, for T a multiple of 64."""
    batch, tokens, _ = r.source.shape
    split = mosaic_gpu.choose_split(batch, tokens, heads.count, SLOTS[heads.tiles * WIDTH])
    present = tuple(x is not None for x in r)

    def hedgehog_conv(*refs):
        *given, out = refs
        given = iter(given)
        operands = Refs(*(next(given) if there else None for there in present))
        _body(operands, out, split, heads, width=len(r.taps), interpret=bool(interpret))

    # what threads store to shared memory is committed before anything else reads it
    params = None if interpret else plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)
    kernel = plgpu.kernel(
        hedgehog_conv,
        out_type=jax.ShapeDtypeStruct((batch, tokens, heads.count * heads.tiles * WIDTH), r.source.dtype),
        grid=(batch * split.parts * split.columns,),
        grid_names=("program",),
        compiler_params=params,
        interpret=interpret or False,
    )
    return kernel(*(x for x in r if x is not None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _kernel(p: features.Problem, interpret) -> Float[Array, "B T H D"]:
    (batch, tokens, groups, dim), (width, count, _) = p.x.shape, p.w.shape
    x = mosaic_gpu.whole_tiles(p.x.reshape(batch, tokens, -1))
    before = jnp.zeros((batch, width - 1, x.shape[2]), x.dtype) if p.tail is None else p.tail
    maps = p.maps.astype(x.dtype)
    operands = Refs(
        source=x,
        beside=mosaic_gpu.rows_beside(before.reshape(batch, width - 1, -1)),
        taps=p.w.reshape(width, -1),
        maps=maps if dim == 2 * WIDTH else jnp.concatenate([maps, -maps], axis=2),
        marks=mosaic_gpu.mark_tokens(p.segments, width, x.shape[1]),
    )
    found = sweep(operands, Heads(groups, count, dim // WIDTH), interpret=interpret)
    return found[:, :tokens].reshape(batch, tokens, count, dim)


def _forward(p, interpret):
    return _kernel(p, interpret), p


def _backward(interpret, p, cotangent):
    def again(x, w, maps, tail):
        return features.by_parts(p._replace(x=x, w=w, maps=maps, tail=tail))

    _, pull = jax.vjp(again, p.x, p.w, p.maps, p.tail)
    return (features.Problem(*pull(cotangent), None, None),)


_kernel.defvjp(_forward, _backward)


def features_mosaic_gpu(p: features.Problem) -> Float[Array, "B T H D"]:
    """The `mosaic_gpu` backend: bfloat16 inputs and features, sums and softmax in float32."""
    require_hopper()
    if p.x.dtype != jnp.bfloat16:
        raise Unsupported(f"x is {p.x.dtype}, the kernel takes bfloat16")
    _, dim, features_ = p.maps.shape
    if dim not in (WIDTH, 2 * WIDTH) or 2 * features_ != dim:
        raise Unsupported(f"maps are {dim} x {features_}, the kernel takes 64 x 32 and 128 x 64")
    if p.x.shape[1] < ROWS:
        raise Unsupported(f"x has {p.x.shape[1]} tokens, the kernel is for {ROWS} or more")
    return _kernel(p, interpreter())
