"""One validated decode call, as every backend receives it."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.decode.cache import KVCache
from pallas_kernels.lists import BlockList
from pallas_kernels.plan import Plan
from pallas_kernels.pytrees import record


@record("scale", "soft_cap")
class Call:
    """What `decode_attention` hands to a backend's `attend(call) -> (o [B,T,H,Dv], lse float32 [B,H,T])`.

    Query t of a request has position `lengths - T + t`. `plan` is the mask's normal form over the cache's capacity;
    `lists` has one row of blocks per head. Sink logits are applied outside, through lse.
    """

    q: Float[Array, "B T H D"]
    cache: KVCache
    plan: Plan
    lists: BlockList | None
    scale: float
    soft_cap: float | None

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[2] // self.cache.num_kv_heads
