"""Ranking documents for a query in one pass that stops at the scoring layer (BlockRank, arXiv 2510.05396)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lcjax.data.ranking import RankingPrompt
from lcjax.methods.blockrank import BlockRank
from lcjax.methods.blockrank.shares import read_documents
from lcjax.models.decoder import abstract
from lcjax.models.spec import ModelSpec
from lcjax.serve.engine import bucket
from lcjax.serve.source import Loaded

LEAST = 8  # documents that a program is made for


class Ranker:
    """Ranks by a model of full attention that was trained with `BlockRank`; `layer` is the loss's, counted from 0.

    Programs are compiled for a few numbers of documents, the next one up; the blocks left over are padding.
    """

    def __init__(self, model: Loaded, prompt: RankingPrompt, layer: int):
        """Raises ValueError for a layer that the model lacks, and for positions beyond its context."""
        if not 0 <= layer < model.spec.num_layers:
            raise ValueError(f"Ranker: layer {layer} is none of {model.source}'s 0 to {model.spec.num_layers - 1}")
        check_prompt(model, prompt)
        self._model, self._prompt, self._layer = model, prompt, layer

    def scores(self, query: str, documents: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Share of the attention that each document gets; they sum to 1.

        Raises DataError for no documents, and for one that does not fit its block.
        """
        blocks = bucketed(len(documents))
        row = self._prompt.row(self._model.tokenizer, query, documents, blocks=blocks)
        batch = {name: jnp.asarray(value)[None] for name, value in row.items()}
        program = score_program(self._model.spec, blocks, self._prompt.size, self._layer)
        return np.asarray(program(self._model.params, batch))[0, : len(documents)]

    def rank(self, query: str, documents: Sequence[str]) -> list[int]:
        """Indices of the documents, best first; of equals the earlier."""
        return np.argsort(-self.scores(query, documents), kind="stable").tolist()


def check_prompt(model: Loaded, prompt: RankingPrompt) -> None:
    """Raise ValueError for positions beyond the model's context."""
    if prompt.offset + prompt.size > model.spec.max_length:
        raise ValueError(
            f"RankingPrompt.offset {prompt.offset} and size {prompt.size} reach position "
            f"{prompt.offset + prompt.size}, and {model.source} was trained to {model.spec.max_length}: lower the "
            "offset"
        )


def bucketed(documents: int) -> int:
    """Blocks of the program for so many documents."""
    return bucket(documents, LEAST)


@functools.lru_cache(maxsize=8)
def score_program(spec: ModelSpec, documents: int, size: int, layer: int) -> Any:
    """The jitted function (params, batch) -> shares `[B,N]`; layers behind the scoring one are not run."""
    graphdef = abstract(BlockRank(size, documents).model(spec))[0]

    def score(params: nnx.State, batch: dict[str, Array]) -> Float[Array, "B N"]:
        return read_documents(nnx.merge(graphdef, params), batch, layer, size)[0]

    return jax.jit(score)
