"""Caches for decoding: what each layer remembers of the tokens before."""

from lcjax.cache.base import AttentionCache
from lcjax.cache.dense import DenseCache
from lcjax.cache.groups import GroupedCache
from lcjax.cache.init import cache_bytes, init_caches
from lcjax.cache.paged import PagedCache
from lcjax.cache.recurrent import RecurrentCache, ragged_tail, zero_state
from lcjax.cache.ring import RingCache
from lcjax.cache.room import CacheLayout, Room
from lcjax.cache.selected import SelectedCache, Selection
from lcjax.cache.strided import StridedCache, Stripes

__all__ = [
    "AttentionCache",
    "CacheLayout",
    "DenseCache",
    "GroupedCache",
    "PagedCache",
    "RecurrentCache",
    "RingCache",
    "Room",
    "SelectedCache",
    "Selection",
    "StridedCache",
    "Stripes",
    "cache_bytes",
    "init_caches",
    "ragged_tail",
    "zero_state",
]
