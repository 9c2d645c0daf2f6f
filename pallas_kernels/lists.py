"""Run-time block selections: which key blocks each query block reads."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.checks import check_values
from pallas_kernels.pytrees import record


@record("block_q", "block_k")
class BlockList:
    """Key blocks per query block, ascending, packed left, -1 beyond `count`.

    A query block is `block_q` rows of the call (row 0 is the call's first query, whatever its position); a key block is
    `block_k` keys. `Hs` is 1 (one list for all heads), K (per KV head) or H (per query head).
    """

    idx: Int[Array | np.ndarray, "B Hs nQ W"]
    count: Int[Array | np.ndarray, "B Hs nQ"]
    block_q: int
    block_k: int

    def check(self, batch: int, length: int, keys: int, num_heads: int, num_kv_heads: int) -> None:
        """Raises ValueError naming what does not fit a call of these sizes; values where they are known (`checks`)."""
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(f"lists: block_q={self.block_q} and block_k={self.block_k} must be at least 1")
        if self.idx.ndim != 4 or self.idx.shape[:3] != self.count.shape:
            raise ValueError(f"lists: idx{self.idx.shape} must be [B,Hs,nQ,W], count{self.count.shape} its [B,Hs,nQ]")
        b, hs, rows, _ = self.idx.shape
        if b != batch:
            raise ValueError(f"lists: idx has batch {b}, q has {batch}")
        if hs not in (1, num_kv_heads, num_heads):
            raise ValueError(f"lists: idx has {hs} head rows; use 1, {num_kv_heads} (KV heads) or {num_heads} (heads)")
        if rows != -(-length // self.block_q):
            raise ValueError(f"lists: {rows} query blocks of {self.block_q} do not cover the {length} rows of q")
        self._check_values(-(-keys // self.block_k), keys)

    def _check_values(self, blocks: int, keys: int) -> None:
        width = self.idx.shape[-1]
        place = np.arange(width)
        check_values(
            lambda count: (count >= 0) & (count <= width), f"lists: count {{found}} is outside 0..{width}", self.count
        )
        check_values(
            lambda idx, count: ((idx >= 0) & (idx < blocks)) | (place >= count[..., None]),
            f"lists: block index {{found}} is outside 0..{blocks - 1} ({keys} keys in blocks of {self.block_k})",
            self.idx,
            self.count,
        )
        check_values(
            lambda later, earlier, count: (later > earlier) | (place[1:] >= count[..., None]),
            "lists: idx must ascend without repeats inside each query block; {found} does not",
            self.idx[..., 1:],
            self.idx[..., :-1],
            self.count,
        )

    def to_array(self, length: int, keys: int) -> Bool[Array, "B Hs T S"]:
        """The selection as a dense array (tests and the oracle)."""
        used = jnp.arange(self.idx.shape[-1]) < self.count[..., None]
        blocks = -(-keys // self.block_k)
        hit = jnp.zeros((*self.count.shape, blocks + 1), bool)
        b, h, r = jnp.meshgrid(*(jnp.arange(n) for n in self.count.shape), indexing="ij")
        hit = hit.at[b[..., None], h[..., None], r[..., None], jnp.where(used, self.idx, blocks)].set(True)
        rows = jnp.repeat(hit[..., :blocks], self.block_q, axis=2)[:, :, :length]
        return jnp.repeat(rows, self.block_k, axis=3)[..., :keys]
