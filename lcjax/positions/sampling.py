"""Sampled positions: training on short rows while the rotary angles range over a long context.

A sampler turns the rows of a batch into their positions float32 [B,T]. A packed row holds several documents, which do
not see one another: each draws for itself, as the papers' sequences do. Row r of step s draws from a generator keyed by
(seed, s, r): a resumed run sees what it would have seen, on any number of processes. Attention stays causal over the
stored order.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


def _at_least(sampler: object, least: int, *fields: str) -> None:
    for name in fields:
        if getattr(sampler, name) < least:
            value = getattr(sampler, name)
            raise ValueError(f"{type(sampler).__name__}.{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class Sampler:
    """Base: tokens since the document's start."""

    def document(self, rng: np.random.Generator, ids: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """float64 positions of one document of at least one token."""
        del rng
        return np.arange(len(ids), dtype=np.float64)

    def row(
        self, rng: np.random.Generator, ids: Int[np.ndarray, " T"], segments: Int[np.ndarray, " T"]
    ) -> Float[np.ndarray, " T"]:
        """float64 positions of one row: those of its documents, drawn in their order; 0 for padding."""
        found = np.zeros(len(ids))
        for number in np.unique(segments[segments > 0]):
            here = segments == number
            found[here] = self.document(rng, ids[here])
        return found

    def positions(
        self,
        inputs: Int[np.ndarray, "B T"],
        segment_ids: Int[np.ndarray, "B T"],
        seed: int,
        step: int,
        first_row: int,
    ) -> Float[np.ndarray, "B T"]:
        """float32 positions of a batch whose rows are `first_row`, first_row + 1... of this step.

        segment_ids: document of each token, 0 is padding.
        """
        rngs = (np.random.default_rng([seed, step, first_row + r]) for r in range(len(inputs)))
        return np.stack(list(map(self.row, rngs, inputs, segment_ids))).astype(np.float32)


@dataclass(frozen=True)
class Randomised(Sampler):
    """Giraffe's randomised positions (arXiv 2308.10882): steps uniform in [0, 2), shrunk to end within the text."""

    def document(self, rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
        found = np.cumsum(2 * rng.random(len(ids)))
        return found * min(1.0, len(ids) / found[-1])


@dataclass(frozen=True)
class E2LLM(Sampler):
    """E2-LLM (Liu et al., arXiv 2401.06951): a scale g and an offset t for each document: one run serves all scales.

    Position m becomes m / g for the first `anchors` tokens and (m + t) / g for the rest. g is uniform among those from
    ceil(n / original_length) to `max_scale`: short documents teach small scales as well, long ones the large ones. t is
    uniform up to the paper's (g - 1) `original_length`, less for a document longer than that: all positions lie below
    it. max_scale 1 is plain. Use the model with `DynamicLinear`.
    """

    original_length: int = 0
    max_scale: int = 20
    anchors: int = 4

    def __post_init__(self):
        _at_least(self, 1, "original_length", "max_scale")
        _at_least(self, 0, "anchors")

    def document(self, rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
        least = -(-len(ids) // self.original_length)
        if least > self.max_scale:
            raise ValueError(
                f"E2LLM.max_scale is {self.max_scale}; a document of {len(ids)} tokens needs {least} to lie below "
                f"original_length {self.original_length}: raise it, or train in shorter rows"
            )
        scale = int(rng.integers(least, self.max_scale + 1))
        found = np.arange(len(ids), dtype=np.float64)
        most = scale * self.original_length - max(len(ids), self.original_length)
        found[self.anchors :] += rng.integers(0, most + 1)
        return found / scale


@dataclass(frozen=True)
class CLEXPositions(Sampler):
    """CLEX's training positions (arXiv 2310.16450): t in 1..max_factor, then T sorted positions from 0 to T t - 1.

    A row longer than `original_length` has its positions divided by how many times it is. The documents of a row share
    its t: the frequencies of `CLEX` follow a row's largest position.
    """

    original_length: int = 0
    max_factor: int = 16

    def __post_init__(self):
        _at_least(self, 1, "original_length", "max_factor")

    def row(self, rng: np.random.Generator, ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
        del segments
        length, factor = len(ids), int(rng.integers(1, self.max_factor + 1))
        if length < 3 or factor == 1:
            return np.arange(length, dtype=np.float64) / max(length // self.original_length, 1)
        inner = np.sort(rng.choice(length * factor - 2, length - 2, replace=False)) + 1
        found = np.concatenate([[0], inner, [length * factor - 1]]).astype(np.float64)
        return found / max(length // self.original_length, 1)


@dataclass(frozen=True)
class LongRecipe(Sampler):
    """LongRecipe's transform (Hu et al., arXiv 2409.00509): whole sentences spread over `target` positions.

    Positions run on within a sentence and skip between sentences; a random prefix of up to half the document keeps its
    own. boundaries: ids of the tokens that end a sentence (the tokenizer's for ". \\n ? ! .\\n").
    """

    target: int = 0
    boundaries: tuple[int, ...] = ()

    def __post_init__(self):
        _at_least(self, 1, "target")
        if not self.boundaries:
            raise ValueError("LongRecipe.boundaries is empty; give the ids of the tokens that end a sentence")

    def document(self, rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
        length = len(ids)
        if self.target < length:
            raise ValueError(f"LongRecipe.target {self.target} is below a document of {length} tokens; raise it")
        ends = np.isin(ids[:-1], self.boundaries)
        sentence = np.concatenate([[0], np.cumsum(ends)])
        count = int(sentence[-1]) + 1
        slots = np.sort(rng.choice(self.target - length + count, count, replace=False))
        slots[0] = 0
        found = np.arange(length) + (slots - np.arange(count))[sentence]
        kept = int(rng.integers(1, (length + 1) // 2 + 1))
        found[:kept] = np.arange(kept)
        return found.astype(np.float64)


@dataclass(frozen=True)
class Stretch(Sampler):
    """Lines that count up to `factor` times, for `stretched` linear attention: short rows that stand for long texts.

    Each row, its documents together, draws n from 1 to `factor`, log-uniform, and half of its lines, whose tokens then
    lie n apart. What is written in the other lines has to last, and to outweigh the stretched ones, as it would in a
    text n times as long. boundaries: ids of the tokens that end a line.
    """

    factor: float = 1.0
    boundaries: tuple[int, ...] = ()

    def __post_init__(self):
        _at_least(self, 1, "factor")
        if not self.boundaries:
            raise ValueError("Stretch.boundaries is empty; give the ids of the tokens that end a line")

    def row(self, rng: np.random.Generator, ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
        del segments
        line = np.concatenate([[0], np.cumsum(np.isin(ids[:-1], self.boundaries))])
        step = self.factor ** rng.random()
        return np.cumsum(np.where(rng.random(line[-1] + 1) < 0.5, step, 1.0)[line]) - 1
