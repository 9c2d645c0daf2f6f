"""`block_sparse_attention`: the public function, its checks and the order of its backends."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import tuning
from pallas_kernels.attention import library, reference, xla
from pallas_kernels.attention.call import Call
from pallas_kernels.checks import check_values
from pallas_kernels.lists import BlockList
from pallas_kernels.masks import Mask
from pallas_kernels.merge import add_sink_logits
from pallas_kernels.op import dispatch, lazy, platform

BACKENDS: dict[str, Callable[[Call], tuple[Array, Array]]] = {
    "cudnn": library.attend,
    "mosaic_gpu": lazy("pallas_kernels.attention.mosaic_gpu", "attend"),
    "mosaic_tpu": lazy("pallas_kernels.attention.mosaic_tpu", "attend"),
    "xla": xla.attend,
    "reference": reference.attend,
}
ORDER = {"cpu": ("xla",), "gpu": ("cudnn", "mosaic_gpu", "xla"), "tpu": ("mosaic_tpu", "xla")}
KERNEL_FIRST = ("mosaic_gpu", "cudnn", "xla")  # on the GPUs and head dims where `tuned/` says so

type SegmentIds = Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]]


def block_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    *,
    lists: BlockList | None = None,
    segment_ids: SegmentIds | None = None,
    q_offset: int | Int[Array, " B"] | Int[Array, ""] | None = None,
    kv_length: Int[Array, " B"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    return_lse: bool = False,
    whole: tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]] | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"] | tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """Softmax attention of each query over the keys that `mask` and `lists` allow.

    Query row t has absolute position `q_offset + t` (0 by default), key s position s; head h reads KV head
    h // (H / K).
    Rows that see no key give o = 0, lse = -inf and zero gradients. Keys and values that no query sees (padding, other
    segments, skipped blocks) may hold NaN. Differentiable in q, k, v and sink_logits, also through lse.

    Args:
      mask: from `pallas_kernels.masks`, over absolute positions.
      lists: key blocks chosen at run time, in addition to the mask's own blocks and under its causality.
      segment_ids: a query sees only keys of its own segment. [B,T] when S == T, or a pair ([B,T], [B,S]). Sinks are the
        first keys of the query's segment; a segment is a run of equal ids among the keys.
      q_offset: position of the first query, one for all or one per batch row (chunked prefill).
      kv_length: keys at or beyond it do not exist (a cache partly filled).
      scale: of the scores, D**-0.5 by default.
      soft_cap: scores become soft_cap * tanh(score / soft_cap).
      sink_logits: one more softmax entry per head, with a zero value.
      return_lse: also return the log-sum-exp of the scores, float32.
      whole: the known (o, lse) of attention over a larger set of keys, of which these are a part. It is returned as it
        is; the gradients in q, k and v are this part's share, so that a backward pass can go through parts one by one
        (ring attention) without computing any forward again.
      deterministic: gradients of two runs are equal to the bit. Without it 'mosaic_gpu' may be faster, and sum its
        gradient in q in an order that is left to the chip. 'cudnn' declines; the others are deterministic in any case.
      implementation: 'xla', 'mosaic_tpu', 'mosaic_gpu', 'cudnn' (plain causal or full masks) or 'reference'; None picks
        the first of the platform's order that can. On a GPU cuDNN is asked first, but for causal rows of a length and
        head dim at which 'mosaic_gpu' was measured to be faster on that kind of GPU.

    Raises:
      TypeError, ValueError: an argument that does not fit; named, with its value.
      Unsupported: no backend, or not the named one, can run the call; every reason is listed.
    """
    _check_arrays(q, k, v)
    batch, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if not isinstance(mask, Mask):
        raise TypeError(f"mask: expected a mask such as Causal(), got {type(mask).__name__}")
    _check_heads(mask, heads)
    selection = _selection(mask, lists)
    if selection is not None:
        selection.check(batch, length, keys, heads, kv_heads)
    call = Call(
        q=q,
        k=k,
        v=v,
        mask=mask,
        lists=selection,
        segment_ids=_segments(mask, segment_ids, batch, length, keys),
        q_offset=_offset(q_offset, batch),
        kv_length=_lengths(kv_length, batch, keys),
        scale=_positive("scale", dim**-0.5 if scale is None else scale),
        soft_cap=None if soft_cap is None else _positive("soft_cap", soft_cap),
        need_lse=return_lse or sink_logits is not None,
        whole=_whole(whole, q, v, sink_logits),
        deterministic=deterministic,
    )
    o, lse = dispatch("block_sparse_attention", BACKENDS, _order(call), implementation)(call)
    if sink_logits is not None:
        if sink_logits.shape != (heads,):
            raise ValueError(f"sink_logits: shape {sink_logits.shape}, expected ({heads},), one per query head")
        o, lse = add_sink_logits(o, lse, sink_logits)
    return (o, lse) if return_lse else o


def _order(call: Call) -> tuple[str, ...]:
    """What to try in turn. The measurement is of plain causal masks; others cuDNN declines, wherever it stands."""
    _, length, _, dim = call.q.shape
    causal = call.mask.causal and call.q.dtype == jnp.bfloat16
    faster = causal and length >= tuning.faster_from("attention_causal", dim=dim)
    return KERNEL_FIRST if faster else ORDER[platform()]


def _check_arrays(q: Array, k: Array, v: Array) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: shape {x.shape}, expected four axes (batch, length, heads, head dim)")
        if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            raise TypeError(f"{name}: dtype {x.dtype}, expected bfloat16, float16 or float32")
        if 0 in x.shape:
            raise ValueError(f"{name}: shape {x.shape} has an empty axis")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: dtype {x.dtype} differs from q's {q.dtype}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: batch {x.shape[0]} differs from q's {q.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: head dim {k.shape[3]} differs from q's {q.shape[3]}")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(f"v: length and heads {v.shape[1:3]} differ from k's {k.shape[1:3]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q: {q.shape[2]} heads are not a multiple of k's {k.shape[2]} KV heads")


def _check_heads(mask: Mask, heads: int) -> None:
    assigned = mask.patterns()[1]
    if assigned is not None and len(assigned) != heads:
        raise ValueError(f"mask: per_head gives {len(assigned)} heads, q has {heads}")


def _selection(mask: Mask, lists: BlockList | None) -> BlockList | None:
    if lists is not None and not isinstance(lists, BlockList):
        raise TypeError(f"lists: expected a BlockList, got {type(lists).__name__}")
    if lists is not None and mask.lists is not None:
        raise ValueError("lists: given both as an argument and as Blocks(...) in the mask; pass one")
    return mask.lists if lists is None else lists


def _segments(mask, segment_ids, batch, length, keys) -> tuple[Array, Array] | None:
    if segment_ids is None:
        if mask.needs_segments:
            raise ValueError("segment_ids: None, but the mask has Segments(); pass [B,T] or ([B,T], [B,S])")
        return None
    if not isinstance(segment_ids, tuple):
        if length != keys:
            raise ValueError(f"segment_ids: one array with {length} queries and {keys} keys; pass ([B,T], [B,S])")
        segment_ids = (segment_ids, segment_ids)
    mask.check_packed()
    for name, ids, size in (("queries", segment_ids[0], length), ("keys", segment_ids[1], keys)):
        if ids.shape != (batch, size):
            raise ValueError(f"segment_ids: shape {ids.shape} for {name}, expected ({batch}, {size})")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids: dtype {ids.dtype} for {name}, expected an integer type")
    return jnp.asarray(segment_ids[0], jnp.int32), jnp.asarray(segment_ids[1], jnp.int32)


def _offset(q_offset, batch: int) -> int | Array:
    if q_offset is None:
        return 0
    if isinstance(q_offset, int):
        if q_offset < 0:
            raise ValueError(f"q_offset: {q_offset} is negative")
        return q_offset
    if q_offset.shape not in ((), (batch,)) or not jnp.issubdtype(q_offset.dtype, jnp.integer):
        raise ValueError(f"q_offset: {q_offset.dtype}{q_offset.shape}, expected an integer or int32 [{batch}]")
    check_values(lambda offset: offset >= 0, "q_offset: {found} is negative", q_offset)
    return jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,))


def _lengths(kv_length, batch: int, keys: int) -> Array | None:
    if kv_length is None:
        return None
    if kv_length.shape != (batch,) or not jnp.issubdtype(kv_length.dtype, jnp.integer):
        raise ValueError(f"kv_length: {kv_length.dtype}{kv_length.shape}, expected int32 [{batch}]")
    message = f"kv_length: {{found}} is outside 0..{keys}, the number of keys"
    check_values(lambda n: (n >= 0) & (n <= keys), message, kv_length)
    return jnp.asarray(kv_length, jnp.int32)


def _whole(whole, q: Array, v: Array, sink_logits) -> tuple[Array, Array] | None:
    if whole is None:
        return None
    if sink_logits is not None:
        raise ValueError("sink_logits: not together with whole; add them to the whole result (`add_sink_logits`)")
    batch, length, heads, _ = q.shape
    for name, x, shape in (("o", whole[0], (*q.shape[:3], v.shape[3])), ("lse", whole[1], (batch, heads, length))):
        if x.shape != shape:
            raise ValueError(f"whole: its {name} has shape {x.shape}, expected {shape}")
    return whole[0].astype(q.dtype), whole[1].astype(jnp.float32)


def _positive(name: str, value: float) -> float:
    value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: {value} must be a positive finite number")
    return value
