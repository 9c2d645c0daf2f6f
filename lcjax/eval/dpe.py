"""Detecting DPE's numbers for a model (Lu et al., arXiv 2504.18857), and evaluating the model under them."""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from lcjax.eval.budget import BudgetError, prompt_ids
from lcjax.eval.haystack import read_text
from lcjax.eval.laws import CompareLaws, Law
from lcjax.eval.measure import Table
from lcjax.eval.task import Task
from lcjax.eval.tasks.needles import NiahMultivalue
from lcjax.methods.base import identity_of
from lcjax.methods.dpe import trial
from lcjax.methods.dpe.plan import DetectedDPE, Plan, remapped
from lcjax.positions.dpe import detect_factors, select_pairs
from lcjax.serve.source import Loaded

CHARACTERS = 2_000_000
SHORTEST = 2048  # tokens of an excerpt that pairs are weighed on, unless the model is trained on less


class Rows(NamedTuple):
    """Prompts with their answers, padded to one length: after `places` stand `targets`, where `there` is true."""

    tokens: Int[np.ndarray, "N T"]
    places: Int[np.ndarray, "N A"]
    targets: Int[np.ndarray, "N A"]
    there: Bool[np.ndarray, "N A"]


@dataclass(frozen=True)
class DetectDPE:
    """Finds the numbers, writes plan.json into the output folder and runs `then` with them as one more law.

    Pairs: the share `selected` of each head's pairs that contribute most to its scores, over `excerpts` stretches of
    `text` (as in `read_text`) of each of the trained length, its half, ... and 2,048 tokens. Factors: for each of
    `groups` runs of pairs, fast to slow, the one of length / l, l = length, length / 2, ... `least`, under which the
    model writes the largest share of the answers' tokens of `task` at `length` tokens, each given those before it; the
    other groups stay at 2 length / trained length. The paper: four values of one key, 100 examples, 3/4 of the pairs.
    """

    task: Task = field(default_factory=lambda: NiahMultivalue(num_examples=20))
    length: int = 32768
    groups: int = 8
    window: int = 1024
    least: int = 1024
    selected: float = 0.75
    text: str = "python"
    excerpts: int = 10
    seed: int = 0
    then: CompareLaws | None = None
    name: str = "dpe"

    def __post_init__(self):
        if not 0 < self.least <= self.length:
            raise ValueError(f"detect_dpe.least {self.least} must lie in 1..{self.length}, the length")
        largest = 2 ** ((self.length // self.least).bit_length() - 1)
        if self.window % largest:
            raise ValueError(
                f"detect_dpe.window {self.window} does not fit: the largest factor {largest} must divide it"
            )
        if not 0 < self.selected <= 1 or self.excerpts < 1 or self.groups < 1:
            raise ValueError(
                f"detect_dpe: selected {self.selected} must be a share above 0, and excerpts {self.excerpts} and "
                f"groups {self.groups} at least 1"
            )

    def check(self) -> None:
        """Refuse a missing text before the model is loaded."""
        if self.then is not None:
            self.then.check()

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """{name_factors: {group: factor}, name_lengths: {group: tokens}}, shares of answers, and what `then` finds.

        The shares, {name_detected, name_plain, name_one_factor: {length: share}}, are those of the detected factors, of
        the model as it is, and of 2 length / trained length for all groups.
        """
        pairs, trained = remapped(model.spec)[1], model.spec.max_length
        if pairs % self.groups or self.length <= trained:
            raise ValueError(
                f"detect_dpe: groups {self.groups} must divide the {pairs} pairs of a head, and length {self.length} "
                f"be above the {trained} tokens of {model.source}"
            )
        began = time.perf_counter()
        chosen = self.chosen(model, pairs)
        score = self.scorer(model, chosen)
        factors = detect_factors(score, groups=self.groups, length=self.length, trained=trained, least=self.least)
        all_by = lambda factor: (factor,) * self.groups
        forms = {"detected": factors, "plain": all_by(1), "one_factor": all_by(2 * self.length // trained)}
        shares = {form: score(numbers) for form, numbers in forms.items()}
        self.plan(model, factors, chosen, shares).save(output / "plan.json")
        print(f"{self.name}: {factors} after {time.perf_counter() - began:.0f} s, {output / 'plan.json'}", flush=True)
        tables: dict[str, Table] = {
            f"{self.name}_factors": {str(group): float(factor) for group, factor in enumerate(factors)},
            f"{self.name}_lengths": {str(group): self.length / factor for group, factor in enumerate(factors)},
        }
        tables |= {f"{self.name}_{form}": {str(self.length): share} for form, share in shares.items()}
        if self.then is None:
            return tables
        law = Law("DPE, detected", method=DetectedDPE(str(output / "plan.json")))
        return tables | replace(self.then, laws=(*self.then.laws, law)).run(model, output)

    def plan(
        self, model: Loaded, factors: tuple[int, ...], chosen: Bool[np.ndarray, "L H n"], shares: dict[str, float]
    ) -> Plan:
        """What is kept, for `DetectedDPE`."""
        layers, pairs = remapped(model.spec)
        selected = {i: tuple(tuple(np.flatnonzero(head).tolist()) for head in chosen[i]) for i in layers}
        about = {"task": self.task.name, "length": self.length, "answered": shares}
        return Plan(factors, self.window, pairs, selected, identity_of(model.spec, model.params), model.source, about)

    def chosen(self, model: Loaded, pairs: int) -> Bool[np.ndarray, "L H n"]:
        """The pairs that carry most of the scores, of each head."""
        count = max(round(self.selected * pairs), 1)
        ids = model.tokenizer.encode(read_text(self.text)[:CHARACTERS])
        program = _contributions(model.graphdef)
        total: Any = 0.0
        for length in self._lengths(model.spec.max_length):
            if len(ids) < length:
                raise ValueError(f"detect_dpe.text {self.text!r} has {len(ids)} tokens, and {length} are needed")
            for i in range(self.excerpts):
                begin = Random(f"dpe-{self.seed}-{length}-{i}").randrange(len(ids) - length + 1)
                total += np.asarray(program(model.params, np.array([ids[begin : begin + length]], np.int32)))
        mask = np.zeros(total.shape, bool)
        for layer, mine in enumerate(total):
            for head, best in enumerate(select_pairs(mine, count)):
                mask[layer, head, list(best)] = True
        return mask

    @staticmethod
    def _lengths(trained: int) -> Iterator[int]:
        """The trained length, its half, ... down to `SHORTEST`."""
        yield trained
        while (trained := trained // 2) >= SHORTEST:
            yield trained

    def scorer(self, model: Loaded, chosen: Bool[np.ndarray, "L H n"]) -> Callable[[tuple[int, ...]], float]:
        """factors -> share of the answers' tokens that the model writes under them; each asked once."""
        rows = self.rows(model)
        program = _answers(model.graphdef, self.window)

        @functools.cache
        def score(factors: tuple[int, ...]) -> float:
            factor = jnp.repeat(jnp.asarray(factors, jnp.int32), chosen.shape[-1] // len(factors))
            numbers = trial.Numbers(factor, jnp.asarray(chosen))
            said = [
                np.asarray(program(model.params, rows.tokens[n : n + 1], rows.places[n : n + 1], numbers))[0]
                for n in range(len(rows.tokens))
            ]
            right = (np.stack(said) == rows.targets)[rows.there]
            print(f"{self.name}: factors {factors}, {right.mean():.3f}", flush=True)
            return float(right.mean())

        return score

    def rows(self, model: Loaded) -> Rows:
        """The task's examples followed by an ideal answer, all of `length` tokens."""
        tokenizer = model.tokenizer
        asked = []
        for example in self.task.examples(tokenizer, self.length, self.seed):
            opened = isinstance(example.prompt, str) or example.prompt[-1]["role"] == "assistant"
            ideal = self.task.ideal(example)
            asked.append((prompt_ids(tokenizer, example.prompt), tokenizer.encode(f" {ideal}" if opened else ideal)))
        if not asked:
            raise BudgetError(f"{self.task.name} has no example within {self.length} tokens")
        width = max(len(answer) for _, answer in asked)
        there = np.array([np.arange(width) < len(answer) for _, answer in asked])
        tokens = np.zeros((len(asked), self.length), np.int32)
        for row, (prompt, answer) in zip(tokens, asked, strict=True):
            row[: len(prompt) + len(answer)] = [*prompt, *answer]
        first = np.array([[len(prompt) - 1] for prompt, _ in asked], np.int32)
        places = np.where(there, first + np.arange(width, dtype=np.int32), 0)
        return Rows(tokens, places, np.take_along_axis(tokens, places + 1, 1), there)


@functools.lru_cache(maxsize=4)
def _contributions(graphdef: Any) -> Any:
    return jax.jit(lambda params, tokens: trial.contributions(nnx.merge(graphdef, params), tokens))


@functools.lru_cache(maxsize=4)
def _answers(graphdef: Any, window: int) -> Any:
    """The token that the model would write after each place."""

    def run(params: Any, tokens: Array, places: Array, numbers: trial.Numbers) -> Int[Array, "B A"]:
        return jnp.argmax(trial.logits(nnx.merge(graphdef, params), tokens, places, numbers, window), axis=-1)

    return jax.jit(run)
