"""`decode_attention`: the public function, its checks and the order of its backends."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.checks import check_values
from pallas_kernels.decode import reference, xla
from pallas_kernels.decode.cache import KVCache
from pallas_kernels.decode.call import Call
from pallas_kernels.lists import BlockList
from pallas_kernels.masks import Causal, Mask, Window
from pallas_kernels.merge import add_sink_logits
from pallas_kernels.op import dispatch, lazy, platform

BACKENDS: dict[str, Callable[[Call], tuple[Array, Array]]] = {
    "mosaic_gpu": lazy("pallas_kernels.decode.mosaic_gpu", "attend"),
    "mosaic_tpu": lazy("pallas_kernels.decode.mosaic_tpu", "attend"),
    "xla": xla.attend,
    "reference": reference.attend,
}
ORDER = {"cpu": ("xla",), "gpu": ("mosaic_gpu", "xla"), "tpu": ("mosaic_tpu", "xla")}
MAX_QUERIES = 8


def decode_attention(
    q: Float[Array, "B T H D"],
    cache: KVCache,
    mask: Mask | None = None,
    *,
    lists: BlockList | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"] | tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """Attention of each request's last few tokens over its cache, which already holds their keys and values.

    Query t of a request sees the keys at or before position `lengths - T + t` that the mask or the lists allow.
    Requests of different lengths share a call at no cost. Slots beyond a length, and pages that no request uses, are
    not read. Not differentiable.

    Args:
      q: one to eight new tokens a request, rotated.
      cache: contiguous, ring or paged; bfloat16, float32, or int8 with factors.
      mask: causal, from `pallas_kernels.masks`; all keys by default, or only the listed ones when `lists` is given.
      lists: key blocks of the cache in token order (not physical pages), one row of blocks: `nQ` is 1. `Hs` is 1 or K.
      scale: of the scores, D**-0.5 by default.
      soft_cap: scores become soft_cap * tanh(score / soft_cap).
      sink_logits: one more softmax entry per head, with a zero value.
      return_lse: also return the log-sum-exp of the scores, float32.
      implementation: 'mosaic_gpu', 'mosaic_tpu', 'xla' or 'reference'; None picks the platform's first that can.

    Raises:
      TypeError, ValueError: an argument that does not fit; named, with its value.
      Unsupported: no backend, or not the named one, can run the call; every reason is listed.
    """
    batch, queries, heads, dim = _check_query(q, cache)
    if mask is None:
        mask = Causal() if lists is None else Causal() & Window(0)
    if not mask.causal:
        raise ValueError(f"mask: {mask} is not causal; a decoding step sees no later keys, so start it with Causal() &")
    if lists is not None:
        lists.check(batch, queries, cache.capacity, cache.num_kv_heads, cache.num_kv_heads)
        if cache.kind == "ring":
            raise ValueError("lists: a ring cache keeps no block order; use a contiguous or paged cache")
    check_lengths(cache, queries)
    block = 64 if lists is None else lists.block_k
    call = Call(
        q=q,
        cache=cache,
        plan=mask.plan(heads, queries, cache.capacity, queries, block),
        lists=lists,
        scale=dim**-0.5 if scale is None else float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
    )
    o, lse = dispatch("decode_attention", BACKENDS, ORDER[platform()], implementation)(call)
    if sink_logits is not None:
        o, lse = add_sink_logits(o, lse, sink_logits)
    return (o, lse) if return_lse else o


def _check_query(q: Array, cache: KVCache) -> tuple[int, int, int, int]:
    if q.ndim != 4:
        raise ValueError(f"q: shape {q.shape}, expected four axes (batch, new tokens, heads, head dim)")
    batch, queries, heads, dim = q.shape
    if not 1 <= queries <= MAX_QUERIES:
        raise ValueError(f"q: {queries} new tokens a request; decoding takes 1 to {MAX_QUERIES}, prefill more")
    if cache.k.shape[-1] != dim:
        raise ValueError(f"cache: keys have head dim {cache.k.shape[-1]}, q has {dim}")
    if heads % cache.num_kv_heads:
        raise ValueError(f"q: {heads} heads are not a multiple of the cache's {cache.num_kv_heads} KV heads")
    if cache.lengths.shape != (batch,):
        raise ValueError(f"cache: lengths {cache.lengths.shape}, q has batch {batch}")
    _check_factors(cache)
    return batch, queries, heads, dim


def _check_factors(cache: KVCache) -> None:
    if (cache.k.dtype == jnp.int8) != (cache.factors is not None):
        raise ValueError(f"cache: keys are {cache.k.dtype}; int8 needs factors, other types take none")
    if cache.factors is None:
        return
    if cache.factors.dtype != jnp.int32:
        raise ValueError(f"cache: factors are {cache.factors.dtype}, not the int32 words that pack_factors makes")
    rows, one, other, _ = cache.k.shape
    expected = (rows, one, other) if cache.page_table is not None else (rows, other, one)
    if cache.factors.shape != expected:
        raise ValueError(f"cache: factors have shape {cache.factors.shape}, keys {cache.k.shape} need {expected}")


def check_lengths(cache: KVCache, queries: int) -> None:
    """Raises ValueError for a length or page out of range, where values are known (`checks`)."""
    limit = np.iinfo(np.int32).max if cache.kind == "ring" else cache.capacity
    message = f"cache: length {{found}} is outside {queries}..{limit} (the new tokens, the capacity)"
    check_values(lambda n: (n >= queries) & (n <= limit), message, cache.lengths)
    if cache.page_table is None:
        return
    pages, _, page = cache.k.shape[:3]
    width, ndim = cache.page_table.shape[-1], cache.page_table.ndim
    check_values(
        lambda table, n: (
            ((table >= 0) & (table < pages)) | (np.arange(width) >= -(-n // page).reshape(-1, *(1,) * (ndim - 1)))
        ),
        f"cache: page_table names page {{found}}, there are {pages}",
        cache.page_table,
        cache.lengths,
    )
