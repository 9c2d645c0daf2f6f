"""Mask algebra: which keys a query may read, as a small expression and never as a T x T array.

    Causal() & (Sink(128) | Window(4096) | Stride(block=64, every=64))

A mask is a frozen pytree: its structure is static, its numbers may be traced. `&` and `|` combine masks; `plan` reduces
them to the normal form of `plan.py` and refuses what does not reduce; `to_array` evaluates the expression (tests).
Positions are absolute, 0-based; `i` is the query's, `j` the key's. In packed rows `Sink` counts from the first key of
the query's segment, so that a document behind others reads as it would alone; windows are differences of positions and
need no such rule; `Stride` and `Intervals` name blocks of the row, whatever its segments.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.lists import BlockList
from pallas_kernels.normal_form import Form, plan_of
from pallas_kernels.plan import INF, Ints, Plan, namespace
from pallas_kernels.pytrees import record
from pallas_kernels.segments import key_places

Number = int | np.integer | Int[Ints, ""]


class Mask:
    """Base of the algebra."""

    kind: ClassVar[str] = ""  # how the normal form takes a leaf: sink, window, columns or lists

    def __and__(self, other: Mask) -> Mask:
        return _combine(operator.and_, And, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _combine(operator.or_, Or, self, other)

    def form(self) -> Form:
        """The normal form; ValueError where the expression has none."""
        return Form(terms=((self,),))

    def patterns(self) -> tuple[tuple[Form, ...], tuple[int, ...] | Ints | None]:
        """(one form per pattern, pattern of each head or None where all heads share the only one)."""
        return (self.form(),), None

    def evaluate(self, i: Array, j: Array, context: Evaluation) -> Bool[Array, ...]:
        raise NotImplementedError

    def to_array(
        self,
        length: int,
        keys: int,
        q_offset: int = 0,
        segment_ids: tuple[Int[Array, " T"], Int[Array, " S"]] | None = None,
    ) -> Bool[Array, ...]:
        """The mask as booleans [T,S], or [H,T,S] under `per_head`, or [B,Hs,T,S] with `Blocks`; for tests."""
        i = jnp.arange(length, dtype=jnp.int32)[:, None] + q_offset
        j = jnp.arange(keys, dtype=jnp.int32)[None, :]
        found = self.evaluate(i, j, Evaluation(length, keys, segment_ids))
        return jnp.broadcast_to(found, jnp.broadcast_shapes(found.shape, (length, keys)))

    def plan(
        self, num_heads: int, length: int, keys: int, block_q: int, block_k: int, q_offset: int | Int[Ints, ...] = 0
    ) -> Plan:
        """The normal form's numbers for `length` queries at `q_offset` on `keys` keys in tiles of these sizes.

        `plan.block_k` divides the tile's `block_k` and every block size in the mask. `Blocks` are not part of it.
        """
        for name, value in (("block_q", block_q), ("block_k", block_k), ("length", length), ("keys", keys)):
            if value < 1:
                raise ValueError(f"plan: {name}={value} must be at least 1")
        forms, heads = self.patterns()
        if heads is None:
            heads = (0,) * num_heads
        if len(heads) != num_heads:
            raise ValueError(f"per_head: {len(heads)} heads in the mask, {num_heads} heads in the call")
        return plan_of(forms, heads, keys, block_k)

    @property
    def lists(self) -> BlockList | None:
        """The run-time lists of a `Blocks` term, if the mask has one."""
        found = {id(a): a for f in self.patterns()[0] for t in f.terms or () for a in t if isinstance(a, Blocks)}
        if len(found) > 1:
            raise ValueError(f"mask: {len(found)} Blocks terms; a call takes one list")
        return next(iter(found.values())).selection if found else None

    @property
    def causal(self) -> bool:
        return self.patterns()[0][0].causal

    @property
    def counts_sinks(self) -> bool:
        """Whether some head has `Sink` terms, whose keys packed segments move."""
        return any(kind == "sink" for term in self._terms() for kind in term)

    def check_packed(self) -> None:
        """ValueError where a term has no meaning with segments: sinks belong to a segment, blocks to the row."""
        if any({"sink", "columns"} <= set(term) for term in self._terms()):
            raise ValueError("mask: Sink(n) & Stride or Intervals cannot be combined with segment_ids")

    def _terms(self) -> list[list[str]]:
        return [[atom.kind for atom in term] for form in self.patterns()[0] for term in form.terms or ()]

    @property
    def needs_segments(self) -> bool:
        return any(form.segments for form in self.patterns()[0])


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `to_array` knows beside positions."""

    length: int
    keys: int
    segment_ids: tuple[Array, Array] | None
    skip_lists: bool = False


@record(eq=True)
class Full(Mask):
    """Every key."""

    def form(self) -> Form:
        return Form()

    def evaluate(self, i, j, context):
        return jnp.ones((), bool)


@record(eq=True)
class Causal(Mask):
    """Keys at or before the query: j <= i."""

    def form(self) -> Form:
        return Form(causal=True)

    def evaluate(self, i, j, context):
        return j <= i


@record(eq=True)
class Segments(Mask):
    """Keys of the query's own segment; the call must then pass `segment_ids` (which act with or without this term)."""

    def form(self) -> Form:
        return Form(segments=True)

    def evaluate(self, i, j, context):
        if context.segment_ids is None:
            raise ValueError("to_array: a mask with Segments() needs segment_ids=(query ids [T], key ids [S])")
        queries, keys = context.segment_ids
        return jnp.asarray(queries)[:, None] == jnp.asarray(keys)[None, :]


@record(eq=True)
class Sink(Mask):
    """The first `n` keys, of the query's segment where there are segments: j - (first key of the segment) < n."""

    kind: ClassVar[str] = "sink"

    n: Number

    def __post_init__(self):
        _check_count("Sink(n)", self.n, 0)

    def evaluate(self, i, j, context):
        if context.segment_ids is None:
            return j < self.n
        return key_places(jnp.asarray(context.segment_ids[1])[None]) < self.n


@record(eq=True)
class Window(Mask):
    """The last `n` keys, the query's own included: i - j < n."""

    kind: ClassVar[str] = "window"

    n: Number

    def __post_init__(self):
        _check_count("Window(n)", self.n, 0)

    def evaluate(self, i, j, context):
        return i - j < self.n


@record("block", eq=True)
class Stride(Mask):
    """Every `every`-th block of `block` keys, in absolute blocks: (j // block + offset) % every == 0."""

    kind: ClassVar[str] = "columns"

    block: int
    every: Number
    offset: Number = 0

    def __post_init__(self):
        _check_count("Stride(block)", self.block, 1)
        _check_count("Stride(every)", self.every, 1)

    def evaluate(self, i, j, context):
        return (j // self.block + self.offset) % self.every == 0

    def rows(self, keys: int) -> tuple[Ints, None]:
        """(expiry per block, no second interval)."""
        xp = namespace(self.every, self.offset)
        column = xp.arange(-(-keys // self.block), dtype=np.int32)
        return xp.where((column + self.offset) % self.every == 0, np.int32(INF), np.int32(0)), None


@record("block", eq=True)
class Recent(Mask):
    """The last `n` blocks of `block` keys, the query's own included: i // block - j // block < n."""

    kind: ClassVar[str] = "columns"

    block: int
    n: Number

    def __post_init__(self):
        _check_count("Recent(block)", self.block, 1)
        _check_count("Recent(n)", self.n, 1)

    def evaluate(self, i, j, context):
        return i // self.block - j // self.block < self.n

    def rows(self, keys: int) -> tuple[Ints, None]:
        """(expiry per block, no second interval)."""
        xp = namespace(self.n)
        column = xp.arange(-(-keys // self.block), dtype=np.int32)
        last = xp.minimum(xp.asarray(self.n, np.int32), np.int32(INF // self.block) - column)
        return (column + last) * np.int32(self.block), None


@record("block", eq=True)
class Intervals(Mask):
    """Block J of `block` keys is read by queries i < expiry[J], and by second[J,0] <= i < second[J,1].

    `expiry` int32 [nK] and `second` int32 [nK,2] count query tokens, absolute positions; INF = 2**31 - 1 never expires.
    """

    kind: ClassVar[str] = "columns"

    block: int
    expiry: Int[Ints, " nK"]
    second: Int[Ints, "nK 2"] | None = None

    def __post_init__(self):
        _check_count("Intervals(block)", self.block, 1)

    def evaluate(self, i, j, context):
        self.rows(context.keys)
        keep = i < jnp.asarray(self.expiry)[j // self.block]
        if self.second is None:
            return keep
        span = jnp.asarray(self.second)[j // self.block]
        return keep | ((span[..., 0] <= i) & (i < span[..., 1]))

    def rows(self, keys: int) -> tuple[Ints, Ints | None]:
        """(expiry, second) of the blocks that hold the first `keys` keys."""
        need = -(-keys // self.block)
        if self.expiry.shape[0] < need:
            have = self.expiry.shape[0]
            raise ValueError(f"Intervals: expiry has {have} blocks of {self.block}, {keys} keys need {need}")
        return self.expiry[:need], None if self.second is None else self.second[:need]


@record(eq=True)
class Blocks(Mask):
    """Keys that a run-time block list selects for the query's block."""

    kind: ClassVar[str] = "lists"

    selection: BlockList

    def evaluate(self, i, j, context):
        if context.skip_lists:
            return jnp.zeros((), bool)
        return self.selection.to_array(context.length, context.keys)


@record(eq=True)
class And(Mask):
    """Both; made by `&`."""

    left: Mask
    right: Mask

    def form(self) -> Form:
        a, b = self.left.form(), self.right.form()
        if a.terms is None or b.terms is None:
            terms = b.terms if a.terms is None else a.terms
        else:
            terms = tuple(x + y for x in a.terms for y in b.terms)
        return Form(a.causal or b.causal, a.segments or b.segments, terms)

    def evaluate(self, i, j, context):
        return self.left.evaluate(i, j, context) & self.right.evaluate(i, j, context)


@record(eq=True)
class Or(Mask):
    """Either; made by `|`."""

    left: Mask
    right: Mask

    def form(self) -> Form:
        a, b = self.left.form(), self.right.form()
        for form, other in ((a, b), (b, a)):
            if form.terms is None and form.causal <= other.causal and form.segments <= other.segments:
                return form
        if (a.causal, a.segments) != (b.causal, b.segments) or a.terms is None or b.terms is None:
            raise ValueError(
                f"mask: {self.left} | {self.right} does not reduce to the normal form; put Causal() and Segments()"
                " outside of |, as in Causal() & (Sink(4) | Window(64))"
            )
        return Form(a.causal, a.segments, a.terms + b.terms)

    def evaluate(self, i, j, context):
        return self.left.evaluate(i, j, context) | self.right.evaluate(i, j, context)


@record("heads", eq=True)
class PerHead(Mask):
    """One mask per head; made by `per_head`."""

    masks: tuple[Mask, ...]
    heads: tuple[int, ...]

    def patterns(self):
        forms = tuple(mask.form() for mask in self.masks)
        if len({(form.causal, form.segments) for form in forms}) > 1:
            raise ValueError("per_head: the heads' masks must all have Causal(), or none, and likewise Segments()")
        return forms, self.heads

    def form(self):
        raise ValueError("per_head: a mask per head can be combined with others, not nested")

    def evaluate(self, i, j, context):
        shape = (context.length, context.keys)
        each = [jnp.broadcast_to(mask.evaluate(i, j, context), shape) for mask in self.masks]
        return jnp.stack([each[p] for p in self.heads])

    def to_array(self, length, keys, q_offset=0, segment_ids=None):
        each = [mask.to_array(length, keys, q_offset, segment_ids) for mask in self.masks]
        return jnp.stack([each[p] for p in self.heads])


def per_head(masks: Sequence[Mask], heads: Sequence[int] | None = None) -> Mask:
    """A mask per head. With `heads`, head h takes masks[heads[h]]; without, masks[h].

    Equal masks are merged into one pattern. All must agree on `Causal()` and `Segments()`.
    """
    if not masks:
        raise ValueError("per_head: needs at least one mask")
    heads = tuple(range(len(masks))) if heads is None else tuple(int(h) for h in heads)
    if bad := [h for h in heads if not 0 <= h < len(masks)]:
        raise ValueError(f"per_head: heads names mask {bad[0]}, there are {len(masks)}")
    unique: list[Mask] = []
    place: dict[int, int] = {}
    for h in dict.fromkeys(heads):
        known = next((n for n, other in enumerate(unique) if _same(masks[h], other)), None)
        place[h] = len(unique) if known is None else known
        if known is None:
            unique.append(masks[h])
    return PerHead(tuple(unique), tuple(place[h] for h in heads))


def _same(a: Mask, b: Mask) -> bool:
    if a is b:
        return True
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    plain = all(isinstance(x, int) for x in left + right)
    return plain and jax.tree.structure(a) == jax.tree.structure(b) and left == right


def _combine(apply: Callable, node: type, a: Mask, b: Mask) -> Mask:
    if not isinstance(b, Mask):
        raise TypeError(f"mask: cannot combine {a} with {b!r}, which is not a mask")
    if isinstance(a, PerHead) and isinstance(b, PerHead):
        if len(a.heads) != len(b.heads):
            raise ValueError(f"per_head: {len(a.heads)} heads combined with {len(b.heads)}")
        pairs = zip(a.heads, b.heads, strict=True)
        return per_head([apply(a.masks[x], b.masks[y]) for x, y in pairs])
    if isinstance(a, PerHead):
        return PerHead(tuple(apply(mask, b) for mask in a.masks), a.heads)
    if isinstance(b, PerHead):
        return PerHead(tuple(apply(a, mask) for mask in b.masks), b.heads)
    return node(a, b)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool | float | str):
        raise TypeError(f"{name}: {value!r} is not a whole number of tokens or blocks")
    if isinstance(value, int | np.integer) and not least <= value <= INF:
        raise ValueError(f"{name}: {value} must lie in {least}..2**31-1")
