"""The kernels as layers call them: on one device the op itself, on a mesh the same result from its shards.

Mosaic kernels cannot be split by the compiler, so under a mesh every op runs in `shard_map`: the batch over data and
fsdp, heads over tensor, the length over context. Layers and caches call these and know no mesh.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels as pk
from lcjax.parallel import dense, sparse
from lcjax.parallel.adjoint import adjoint
from lcjax.parallel.balanced import dealt
from lcjax.parallel.layout import Layout, current_layout, exchange_of, per_shard
from lcjax.parallel.work import counting, stand_in, visible_pairs
from pallas_kernels import BlockList, KVCache, LinearState
from pallas_kernels.attention.api import SegmentIds
from pallas_kernels.masks import Causal, Mask, PerHead
from pallas_kernels.merge import add_sink_logits

QUERY = ("batch", "length", "heads", "dim")
type Result = tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    *,
    segment_ids: SegmentIds | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    q_offset: Int[Array, " B"] | None = None,
    kv_length: Int[Array, " B"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T H Dv"] | Result:
    """As `pallas_kernels.block_sparse_attention`.

    A sequence that attends to itself may be split over the mesh's context axis. Keys of a cache, and those with ids of
    their own, are whole on every shard.
    """
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap}
    cached = q_offset is not None or kv_length is not None or q.shape[1] != k.shape[1]
    cached |= isinstance(segment_ids, tuple)
    if counting():
        return _counted_attention(q, k, v, mask, return_lse)
    layout = current_layout(q.shape[0], (q.shape[2], k.shape[2]), None if cached else q.shape[1])
    if layout is None:
        return pk.block_sparse_attention(
            q, k, v, mask, segment_ids=segment_ids, sink_logits=sink_logits, q_offset=q_offset, kv_length=kv_length,
            return_lse=return_lse, **options,
        )  # fmt: skip
    numbers, rebuild = _traced_numbers(_one_pattern_per_shard(mask, layout, q.shape[2]))

    def shard(q, k, v, numbers, ids, logits, offset, held):
        local = rebuild(numbers)
        if layout.length is None:
            o, lse = pk.block_sparse_attention(
                q, k, v, local, segment_ids=ids, q_offset=offset, kv_length=held, return_lse=True, **options
            )
        else:
            split = dense.Split(layout.length, layout.shards, scale, soft_cap)
            o, lse = _over_context(dense.Shard(q, k, v, ids), local, split)
        return (o, lse) if logits is None else add_sink_logits(o, lse, logits)

    rows, per_head = layout.spec("batch"), layout.spec("heads")
    specs = (
        layout.spec(*QUERY), layout.spec(*QUERY), layout.spec(*QUERY), PartitionSpec(),
        layout.spec("batch", "length"), per_head, rows, rows,
    )  # fmt: skip
    arguments = (q, k, v, numbers, segment_ids, sink_logits, q_offset, kv_length)
    specs = _of_given(arguments, specs)
    o, lse = per_shard(shard, specs, (layout.spec(*QUERY), layout.spec("batch", "heads", "length")))(*arguments)
    return (o, lse) if return_lse else o


def _over_context(x: dense.Shard, mask: Mask, split: dense.Split) -> Result:
    """Bounded masks exchange what they read; full attention goes by the exchange that was chosen."""
    (_, length, heads, _), kv_heads = x.q.shape, x.k.shape[2]
    plain = mask.causal and mask.plan(heads, 1, 1, 1, 1).dense and mask.lists is None
    assert plain or not dealt(), "a pass in balanced order has no other masks"
    if plan := sparse.plan_exchange(mask, heads, length, split.shards, x.ids is not None):
        return sparse.bounded(x, plan, split)
    chosen = exchange_of(heads, kv_heads, split.shards, plain=plain)
    if chosen == "heads":
        return dense.by_heads(x, mask, split)
    if chosen == "ring":
        return dense.ring(x, split, dealt=dealt())
    call = lambda queries, k, v, **where: dense.attend(split, queries[0], k, v, mask, **where)
    return dense.gathered((x.q,), dense.Keys(x.k, x.v, x.ids), call, split)


def dual_chunk_attention(
    queries: tuple[Float[Array, "B T H D"], ...],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    chunk: int,
    segment_ids: Int[Array, "B T"] | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T H Dv"]:
    """As `pallas_kernels.dual_chunk_attention`; over a split sequence every shard gathers the keys."""
    q = queries[0]
    if counting():
        return _counted_attention(q, k, v, Causal(), return_lse=False)
    options: dict[str, Any] = {"chunk": chunk, "scale": scale, "soft_cap": soft_cap}
    layout = current_layout(q.shape[0], (q.shape[2], k.shape[2]), q.shape[1])

    def shard(queries, k, v, ids, logits):
        options["return_lse"] = True
        if layout is None or layout.length is None:
            o, lse = pk.dual_chunk_attention(queries, k, v, segment_ids=ids, **options)
        else:
            call: Any = functools.partial(pk.dual_chunk_attention, **options)
            split = dense.Split(layout.length, layout.shards, scale, soft_cap)
            o, lse = dense.gathered(queries, dense.Keys(k, v, ids), call, split)
        return o if logits is None else add_sink_logits(o, lse, logits)[0]

    arguments = (queries, k, v, segment_ids, sink_logits)
    if layout is None:
        return shard(*arguments)
    wide = layout.spec(*QUERY)
    specs = ((wide,) * 3, wide, wide, layout.spec("batch", "length"), layout.spec("heads"))
    specs = _of_given(arguments, specs)
    return per_shard(shard, specs, wide)(*arguments)


def decode_attention(
    q: Float[Array, "B T H D"],
    cache: KVCache,
    mask: Mask | None,
    *,
    lists: BlockList | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    implementation: str | None = None,
    **options: Any,
) -> Result:
    """As `pallas_kernels.decode_attention` with lse. A pool of pages is whole on every shard but for its heads."""
    options["implementation"] = implementation
    layout = current_layout(q.shape[0], (q.shape[2], cache.num_kv_heads), None)

    if layout is not None and mask is not None:
        mask = _one_pattern_per_shard(mask, layout, q.shape[2])

    def shard(q, cache, lists, logits):
        out = pk.decode_attention(q, cache, mask, lists=lists, sink_logits=logits, return_lse=True, **options)
        return cast(Result, out)

    if layout is None:
        return shard(q, cache, lists, sink_logits)
    layout = replace(layout, batch=()) if cache.kind == "paged" else layout
    spec: Any = layout.spec
    per_head = lambda x, *axes: None if x is None else spec(*axes)
    rows, kv = ("pages", "heads") if cache.kind == "paged" else ("batch", "slots"), ("heads", "dim")
    stored = spec(*rows, "page", "dim") if cache.kind == "paged" else spec(*rows, *kv)
    pages = ("heads",) if cache.page_table is not None and cache.page_table.ndim == 3 else ()
    places = replace(
        cache,
        k=stored,
        v=stored,
        lengths=spec("batch"),
        factors=per_head(cache.factors, rows[0], "heads"),
        page_table=per_head(cache.page_table, "batch", *pages),
    )
    listed = None if lists is None else spec("batch", "heads" if lists.idx.shape[1] > 1 else "all")
    specs = (spec(*QUERY), places, listed, per_head(sink_logits, "heads"))
    return per_shard(shard, specs, (spec(*QUERY), spec("batch", "heads")))(q, cache, lists, sink_logits)


def gated_linear(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T Hk Dk"],
    v: Float[Array, "B T Hv Dv"],
    log_decay: Float[Array, "B T Hg *Dk"] | None = None,
    *,
    beta: Float[Array, "B T H"] | None = None,
    initial_state: LinearState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalise: bool = False,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """As `pallas_kernels.gated_linear_attention`; a row with an initial state is not split over the context axis.

    The gradient is the true one unless `through_recurrences` asked for a truncated one.
    """
    if counting():
        shape = jax.eval_shape(lambda: LinearState(*_blank_state(q, v, normalise)))
        flops = 4 * math.prod(q.shape) * v.shape[-1]  # writing and reading the state
        o = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), v.dtype)
        return stand_in(flops, (o, shape), q, k, v, log_decay)
    heads = tuple(x.shape[2] for x in (q, k, v, log_decay) if x is not None)
    layout = current_layout(q.shape[0], heads, None if initial_state is not None else q.shape[1])
    if layout is None:
        return _recurrence(None)(
            q, k, v, log_decay,
            beta=beta, initial_state=initial_state, segment_ids=segment_ids, normalise=normalise, scale=scale,
        )  # fmt: skip

    def shard(q, k, v, log_decay, beta, ids, state):
        options: dict[str, Any] = {"beta": beta, "initial_state": state, "segment_ids": ids}
        return _recurrence(layout.length)(q, k, v, log_decay, normalise=normalise, scale=scale, **options)

    wide: Any = layout.spec(*QUERY)
    state: Any = layout.spec("batch", "heads")
    decay = layout.spec(*QUERY[: 3 if log_decay is None else log_decay.ndim])
    arguments = (q, k, v, log_decay, beta, segment_ids, initial_state)
    specs = (wide, wide, wide, decay, layout.spec(*QUERY[:3]), layout.spec("batch", "length"), state)
    specs = _of_given(arguments, specs)
    return per_shard(shard, specs, (wide, LinearState(state, state if normalise else None)))(*arguments)


def _recurrence(axis: str | None) -> Callable[..., Any]:
    """The op for a sequence that is whole, or lies along a mesh axis, with the gradient that was asked for."""
    if (window := adjoint().window) is not None:
        return functools.partial(pk.gated_linear_attention_truncated, window=window, axis_name=axis)
    if axis is None:
        return pk.gated_linear_attention
    return functools.partial(pk.gated_linear_attention_sharded, axis_name=axis)


def causal_conv(
    x: Float[Array, "B T H D"],
    taps: Float[Array, "W H D"],
    *,
    bias: Float[Array, "H D"] | None = None,
    tail: Float[Array, "B W1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    activation: Literal["silu"] | None = None,
) -> Float[Array, "B T H D"]:
    """`pallas_kernels.causal_conv1d` over the H*D channels of heads; a row with a tail is not split over context."""
    if counting():
        return stand_in(2 * math.prod(x.shape) * taps.shape[0], jax.ShapeDtypeStruct(x.shape, x.dtype), x, taps)
    layout = current_layout(x.shape[0], (x.shape[2],), None if tail is not None else x.shape[1])

    op = pk.causal_conv1d
    if layout is not None and layout.length is not None:
        op = functools.partial(pk.causal_conv1d_sharded, axis_name=layout.length)

    def channels(x, taps, bias, tail, ids):
        flat, bias = x.reshape(*x.shape[:2], -1), None if bias is None else bias.reshape(-1)
        weights = taps.reshape(taps.shape[0], -1)
        return op(flat, weights, bias=bias, tail=tail, segment_ids=ids, activation=activation)[0].reshape(x.shape)

    arguments = (x, taps, bias, tail, segment_ids)
    if layout is None:
        return channels(*arguments)
    specs: Any = (QUERY, ("taps", "heads", "dim"), ("heads", "dim"), ("batch", "taps", "heads"), ("batch", "length"))
    specs = _of_given(arguments, [layout.spec(*axes) for axes in specs])
    return per_shard(channels, specs, layout.spec(*QUERY))(*arguments)


def hedgehog_conv(
    x: Float[Array, "B T K D"],
    taps: Float[Array, "W H D"],
    maps: Float[Array, "H D f"],
    *,
    tail: Float[Array, "B W1 K D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H f2"]:
    """`pallas_kernels.hedgehog_conv1d`; a row with a tail is not split over context."""
    heads = taps.shape[1], x.shape[2]
    layout = None if counting() else current_layout(x.shape[0], heads, None if tail is not None else x.shape[1])
    if counting() or (layout is not None and layout.length is not None):  # the convolution alone reads other shards
        wide, before = (None if a is None else jnp.repeat(a, heads[0] // heads[1], axis=2) for a in (x, tail))
        assert wide is not None
        before = None if before is None else before.reshape(*before.shape[:2], -1)
        return pk.hedgehog(causal_conv(wide, taps, tail=before, segment_ids=segment_ids), maps).astype(x.dtype)

    def shard(x, taps, maps, tail, ids):
        return pk.hedgehog_conv1d(x, taps, maps, tail=tail, segment_ids=ids)

    arguments = (x, taps, maps, tail, segment_ids)
    if layout is None:
        return shard(*arguments)
    per_head: Any = ("taps", "heads", "dim"), ("heads", "dim", "rank"), ("batch", "taps", "heads", "dim")
    specs: Any = (QUERY, *per_head, ("batch", "length"))
    specs = _of_given(arguments, [layout.spec(*axes) for axes in specs])
    return per_shard(shard, specs, layout.spec(*QUERY))(*arguments)


def _of_given(arguments: tuple[Any, ...], specs: Sequence[Any]) -> tuple[Any, ...]:
    """The specs of arguments that are there, None for the others."""
    return tuple(None if x is None else spec for x, spec in zip(arguments, specs, strict=True))


def _counted_attention(q: Array, k: Array, v: Array, mask: Mask, return_lse: bool) -> Any:
    """A stand-in with the work of the pairs that the mask allows; against a cache, of every pair."""
    batch, length, heads, dim = q.shape
    pairs = heads * length * k.shape[1] if length != k.shape[1] else visible_pairs(mask, heads, length)
    o = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    return stand_in(2 * batch * pairs * (dim + v.shape[3]), (o, lse) if return_lse else o, q, k, v)


def _blank_state(q: Array, v: Array, normalise: bool) -> tuple[Array, Array | None]:
    batch, _, heads, dim = q.shape
    s = jnp.zeros((batch, heads, dim, v.shape[3]), jnp.float32)
    return s, s[..., 0] if normalise else None


def _traced_numbers(mask: Mask) -> tuple[list[Array], Any]:
    """A mask's arrays, which have to be arguments of a shard's function, and how to put them back."""
    leaves, tree = jax.tree.flatten(mask)
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def rebuild(numbers: list[Array]) -> Mask:
        new = list(leaves)
        for n, number in zip(places, numbers, strict=True):
            new[n] = number
        return jax.tree.unflatten(tree, new)

    return [leaves[n] for n in places], rebuild


def _one_pattern_per_shard(mask: Mask, layout: Layout, heads: int) -> Mask:
    """The mask of a shard's heads; refused where shards differ, since all run one program."""
    ways = 1 if layout.heads is None else jax.sharding.get_abstract_mesh().shape[layout.heads]
    if ways == 1 or not isinstance(mask, PerHead):
        return mask
    parts = {mask.heads[n : n + heads // ways] for n in range(0, heads, heads // ways)}
    if len(parts) > 1:
        raise ValueError(
            f"a mask per head gives the {ways} parts of the mesh axis tensor different patterns: use tensor=1, or "
            "masks that repeat from part to part"
        )
    return PerHead(mask.masks, parts.pop())
