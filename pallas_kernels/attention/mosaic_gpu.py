"""The Hopper backend of block-sparse attention: what it takes, its schedule tables, its gradient."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.attention import mosaic_gpu_tables as tb
from pallas_kernels.attention import xla
from pallas_kernels.attention.call import KEPT, Call
from pallas_kernels.attention.mosaic_gpu_bwd import BackwardTiles, backward_dkv, backward_dq, backward_fused, cotangents
from pallas_kernels.attention.mosaic_gpu_common import Inputs, Static
from pallas_kernels.attention.mosaic_gpu_fwd import ForwardTiles, forward
from pallas_kernels.masks import Mask
from pallas_kernels.one_run import OneRun, one_run
from pallas_kernels.op import Unsupported, interpreter, require_hopper
from pallas_kernels.plan import INF, Plan, namespace

SHORT_ROWS, DENSE_PERSISTENT = 2560, 65536  # keys, measured on an H100 (`tuned/`)
EDGES = 512  # keys: most tiles of shorter causal rows lie on the diagonal
CUDA_MISCOMPILED = range(12080, 12091)  # ptxas of CUDA 12.8.0 to 12.9.0 breaks masked wgmma loops


def attend(
    call: Call,
    *,
    forward_tiles: ForwardTiles | None = None,
    backward_tiles: BackwardTiles | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """(o, lse) of the call on a Hopper GPU, or interpreted (`op.interpret`).

    The gradient runs one kernel or, for a deterministic call, two. Head dims above 128 take it from `xla`: two
    accumulators of 64 x 256 for dK and dV fill all registers of a warpgroup.

    Raises:
      Unsupported: with the reason.
    """
    require_hopper()
    _require_sound_cuda()
    if reason := refusal(call):
        raise Unsupported(reason)
    interpret = interpreter() is not None
    (_, length, heads, dim), (keys, _, dim_v) = call.q.shape, call.v.shape[1:]
    plan = call.mask.plan(heads, length, keys, tb.ROW_TILE, tb.UNIT)
    one, plan = one_run(plan, keys), tb.in_units(plan, keys)
    lists = "call" if call.lists is not None else "none" if _bare(plan) or one is not None else "plan"
    settings = Settings(
        scale=call.scale,
        soft_cap=call.soft_cap,
        causal=plan.causal,
        dense=plan.dense and lists == "none",
        patterns=plan.num_patterns,
        lists=lists,
        list_rows=0 if call.lists is None else call.lists.block_q,
        forward=forward_tiles or _forward_tiles(plan, keys, max(dim, dim_v), packed=call.segment_ids is not None),
        backward=backward_tiles or _backward_tiles(call, plan),
        interpret=interpret,
    )
    k, v = call.k, call.v
    if not _every_key_is_seen(call, plan):  # masked weights are 0, and 0 x NaN is NaN
        k, v = (jnp.where(jnp.isfinite(x), x, 0) for x in (k, v))
    q, k, v = (_padded(x, interpret, is_key) for x, is_key in ((call.q, False), (k, True), (v, True)))
    tables = _tables(call, plan, one, settings, q.shape[1], k.shape[1])
    if call.whole is not None:
        o, lse = (
            jnp.pad(x, [(0, q.shape[1] - length if axis == n else 0) for axis in range(x.ndim)])
            for n, x in zip((1, 2), call.whole, strict=True)
        )
        o, lse = _part(settings, q, k, v, tables, o, lse)
    elif max(dim, dim_v) > 128:
        o, lse = _with_xla_gradient(call, settings, tables)(call.q, call.k, call.v, q, k, v)
    else:
        o, lse = _attend(settings, q, k, v, tables)
    return o[:, :length], lse[..., :length]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static part of a call."""

    scale: float
    soft_cap: float | None
    causal: bool
    dense: bool
    patterns: int
    lists: str
    list_rows: int
    forward: ForwardTiles
    backward: BackwardTiles
    interpret: bool


def _forward_tiles(plan: Plan, keys: int, dim: int, *, packed: bool) -> ForwardTiles:
    """Tiles with the grid that suits the rows.

    Persistent blocks load a row tile's first keys while the tile before it is stored, which pays where rows are short,
    and deal dense rows evenly; the hardware's own dealing keeps long rows closer together in the L2 cache. Edges of
    packed rows compare ids, 1.6 times slower in tiles of 128 keys than of 64 where edges are most of a row.
    """
    tiles = ForwardTiles(**tuning.tiles("attention_forward", dim=dim))
    persistent = keys <= DENSE_PERSISTENT if plan.dense else _keys_per_row(plan, keys) <= SHORT_ROWS
    narrow = packed and plan.causal and keys <= EDGES
    return dataclasses.replace(tiles, persistent=persistent, block_k=tb.UNIT if narrow else tiles.block_k)


def _backward_tiles(call: Call, plan: Plan) -> BackwardTiles:
    """One kernel where columns are alike: a few that all rows read would all add to the same dQ, 1.7 times slower."""
    dim = max(call.q.shape[-1], call.v.shape[-1])
    return BackwardTiles(**tuning.tiles("attention_backward", dim=dim), fused=_bare(plan) and not call.deterministic)


def _keys_per_row(plan: Plan, keys: int) -> float:
    """Mean over the rows of self-attention, of the pattern that reads most; infinite for traced numbers."""
    if namespace(plan.sink, plan.window, plan.expiry, plan.second) is jnp:
        return math.inf
    first, columns = np.arange(tb.cdiv(keys, tb.UNIT)) * tb.UNIT, plan.columns(keys, tb.UNIT)
    rows = np.clip(np.minimum(columns.end, keys) - first, 0, None)
    if columns.second is not None:
        start, stop = columns.second[..., 0], np.minimum(columns.second[..., 1], keys)
        rows += np.clip(stop - np.maximum(start, first), 0, None)
    return float(rows.sum(1).max()) * tb.UNIT / keys


class Tables(NamedTuple):
    """Schedules of the three kernels and the token rules of edge tiles."""

    forward: Any
    dq: Any
    dkv: Any
    pattern: Any
    lists: Any
    column_lists: Any
    rules: Any
    segments: Any


def refusal(call: Call) -> str | None:
    """Why this backend cannot run the call on any GPU, or None."""
    dims = (call.q.shape[-1], call.v.shape[-1])
    lists, columns = call.lists, call.mask.plan(call.q.shape[2], 1, call.k.shape[1], 1, tb.UNIT)
    refused = [
        (call.q.dtype == jnp.float32, "wgmma has no float32; cast to bfloat16 or use xla"),
        (any(d not in (64, 128, 256) for d in dims), f"head dims {dims[0]} and {dims[1]} are not 64, 128 or 256"),
        (not _bare(columns) and lists is not None, "run-time lists together with Stride or Intervals"),
        (
            not _bare(columns) and columns.block_k % tb.UNIT > 0,
            f"the mask counts columns in blocks of {columns.block_k} keys; they must be multiples of {tb.UNIT}",
        ),
        (call.segment_ids is not None and lists is not None, "segments together with run-time lists"),
        (call.whole is not None and (max(dims) > 128 or lists is not None), "parts of head dims above 128 or of lists"),
    ]
    if lists is not None:
        sizes = f"list blocks of {lists.block_q} x {lists.block_k} are not multiples of {tb.ROW_TILE} x {tb.UNIT}"
        refused.append((bool(lists.block_q % tb.ROW_TILE or lists.block_k % tb.UNIT), sizes))
    return next((reason for hit, reason in refused if hit), None)


def _require_sound_cuda() -> None:
    """Declines the versions of CUDA that break these kernels; lowering without a GPU passes."""
    version = _cuda_version() if jax.default_backend() == "gpu" else 0
    if version in CUDA_MISCOMPILED:
        found = f"CUDA {version // 1000}.{version % 1000 // 10}"
        raise Unsupported(f"{found} miscompiles masked wgmma loops; use 12.9.1 or newer")


def _cuda_version() -> int:
    from jax._src.lib import cuda_versions  # present only where the CUDA plugin is

    return 0 if cuda_versions is None else cuda_versions.cuda_runtime_get_version()


def _bare(plan: Plan) -> bool:
    return plan.expiry is None and plan.second is None


def _every_key_is_seen(call: Call, plan: Plan) -> bool:
    """Known beforehand: each query sees the key at its own position, and there are no other keys."""
    plain = call.kv_length is None and call.segment_ids is None and call.lists is None
    square = call.q.shape[1] == call.k.shape[1] and isinstance(call.q_offset, int) and call.q_offset == 0
    if not (plain and square and isinstance(plan.sink, np.ndarray) and isinstance(plan.window, np.ndarray)):
        return False
    return bool(((plan.window > 0) | (plan.sink == INF)).all())


def _padded(x: Array, interpret: bool, is_key: bool) -> Array:
    """TMA takes lengths in eights; the interpreter allows no copy past the end."""
    size = x.shape[1]
    tile = tb.ROW_TILE if interpret else 8
    want = tb.cdiv(size, tile) * tile + (tb.ROW_TILE if interpret and is_key else 0)
    return x if want == size else jnp.pad(x, ((0, 0), (0, want - size), (0, 0), (0, 0)))


def _tables(call: Call, plan: Plan, one: OneRun | None, settings: Settings, rows: int, keys: int) -> Tables:
    batch = call.q.shape[0]
    offset = jnp.broadcast_to(jnp.asarray(call.q_offset, jnp.int32), (batch,))
    length = jnp.full((batch,), call.k.shape[1], jnp.int32) if call.kv_length is None else call.kv_length
    segs = tb.segments(call, rows, keys)
    block_k = settings.forward.block_k
    table, lists = tb.row_table(plan, rows, keys, block_k, offset, length, segs, one)
    dq, _ = tb.row_table(plan, rows, keys, settings.backward.dq_block_k, offset, length, segs, one)
    dkv = tb.column_table(plan, rows, keys, settings.backward.dkv_block_q, offset, length, segs)
    columns = None
    if call.lists is not None:
        lists, columns = tb.run_time_lists(call.lists, plan, keys, offset), tb.column_lists(call.lists, keys)
    pattern = jnp.asarray(plan.pattern_of_head, jnp.int32)
    return Tables(table, dq, dkv, pattern, lists, columns, tb.rules(plan), segs)


def _static(settings: Settings, q, k, v) -> Static:
    (batch, rows, heads, dim), (keys, kv_heads, dim_v) = q.shape, v.shape[1:]
    return Static(
        batch=batch,
        rows=rows,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        dim_v=dim_v,
        patterns=settings.patterns,
        causal=settings.causal,
        dense=settings.dense,
        scale=settings.scale,
        soft_cap=settings.soft_cap,
        lists=settings.lists,
        list_rows=settings.list_rows,
        interpret=settings.interpret,
    )


def with_tiles(mask: Mask, **tiles: Any):
    """(q, k, v) -> o with forced tiles, for measuring them; differentiable."""

    def run(q, k, v):
        call = Call(q, k, v, mask, None, None, 0, None, q.shape[-1] ** -0.5, None, False)
        return attend(call, **tiles)[0]

    return run


def _run_forward(settings: Settings, q, k, v, tables: Tables) -> tuple[Array, Array]:
    inputs = Inputs(q, k, v, tables.forward, tables.pattern, tables.lists, tables.rules, tables.segments)
    return forward(inputs, _static(settings, q, k, v), settings.forward, _num_blocks(settings.interpret))


def _num_blocks(interpret: bool) -> int:
    """Blocks of a persistent grid: one for each multiprocessor."""
    if interpret:
        return 2
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else 132


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: Settings, q, k, v, tables: Tables) -> tuple[Array, Array]:
    return _run_forward(settings, q, k, v, tables)


def _attend_fwd(settings: Settings, q, k, v, tables: Tables):
    o, lse = checkpoint_name(_run_forward(settings, q, k, v, tables), KEPT)
    return (o, lse), (q, k, v, o, lse, tables)


def _attend_bwd(settings: Settings, saved, cotangent):
    q, k, v, o, lse, tables = saved
    do, dlse = cotangent
    static = _static(settings, q, k, v)
    rows = cotangents(o, lse, do.astype(q.dtype), dlse)
    by_row = Inputs(q, k, v, tables.dq, tables.pattern, tables.lists, tables.rules, tables.segments)
    by_key = by_row._replace(table=tables.dkv, lists=tables.column_lists)
    if settings.backward.fused:
        return *backward_fused(by_key, rows, static, settings.backward), None
    dq, delta = backward_dq(by_row, rows, static, settings.backward)
    dk, dv = backward_dkv(by_key, rows, delta, static, settings.backward)
    return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _part(settings: Settings, q, k, v, tables: Tables, o, lse) -> tuple[Array, Array]:
    return o, lse


_part.defvjp(
    lambda settings, q, k, v, tables, o, lse: ((o, lse), (q, k, v, o, lse, tables)),
    lambda settings, saved, cotangent: (*_attend_bwd(settings, saved, cotangent), None, None),
)


def _with_xla_gradient(call: Call, settings: Settings, tables: Tables):
    """The forward kernel with the gradient of `xla`, as a function of the call's q, k, v and their padded copies."""

    @jax.custom_vjp
    def run(q, k, v, *padded):
        return _run_forward(settings, *padded, tables)

    def run_fwd(q, k, v, *padded):
        return run(q, k, v, *padded), (q, k, v, tuple(map(jnp.zeros_like, padded)))

    def run_bwd(saved, cotangent):
        q, k, v, zeros = saved
        do, dlse = (x[..., : q.shape[1]] if n else x[:, : q.shape[1]] for n, x in enumerate(cotangent))
        by_xla = lambda q, k, v: xla.attend(dataclasses.replace(call, q=q, k=k, v=v))
        return *jax.vjp(by_xla, q, k, v)[1]((do, dlse)), *zeros

    run.defvjp(run_fwd, run_bwd)
    return run
