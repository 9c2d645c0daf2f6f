"""One validated attention call, as every backend receives it."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.lists import BlockList
from pallas_kernels.masks import Mask
from pallas_kernels.pytrees import record
from pallas_kernels.segments import key_places

KEPT = "attention"
"""Name of every attention result among a checkpoint's residuals: a policy that saves it spares the second forward."""


@record("scale", "soft_cap", "need_lse", "deterministic")
class Call:
    """What `block_sparse_attention` hands to a backend's `attend(call) -> (o [B,T,H,Dv], lse float32 [B,H,T])`.

    `segment_ids` act whether or not the mask has `Segments()`. `lists` also holds the mask's own `Blocks` term, so a
    backend reads lists only here and plans the rest: `call.mask.plan(H, T, S, block_q, block_k)`. Attention sinks that
    are logits are applied outside, through lse. A backend's gradient takes (do, dlse); o has q's dtype.

    With `whole` the call is one part of a larger one whose (o, lse) is known: the backend returns that, without
    computing anything forward, and its gradient in q, k and v is this part's.

    Where a call is `deterministic`, gradients of two runs are equal to the bit.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "B S K D"]
    v: Float[Array, "B S K Dv"]
    mask: Mask
    lists: BlockList | None
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None
    q_offset: int | Int[Array, " B"]
    kv_length: Int[Array, " B"] | None
    scale: float
    soft_cap: float | None
    need_lse: bool
    whole: tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]] | None = None
    deterministic: bool = False

    @property
    def key_places(self) -> Int[Array, "B S"] | None:
        """Index of each key in its segment, which sinks count; None where positions serve or no head has sinks."""
        if self.segment_ids is None or not self.mask.counts_sinks:
            return None
        return key_places(self.segment_ids[1])
