"""Decode attention on TPU: one pass over the cache, copied unit by unit as a stream of visits says.

A program is one request, with all its KV heads where they read the same keys, else with one. It multiplies a step of
about 512 keys while the next step's units fly in from HBM; at its last step that is already the next program's first,
so the copies never pause between requests. One TensorCore reads the cache in turn and gains nothing from cutting a
request into parts; where a device has two (v4, v5p), each takes half of every request's keys and XLA merges the
halves by their log-sum-exp. `mosaic_tpu_visits.py` makes the streams.
"""

from __future__ import annotations

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic_tpu_parts import HIDDEN, LN2, LOG2E, LOWEST, finite, product, wide
from pallas_kernels.decode.cache import unpack_factors
from pallas_kernels.decode.call import Call
from pallas_kernels.decode.mosaic_tpu_visits import CHUNK, LANES, LISTED, WHOLE, Layout, Visits, make_visits, order_of
from pallas_kernels.merge import merge_attention
from pallas_kernels.op import Unsupported, interpreter, platform

STEP = 512  # keys of a step, about
BUFFER_BYTES = 24 * 2**20  # of keys and values in flight and at work
SLOTS = 3  # chunks of a stream in scalar memory: at work, in flight for the next step, and the one after


@dataclasses.dataclass(frozen=True)
class Config:
    """Static facts of a call."""

    layout: Layout
    batch: int
    queries: int
    group: int
    kv_heads: int
    dim: int
    value_dim: int
    capacity: int
    rows_per_page: int  # units of a page; 0 where the cache is contiguous
    ring: int | None
    quantized: bool
    dense: bool
    lists: bool
    scale: float
    soft_cap: float | None
    parts: int

    @property
    def heads(self) -> int:
        """KV heads of a program."""
        return self.kv_heads // self.layout.sets

    @property
    def rows(self) -> int:
        """Rows of a KV head's product: new tokens by group, in eights."""
        return -(-self.queries * self.group // 8) * 8

    @property
    def programs(self) -> int:
        """Programs of a part."""
        return self.batch * self.layout.sets

    @property
    def clamped(self) -> bool:
        """Whether the last unit of a contiguous cache begins early, to end with the cache."""
        return not self.rows_per_page and bool(self.capacity % self.layout.unit)


def attend(call: Call) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """(o, lse) of the call on a TPU, or interpreted where `op.interpret` says so."""
    if platform() != "tpu" and interpreter() is None:
        raise Unsupported(f"its kernel runs on TPUs, this is {platform()}")
    parts = 1 if interpreter() is not None else pltpu.get_tpu_info().num_cores
    return attend_with(call, layout_of(call), parts)


def layout_of(call: Call) -> Layout:
    """How to read the call's cache. Raises Unsupported with the reason where the kernel cannot."""
    cache, lists = call.cache, call.lists
    order, dims = order_of(cache), (cache.k.shape[-1], cache.v.shape[-1])
    if call.q.dtype not in (jnp.bfloat16, jnp.float32) or cache.k.dtype not in (jnp.bfloat16, jnp.float32, jnp.int8):
        raise Unsupported(
            f"q is {call.q.dtype} and the cache {cache.k.dtype}; it takes bfloat16, float32 and int8 keys"
        )
    if call.plan.expiry is not None or call.plan.second is not None:
        raise Unsupported("column blocks in the mask (Stride, Intervals) are not implemented; give them as lists")
    if order == "transposed" and any(dim % 32 or dim > LANES for dim in dims):
        raise Unsupported(f"head dims {dims}; below {LANES} it takes multiples of 32")
    if order != "transposed" and any(dim % LANES for dim in dims):
        raise Unsupported(f"head dims {dims}, of which one fills whole rows of {LANES} and one does not")
    apart = [cache.page_table is not None and cache.page_table.ndim == 3, lists is not None and lists.idx.shape[1] > 1]
    if order == "tokens" and any(apart):
        raise Unsupported(
            "a list for each KV head of a contiguous cache, whose tokens lie with all their heads; use pages"
        )
    separate = any(apart) or (order != "tokens" and call.plan.num_patterns > 1)
    unit, per_step = _unit(call, order)
    heads = 1 if separate else cache.num_kv_heads
    size = 2 * heads * unit * sum(dims) * cache.k.dtype.itemsize
    while per_step > 1 and size * per_step > BUFFER_BYTES and unit * per_step % (2 * LANES) == 0:
        per_step //= 2
    if size * per_step > BUFFER_BYTES:
        raise Unsupported(
            f"{unit * per_step} keys of {heads} heads take {size * per_step} bytes of VMEM, over {BUFFER_BYTES}"
        )
    return Layout(order, unit, per_step, cache.num_kv_heads if separate else 1)


def _unit(call: Call, order: str) -> tuple[int, int]:
    """(tokens of a unit, units of a step)."""
    cache = call.cache
    block = None if call.lists is None else call.lists.block_k
    if cache.kind == "paged":
        unit = cache.k.shape[2] if block is None else math.gcd(cache.k.shape[2], block)
    else:
        if cache.capacity < LANES:
            raise Unsupported(f"a cache of {cache.capacity} slots; it takes {LANES} or more")
        most = min(STEP, cache.capacity // LANES * LANES)
        unit = most if block is None else math.gcd(most, block)
    lanes = order == "transposed" or (cache.factors is not None and cache.kind != "paged")
    multiple = LANES if lanes else 1 if order == "tokens" else 32 // cache.k.dtype.itemsize
    ends = unit if cache.kind == "paged" else math.gcd(unit, cache.capacity)
    if cache.factors is not None and cache.kind == "paged" and unit != cache.k.shape[2]:
        raise Unsupported(f"int8 pages of {cache.k.shape[2]} read in blocks of {unit}; make lists of whole pages")
    if ends % multiple:
        raise Unsupported(
            f"blocks of {unit} tokens in {cache.capacity} slots; for {cache.k.dtype} of head dim {cache.k.shape[-1]} it"
            f" takes multiples of {multiple}"
        )
    per_step = 1
    while unit * per_step < min(STEP, cache.capacity) or unit * per_step % LANES:
        per_step *= 2
        if per_step > CHUNK:
            raise Unsupported(f"blocks of {unit} tokens; {CHUNK} of them do not fill a step of {LANES} lanes")
    return unit, per_step


def attend_with(call: Call, layout: Layout, parts: int) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """`attend` with a chosen layout, each request divided among `parts` TensorCores."""
    cache, plan = call.cache, call.plan
    batch, queries, _, dim = call.q.shape
    paged = cache.page_table is not None
    c = Config(
        layout=layout,
        batch=batch,
        queries=queries,
        group=call.group,
        kv_heads=cache.num_kv_heads,
        dim=dim,
        value_dim=cache.v.shape[-1],
        capacity=cache.capacity,
        rows_per_page=cache.k.shape[2] // layout.unit if paged else 0,
        ring=cache.ring,
        quantized=cache.factors is not None,
        dense=plan.dense,
        lists=call.lists is not None,
        scale=call.scale,
        soft_cap=call.soft_cap,
        parts=parts,
    )
    o, lse = _launch(c, call, make_visits(call, layout, parts))
    pairs = [(_unrows(c, o[p]), _unrows(c, lse[p, ..., None])[..., 0].swapaxes(1, 2)) for p in range(parts)]
    o, lse = pairs[0] if parts == 1 else merge_attention(*pairs)
    return o.astype(call.q.dtype), lse


def _rows(c: Config, q: Array) -> Array:
    """[B,T,H,D] as [B*sets, heads, rows, D]."""
    q = q.reshape(c.batch, c.queries, c.kv_heads, c.group, -1).swapaxes(1, 2)
    q = q.reshape(c.programs, c.heads, c.queries * c.group, -1)
    return jnp.pad(q, ((0, 0), (0, 0), (0, c.rows - q.shape[2]), (0, 0)))


def _unrows(c: Config, x: Array) -> Array:
    """[B*sets, heads*rows, N] as [B,T,H,N]."""
    x = x.reshape(c.batch, c.kv_heads, c.rows, -1)[:, :, : c.queries * c.group]
    return (
        x.reshape(c.batch, c.kv_heads, c.queries, c.group, -1)
        .swapaxes(1, 2)
        .reshape(c.batch, c.queries, -1, x.shape[-1])
    )


def _numbers(c: Config, call: Call) -> Array:
    """What differs between the rows of a set: place among the new tokens, sink, window; [3, sets, heads*rows, 128]."""
    head = jnp.asarray(call.plan.pattern_of_head)
    of_head = lambda x: jnp.broadcast_to(jnp.asarray(x)[head], (c.queries, head.shape[0]))
    place = jnp.broadcast_to(jnp.arange(c.queries)[:, None], (c.queries, head.shape[0]))
    one = lambda x: jnp.broadcast_to(x[None, ..., None], (c.batch, *x.shape, 1))
    rows = [_rows(c, one(x))[: c.layout.sets] for x in (place, of_head(call.plan.sink), of_head(call.plan.window))]
    table = jnp.stack(rows).reshape(3, c.layout.sets, c.heads * c.rows, 1)
    return jnp.broadcast_to(table, (*table.shape[:3], LANES)).astype(jnp.int32)


def _stored(c: Config, x: Array) -> Array:
    """The cache in the order it lies in: a view, as XLA keeps it so."""
    paged, order = bool(c.rows_per_page), c.layout.order
    if order == "tokens" or (order == "heads" and paged):
        return x
    x = x if paged else x.swapaxes(1, 2)
    return x if order == "heads" else x.swapaxes(2, 3)


def _places(layout: Layout, visits: Visits) -> dict[str, Array]:
    """Visits of each program, and where its steps and chunks begin on the line of all programs."""
    steps = jnp.maximum(-(-visits.count // layout.per_step), 1)
    begin = lambda n: jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(n)]).astype(jnp.int32)
    chunks = -(-steps // layout.steps_per_chunk)
    return {"count": visits.count, "first_step": begin(steps), "first_chunk": begin(chunks)}


def _launch(c: Config, call: Call, visits: Visits) -> tuple[Array, Array]:
    """o [parts, B*sets, heads*rows, Dv] and lse [parts, B*sets, heads*rows]."""
    cache, layout = call.cache, c.layout
    scalars = {**_places(layout, visits), "lengths": cache.lengths.astype(jnp.int32)}
    hbm, rows = pl.BlockSpec(memory_space=pltpu.HBM), c.heads * c.rows
    inputs = {
        "q": (_rows(c, call.q), pl.BlockSpec((1, c.heads, c.rows, c.dim), lambda p, i, *_: (i, 0, 0, 0))),
        "numbers": (
            _numbers(c, call),
            pl.BlockSpec((3, 1, rows, LANES), lambda p, i, *_: (0, lax.rem(i, layout.sets), 0, 0)),
        ),
        "stream": (visits.stream, hbm),
        "k": (_stored(c, cache.k), hbm),
        "v": (_stored(c, cache.v), hbm),
    }
    scratch = {
        "k_tile": pltpu.VMEM(_tile(c, c.dim), cache.k.dtype),
        "v_tile": pltpu.VMEM(_tile(c, c.value_dim), cache.v.dtype),
        "top": pltpu.VMEM((rows, LANES), jnp.float32),
        "mass": pltpu.VMEM((rows, LANES), jnp.float32),
        "total": pltpu.VMEM((rows, c.value_dim), jnp.float32),
        "chunk": pltpu.SMEM((SLOTS, 1, 2 * CHUNK), jnp.int32),
        "chunk_sem": pltpu.SemaphoreType.DMA((SLOTS,)),
        "sems": pltpu.SemaphoreType.DMA((3, 2)),
    }
    if c.quantized:
        inputs["factors"] = jnp.asarray(cache.factors), hbm
        scratch["factor_tile"] = pltpu.VMEM((2, layout.per_step, c.kv_heads, layout.unit), jnp.int32)
    kept = jnp.float32 if c.parts > 1 else call.q.dtype
    shapes = [
        jax.ShapeDtypeStruct((c.parts, c.programs, rows, c.value_dim), kept),
        jax.ShapeDtypeStruct((c.parts, c.programs, 1, rows), jnp.float32),
    ]
    specs = [pl.BlockSpec((1, 1, *s.shape[2:]), lambda p, i, *_: (p, i, 0, 0)) for s in shapes]
    names, mode = [*scalars, *inputs, "o", "lse", *scratch], interpreter()

    def body(*refs):
        _kernel(c, types.SimpleNamespace(**dict(zip(names, refs, strict=True))))

    o, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(c.parts, c.programs),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=specs,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=shapes,
        # Programs of a part hand copies in flight to each other; parts have nothing in common.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        interpret=mode if mode is not None else False,
        name="decode_attention",
    )(*scalars.values(), *(x for x, _ in inputs.values()))
    return o, lse[:, :, 0]


def _tile(c: Config, dim: int) -> tuple[int, ...]:
    """Two slots of a step of keys or values."""
    tokens = c.layout.tokens
    shapes = {"heads": (c.heads, tokens, dim), "tokens": (tokens, c.heads, dim), "transposed": (c.heads, dim, tokens)}
    return 2, *shapes[c.layout.order]


def copies(c: Config, r, program, slot, n, place, act: str) -> None:
    """Start or wait for the copies of a step's unit `n`, which lies at `place`."""
    unit, order = c.layout.unit, c.layout.order
    request, head = program // c.layout.sets, lax.rem(program, c.layout.sets)
    heads = pl.ds(0, c.kv_heads) if c.layout.sets == 1 else pl.ds(head, 1)
    held = pl.ds(pl.multiple_of(n * unit, math.gcd(unit, LANES)), unit)
    if c.rows_per_page:
        owner, start = lax.div(place, c.rows_per_page), lax.rem(place, c.rows_per_page) * unit
    else:
        owner, start = request, place
    rows = pl.ds(pl.multiple_of(start, math.gcd(unit, unit if c.rows_per_page else c.capacity, LANES)), unit)
    pairs = []
    for source, target in ((r.k, r.k_tile), (r.v, r.v_tile)):
        match order:
            case "heads":
                pairs.append((source.at[owner, heads, rows], target.at[slot, :, held]))
            case "tokens":
                pairs.append((source.at[owner, rows], target.at[slot, held]))
            case "transposed":
                pairs.append((source.at[owner, heads, :, rows], target.at[slot, :, :, held]))
    if c.quantized:
        source = r.factors.at[owner] if c.rows_per_page else r.factors.at[owner, :, rows]
        pairs.append((source, r.factor_tile.at[slot, n]))
    for m, (source, target) in enumerate(pairs):
        getattr(pltpu.make_async_copy(source, target, r.sems.at[m, slot]), act)()


def _chunk(c: Config, r, program, n, act: str) -> None:
    """Start or wait for chunk `n` of a program's stream."""
    slot = lax.rem(r.first_chunk[program] + n, SLOTS)
    getattr(pltpu.make_async_copy(r.stream.at[program, n], r.chunk.at[slot], r.chunk_sem.at[slot]), act)()


def _transfer(c: Config, r, program, step, act: str) -> None:
    """Start or wait for all copies of a program's step."""
    per_step, base = c.layout.per_step, program - lax.rem(program, c.programs)
    slot = lax.rem(r.first_step[program] + step, 2)
    chunk = lax.rem(r.first_chunk[program] + lax.div(step, c.layout.steps_per_chunk), SLOTS)
    entry = lax.rem(step, c.layout.steps_per_chunk) * per_step

    def unit(n, carry):
        copies(c, r, program - base, slot, n, r.chunk[chunk, 0, entry + n], act)
        return carry

    lax.fori_loop(0, jnp.minimum(r.count[program] - step * per_step, per_step), unit, 0)


def _open(c: Config, r, program, step) -> None:
    """Start the copies of a step; with the first of a chunk, wait for the chunk and start the one after it."""
    per_chunk = c.layout.steps_per_chunk
    chunk = lax.div(step, per_chunk)

    @pl.when(lax.rem(step, per_chunk) == 0)
    def _():
        _chunk(c, r, program, chunk, "wait")
        chunks = r.first_chunk[program + 1] - r.first_chunk[program]
        last = chunk + 1 == chunks
        following = jnp.where(last, program + 1, program)

        @pl.when(jnp.logical_not(last) | (lax.rem(following, c.programs) > 0))
        def _():
            _chunk(c, r, following, jnp.where(last, 0, chunk + 1), "start")

    _transfer(c, r, program, step, "start")


def _kernel(c: Config, r) -> None:
    place = pl.program_id(1)
    program = pl.program_id(0) * c.programs + place
    steps = r.first_step[program + 1] - r.first_step[program]
    length = r.lengths[lax.div(place, c.layout.sets)]

    @pl.when(place == 0)
    def _():
        _chunk(c, r, program, 0, "start")
        _open(c, r, program, 0)

    r.top[...] = jnp.full_like(r.top, LOWEST)
    r.mass[...] = jnp.zeros_like(r.mass)
    r.total[...] = jnp.zeros_like(r.total)

    def body(step, carry):
        last = step + 1 == steps

        @pl.when(jnp.logical_not(last) | (place + 1 < c.programs))
        def _():
            _open(c, r, jnp.where(last, program + 1, program), jnp.where(last, 0, step + 1))

        _transfer(c, r, program, step, "wait")
        slot = lax.rem(r.first_step[program] + step, 2)
        whole = _is_whole(c, r, program, step)
        units = lambda: visible(c, r, length, _units(c, r, program, step))
        pl.when(whole)(lambda: _multiply(c, r, slot, None))
        pl.when(jnp.logical_not(whole))(lambda: _multiply(c, r, slot, units()))
        return carry

    lax.fori_loop(0, steps, body, 0)
    mass = r.mass[...]
    empty = mass == 0.0
    safe = jnp.where(empty, 1.0, mass)
    r.o[0, 0] = (r.total[...] * wide(jnp.where(empty, 0.0, 1.0 / safe), c.value_dim)).astype(r.o.dtype)
    lse = jnp.where(empty, -jnp.inf, r.top[...] * LN2 + jnp.log(safe))
    r.lse[0, 0] = jnp.transpose(lse)[:1]


def _tags(c: Config, r, program, step) -> list:
    """(place, tag) of each unit of a step."""
    chunk = lax.rem(r.first_chunk[program] + lax.div(step, c.layout.steps_per_chunk), SLOTS)
    entry = lax.rem(step, c.layout.steps_per_chunk) * c.layout.per_step
    return [(r.chunk[chunk, 0, entry + n], r.chunk[chunk, 0, CHUNK + entry + n]) for n in range(c.layout.per_step)]


def _is_whole(c: Config, r, program, step):
    """Whether every row reads every key of the step."""
    marks = jnp.int32(WHOLE)
    for _, tag in _tags(c, r, program, step):
        marks &= tag
    return (marks == WHOLE) & ((step + 1) * c.layout.per_step <= r.count[program])


def _units(c: Config, r, program, step) -> tuple:
    """Rows [1, tokens] of a step: position or slot of each key (-1 where no unit came), its least, whether listed."""
    unit, per_step = c.layout.unit, c.layout.per_step
    lane = lax.broadcasted_iota(jnp.int32, (1, c.layout.tokens), 1)
    slot = least = listed = jnp.full_like(lane, -1)
    for n, (place, tag) in enumerate(_tags(c, r, program, step)):
        here = (lane >= n * unit) & (lane < (n + 1) * unit)
        some = step * per_step + n < r.count[program]
        low = lax.div(tag, 4)
        start = place if c.clamped else low
        slot = jnp.where(here & some, lane + (start - n * unit), slot)
        least = jnp.where(here, low, least)
        listed = jnp.where(here, tag & LISTED, listed)
    return slot, least, listed


def visible(c: Config, r, length, units) -> Array:
    """Who reads what in a step that is not whole: bool [heads * rows, tokens]."""
    slot, least, listed = units
    alive = slot >= 0
    if c.clamped:
        alive &= slot >= least
    position = slot
    if c.ring is not None:
        position = ring_position(slot, length, c.ring, c.capacity)
        alive &= position >= jnp.minimum(slot, c.ring)
    shape = (c.heads * c.rows, c.layout.tokens)
    column = lambda n: wide(r.numbers[n, 0], c.layout.tokens)
    position = jnp.broadcast_to(position, shape)
    query = column(0) + (length - c.queries)
    keep = (position <= query) & jnp.broadcast_to(alive, shape)
    if c.dense and not c.lists:
        return keep
    allow = (position < column(1)) | (query - position < column(2))
    if c.lists:
        allow = allow != (jnp.broadcast_to(listed, shape) > 0)
    return keep & allow


def ring_position(slot, length, ring: int, capacity: int):
    """The position that a slot of a ring cache holds (see `KVCache`); below `ring` where it holds none."""
    period = capacity - ring
    last = length - 1
    newest = ring + lax.rem(jnp.maximum(last - ring, 0), period)  # slot of the last token
    turned = last - (newest - slot) - jnp.where(slot > newest, period, 0)
    return jnp.where(slot < ring, jnp.where(slot <= last, slot, -1), turned)


def _multiply(c: Config, r, slot, keep) -> None:
    """One step of the softmax over the keys in a slot; `keep` masks them, or is None where all are read."""
    keys, values = _heads_of(c, r.k_tile.at[slot], c.dim), _heads_of(c, r.v_tile.at[slot], c.value_dim)
    dtype, flat = r.q.dtype, c.layout.order != "transposed"
    scale = c.scale * LOG2E if c.soft_cap is None else c.scale / c.soft_cap
    factors = [_factors(c, r, slot, h) for h in range(c.heads)] if c.quantized else []
    scores = []
    for h, k in enumerate(keys):
        factor = factors[h][0] * scale if c.quantized else scale
        scores.append(product(r.q[0, h], k.astype(dtype), "nt" if flat else "nn") * factor)
    score = jnp.concatenate(scores, 0)
    if c.soft_cap is not None:
        score = jnp.tanh(score) * (c.soft_cap * LOG2E)
    if keep is not None:
        score = jnp.where(keep, score, HIDDEN)
    old = r.top[...]
    new = jnp.maximum(old, score.max(1, keepdims=True))
    weight = jnp.exp2(score - wide(new, c.layout.tokens))
    shrink = jnp.exp2(old - new)
    r.top[...] = new
    r.mass[...] = r.mass[...] * shrink + weight.sum(1, keepdims=True)
    parts = []
    for h, v in enumerate(values):
        rows = slice(h * c.rows, (h + 1) * c.rows)
        mine, v = weight[rows], v.astype(dtype)
        if c.quantized:
            mine = mine * factors[h][1]
            mine = mine if keep is None else jnp.where(keep[rows], mine, 0.0)
        elif keep is not None:
            v = finite(v)
        parts.append(product(mine.astype(dtype), v, "nn" if flat else "nt"))
    r.total[...] = r.total[...] * wide(shrink, c.value_dim) + jnp.concatenate(parts, 0)


def _factors(c: Config, r, slot, h: int):
    """The int8 factors of a program's head, [1, tokens] of the keys and of the values."""
    head = h if c.layout.sets == 1 else lax.rem(pl.program_id(1), c.layout.sets)
    words = [r.factor_tile[slot, n, pl.ds(head, 1)] for n in range(c.layout.per_step)]
    return unpack_factors(jnp.concatenate(words, 1))


def _heads_of(c: Config, ref, dim: int) -> list:
    """Keys or values of each head in a slot: [tokens, D], or [D, tokens] where they lie so."""
    if c.layout.order != "tokens":
        return [ref[h] for h in range(c.heads)]
    if interpreter() is not None:  # which reads no reshaped refs
        return [ref[:, h] for h in range(c.heads)]
    packing, tokens = 4 // ref.dtype.itemsize, c.layout.tokens
    rows = ref.reshape(tokens * c.heads, dim)
    if packing > 1:
        rows = rows.bitcast(jnp.int32)  # neighbouring heads share a word, the first in its low bits
    stride, found = c.heads // packing, []
    for g in range(stride):
        lanes = [rows[pl.ds(g, tokens, stride=stride), pl.ds(at, LANES)] for at in range(0, dim, LANES)]
        words = lanes[0] if len(lanes) == 1 else jnp.concatenate(lanes, 1)
        found += [unpacked(words, n, ref.dtype) for n in range(packing)]
    return found


def unpacked(words, n: int, dtype):
    """Value `n` of each 32-bit word; int8 codes as float32."""
    if dtype == jnp.float32:
        return words
    if dtype == jnp.bfloat16:
        high = words << 16 if n == 0 else words & jnp.int32(-65536)
        return lax.bitcast_convert_type(high, jnp.float32).astype(jnp.bfloat16)
    return lax.shift_right_arithmetic(words << (24 - 8 * n), 24).astype(jnp.float32)
