"""Caches for decoding: what each layer remembers of the tokens before."""

from lcjax.cache.base import AttentionCache
from lcjax.cache.dense import DenseCache
from lcjax.cache.init import cache_bytes, init_caches
from lcjax.cache.recurrent import RecurrentCache, ragged_tail, zero_state
from lcjax.cache.ring import RingCache

__all__ = [
    "AttentionCache",
    "DenseCache",
    "RecurrentCache",
    "RingCache",
    "cache_bytes",
    "init_caches",
    "ragged_tail",
    "zero_state",
]
