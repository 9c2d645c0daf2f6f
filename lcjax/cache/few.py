"""Attention of a few new tokens over a cache as it is stored: through the decode op."""

import contextlib
from typing import Any

from jaxtyping import Array

import pallas_kernels as pk
from lcjax.parallel import ops
from pallas_kernels.decode.api import BACKENDS
from pallas_kernels.masks import Mask
from pallas_kernels.op import platform


def few(tokens: int) -> bool:
    """Whether this many query tokens count as decoding (one token, or a handful to verify)."""
    return tokens <= 8


def by_kernel(q: Array, held: pk.KVCache, mask: Mask | None, **options: Any) -> tuple[Array, Array | None] | None:
    """Through the platform's own kernel, or None where there is none or it declines."""
    name = f"mosaic_{platform()}"
    if name not in BACKENDS:
        return None
    with contextlib.suppress(pk.Unsupported):
        return _decode(q, held, mask, name, **options)
    return None


def by_op(q: Array, held: pk.KVCache, mask: Mask | None, **options: Any) -> tuple[Array, Array | None]:
    """Through the platform's own kernel, else through XLA."""
    return by_kernel(q, held, mask, **options) or _decode(q, held, mask, "xla", **options)


def _decode(q: Array, held: pk.KVCache, mask: Mask | None, name: str, **options: Any) -> tuple[Array, Array | None]:
    wanted = options.pop("return_lse", True)
    o, lse = ops.decode_attention(q, held, mask, implementation=name, **options)
    return o, lse if wanted else None
