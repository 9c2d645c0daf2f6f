"""The calls that attention is tested on, as data: each names what it is there to catch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.call import Call
from pallas_kernels.lists import BlockList
from pallas_kernels.masks import (
    Blocks,
    Causal,
    Full,
    Intervals,
    Mask,
    Recent,
    Segments,
    Sink,
    Stride,
    Window,
    per_head,
)
from pallas_kernels.plan import INF


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shapes and options of one call; arrays are drawn by `arrays` from `seed`."""

    name: str
    mask: Mask
    length: int = 130
    keys: int | None = None  # as `length` by default
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 64
    value_dim: int | None = None
    segments: bool = False
    q_offset: tuple[int, ...] | int | None = None
    kv_length: tuple[int, ...] | None = None
    soft_cap: float | None = None
    sink_logits: bool = False
    lists: tuple[int, int, int] | None = None  # (head rows, block_q, block_k) of a random selection
    poison: bool = False  # NaN in every key that no query sees
    seed: int = 0

    def arrays(self, dtype=jnp.float32) -> dict[str, jax.Array]:
        """q, k, v and the cotangents do, dlse, with sink logits where the spec has them."""
        keys, value_dim = self.keys or self.length, self.value_dim or self.dim
        shapes = {
            "q": (self.batch, self.length, self.heads, self.dim),
            "k": (self.batch, keys, self.kv_heads, self.dim),
            "v": (self.batch, keys, self.kv_heads, value_dim),
            "do": (self.batch, self.length, self.heads, value_dim),
        }
        rng = np.random.default_rng(self.seed)
        drawn = {name: jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for name, shape in shapes.items()}
        drawn["dlse"] = jnp.asarray(rng.standard_normal((self.batch, self.heads, self.length), np.float32))
        if self.sink_logits:
            drawn["sink_logits"] = jnp.asarray(rng.standard_normal(self.heads, np.float32))
        return drawn

    def options(self) -> dict:
        """The keyword arguments of the call that are not differentiated."""
        keys, rng = self.keys or self.length, np.random.default_rng(self.seed + 1)
        found: dict = {"soft_cap": self.soft_cap} if self.soft_cap else {}
        if self.segments:
            ids = np.sort(rng.integers(0, 4, (self.batch, self.length)), axis=1)
            found["segment_ids"] = jnp.asarray(ids, jnp.int32)
        if self.q_offset is not None:
            fixed = isinstance(self.q_offset, int)
            found["q_offset"] = self.q_offset if fixed else jnp.asarray(self.q_offset, jnp.int32)
        if self.kv_length is not None:
            found["kv_length"] = jnp.asarray(self.kv_length, jnp.int32)
        if self.lists is not None:
            found["lists"] = random_lists(rng, self.batch, self.length, keys, *self.lists)
        return found

    def call(self, dtype=jnp.float32) -> Call:
        """The arrays and options as a backend receives them, with plain scores."""
        x, options = self.arrays(dtype), self.options()
        ids = options.get("segment_ids")
        return Call(
            q=x["q"],
            k=x["k"],
            v=x["v"],
            mask=self.mask,
            lists=options.get("lists"),
            segment_ids=None if ids is None else (ids, ids),
            q_offset=options.get("q_offset", 0),
            kv_length=options.get("kv_length"),
            scale=1.0,
            soft_cap=None,
            need_lse=True,
        )


def random_lists(rng, batch: int, length: int, keys: int, rows: int, block_q: int, block_k: int) -> BlockList:
    """A selection of up to four key blocks per query block, some rows empty."""
    tiles_q, tiles_k = -(-length // block_q), -(-keys // block_k)
    width = min(4, tiles_k)
    count = rng.integers(0, width + 1, (batch, rows, tiles_q)).astype(np.int32)
    idx = np.full((batch, rows, tiles_q, width), -1, np.int32)
    for place in np.ndindex(*count.shape):
        idx[place][: count[place]] = np.sort(rng.choice(tiles_k, count[place], replace=False))
    return BlockList(jnp.asarray(idx), jnp.asarray(count), block_q, block_k)


# Groups of four blocks of 16 keys: a key is read until its group ends. Block 0 lives for ever, the last rows read all.
_GROUPS = Intervals(16, np.minimum((np.arange(16) // 4 + 1) * 64, INF).astype(np.int32))
_DOCUMENTS = Intervals(
    16,
    np.asarray([INF, 48, 48, 80, 80, 112, 112, 130, 130], np.int32),
    np.asarray([[0, 0]] + [[112, 130]] * 6 + [[0, 0]] * 2, np.int32),
)
_STRIPES = [Causal() & (Window(65) | Recent(64, 2) | Stride(64, 5, n)) for n in (1, 3)]
_HEADS = [Causal(), Causal() & Window(40), Causal() & (Sink(3) | Stride(16, 3, 1)), Causal() & Window(0)]

TESTED = (
    *(Spec(f"causal_{n}", Causal(), length=n) for n in (1, 63, 64, 65)),
    Spec("causal_groups_of_3", Causal(), batch=2, heads=6, kv_heads=2),
    Spec("full_other_length", Full(), length=65, keys=200),
    Spec("sink_window", Causal() & (Sink(5) | Window(33)), length=200, heads=3),
    Spec("window_not_causal", Window(40)),
    Spec("stride", Causal() & (Sink(4) | Window(20) | Stride(16, 3, 1)), length=200),
    Spec("stripes", per_head(_STRIPES), length=500, kv_heads=2),
    Spec("groups", Causal() & _GROUPS),
    Spec("documents", Causal() & _DOCUMENTS),
    Spec("per_head", per_head(_HEADS), heads=4, kv_heads=2),
    Spec("value_dim", Causal(), dim=64, value_dim=128),
    Spec("head_dim_128", Causal() & Window(70), dim=128),
    Spec("segments", Causal() & Segments(), length=200, batch=2, segments=True),
    Spec("packed_sinks", Causal() & (Sink(5) | Window(20)), length=200, batch=2, heads=3, segments=True),
    Spec(
        "packed_sinks_per_head",
        per_head([Causal() & (Sink(70) | Window(9)), Causal(), Causal() & Sink(3), Causal() & Window(30)]),
        length=200,
        heads=4,
        kv_heads=2,
        segments=True,
        seed=5,
    ),
    Spec(
        "chunk",
        Causal() & (Sink(4) | Window(90)),
        length=33,
        keys=160,
        batch=2,
        q_offset=(120, 50),
        kv_length=(153, 83),
    ),
    Spec("chunk_static", Causal(), length=33, keys=160, q_offset=127),
    Spec("no_key", Causal() & Window(20), length=65, batch=2, q_offset=(0, 40), kv_length=(0, 30)),
    Spec("soft_cap_sink_logits", Causal() & (Sink(4) | Window(50)), soft_cap=2.0, sink_logits=True),
    Spec("lists", Causal() & (Sink(4) | Window(20)), batch=2, heads=4, kv_heads=2, lists=(2, 16, 32)),
    Spec("lists_per_head", Causal() & Sink(0), heads=4, kv_heads=2, lists=(4, 32, 16)),
    Spec("poison", Causal() & (Sink(4) | Window(50)), length=65, keys=200, kv_length=(60,), poison=True),
    Spec("poison_segments", Causal() & Segments(), length=130, segments=True, poison=True),
)


def blocks_of(spec: Spec) -> Mask:
    """The spec's selection as a term of its mask instead of an argument."""
    return spec.mask | (Causal() & Blocks(spec.options()["lists"]))
