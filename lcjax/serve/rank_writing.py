"""Ranking documents by writing their numbers: the generating form of BlockRank (arXiv 2510.05396).

The attention is that of the document blocks, without their padding: the first block is read once, every document behind
a copy of it, and their keys are put in a row. The last block follows them at its own positions, and the answer follows
it as in any text.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lcjax.cache import DenseCache, init_caches
from lcjax.data.ranking import RankingPrompt
from lcjax.methods.duo import is_full
from lcjax.models.decoder import abstract
from lcjax.models.spec import Attention, ModelSpec
from lcjax.positions.tables import rotates_at_read
from lcjax.serve.rank import bucketed, check_prompt
from lcjax.serve.source import Loaded

type Caches = tuple[DenseCache, ...]


class Writer:
    """Ranks by the numbers that a model trained with `BlockRank` writes, at most `tokens` tokens of them, greedily."""

    def __init__(self, model: Loaded, prompt: RankingPrompt, tokens: int = 16):
        """Raises ValueError for positions beyond the model's context, and for layers other than full attention."""
        check_prompt(model, prompt)
        for layer, mixer in enumerate(model.spec.layers):
            if not (isinstance(mixer, Attention) and is_full(mixer)) or rotates_at_read(mixer.rope, None):
                raise ValueError(f"Writer: layer {layer} is {mixer}, and documents are read by full attention only")
        if tokens < 1:
            raise ValueError(f"Writer: tokens is {tokens}; an answer needs at least 1")
        self._model, self._prompt, self._tokens = model, prompt, tokens

    def rank(self, query: str, documents: Sequence[str]) -> list[int]:
        """Indices of the documents in the order of their numbers in the answer; those it does not name are left out."""
        named = [int(number) - 1 for number in re.findall(r"\d+", self.answer(query, documents))]
        return [i for i in dict.fromkeys(named) if 0 <= i < len(documents)]

    def answer(self, query: str, documents: Sequence[str]) -> str:
        """What the model writes before the closing bracket."""
        tokenizer, written = self._model.tokenizer, []
        for logits in self.logits(query, documents, written):
            token = int(np.argmax(logits))
            if token in tokenizer.stop_ids or len(written) == self._tokens:
                break
            written.append(token)
            if "]" in tokenizer.decode(written):
                break
        return tokenizer.decode(written).split("]")[0]

    def logits(self, query: str, documents: Sequence[str], written: Sequence[int]) -> Iterator[Float[np.ndarray, " V"]]:
        """Logits behind the prompt, then behind each token of `written`, which the caller appends to in between.

        Raises DataError for no documents, and for one that does not fit its block.
        """
        prompt, spec, params = self._prompt, self._model.spec, self._model.params
        blocks = bucketed(len(documents))
        prompt.row(self._model.tokenizer, query, documents, blocks=blocks)  # its checks
        head, texts, tail = prompt.parts(self._model.tokenizer, query, documents)
        parts = [head, *texts, *[[]] * (blocks - len(texts)), tail]
        ids = np.zeros((blocks + 2, prompt.size), np.int32)
        for row, part in zip(ids, parts, strict=True):
            row[: len(part)] = part
        lengths = np.array([len(part) for part in parts], np.int32)
        read, step = _programs(spec, prompt.offset, blocks * prompt.size + 2 * prompt.size + self._tokens)
        found, caches = read(params, ids, lengths)
        yield np.asarray(found)
        for count, token in enumerate(written):
            position = np.full((1, 1), prompt.offset + len(tail) + count, np.int32)
            found, caches = step(params, np.full((1, 1), token, np.int32), position, caches)
            yield np.asarray(found)


@functools.lru_cache(maxsize=8)
def _programs(spec: ModelSpec, offset: int, capacity: int) -> tuple[Any, Any]:
    """`read(params, ids, lengths)` and `step(params, token, position, caches)`, both -> (logits `[V]`, caches)."""
    graphdef = abstract(spec)[0]

    def read(
        params: nnx.State, ids: Int[Array, "blocks size"], lengths: Int[Array, " blocks"]
    ) -> tuple[Float[Array, " V"], Caches]:
        model = nnx.merge(graphdef, params)
        size, documents = ids.shape[1], ids.shape[0] - 2
        column = jnp.arange(size, dtype=jnp.int32)
        real = column < lengths[:, None]
        _, first = model.hidden(ids[:1], caches=init_caches(spec, 1, 2 * size), valid=real[:1])
        copies = tuple(cache.fork(np.zeros(documents, np.int32)) for cache in first)
        where = jnp.broadcast_to(lengths[0] + column, (documents, size))
        _, copies = model.hidden(ids[1:-1], positions=where, caches=copies, valid=real[1:-1])
        caches = tuple(_in_a_row(cache, lengths, capacity) for cache in copies)
        x, caches = model.hidden(ids[-1:], positions=offset + column[None], caches=caches, valid=real[-1:])
        return model.logits(x[0, lengths[-1] - 1]), caches

    def step(
        params: nnx.State, token: Int[Array, "1 1"], position: Int[Array, "1 1"], caches: Caches
    ) -> tuple[Float[Array, " V"], Caches]:
        model = nnx.merge(graphdef, params)
        x, caches = model.hidden(token, positions=position, caches=caches)
        return model.logits(x[0, 0]), caches

    return jax.jit(read), jax.jit(step, donate_argnums=3)


def _in_a_row(cache: DenseCache, lengths: Int[Array, " blocks"], capacity: int) -> DenseCache:
    """One request: the first block's keys, then each document's, from a request `[first block, document]` for each."""
    slots, head = cache.capacity, lengths[0]
    ends = head + jnp.cumsum(lengths[1:-1])
    place = jnp.arange(capacity, dtype=jnp.int32)
    document = jnp.minimum(jnp.searchsorted(ends, place, side="right"), lengths.shape[0] - 3)
    begin = ends[document] - lengths[1 + document]
    within = jnp.where(place < head, place, head + place - begin)
    source = jnp.where(place < head, 0, document) * slots + jnp.clip(within, 0, slots - 1)
    k, v = (x.reshape(-1, *x.shape[2:])[source][None] for x in (cache.k, cache.v))
    return DenseCache(k, v, None, ends[-1:], ends[-1:])
