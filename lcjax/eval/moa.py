"""Making a plan of MoA (arXiv 2406.14909): ask, profile, optimise, validate, write."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from lcjax.eval.answered import Answered, CalibrationTexts, Questions
from lcjax.eval.measure import Table
from lcjax.methods.base import identity_of
from lcjax.methods.moa import influence
from lcjax.methods.moa.plan import Plan
from lcjax.methods.moa.rules import Rule, SearchSpace, lost_influence
from lcjax.methods.moa.solve import Effort, Problem, pareto
from lcjax.models.elastic import kept_tokens
from lcjax.serve.engine import Engine, Generator
from lcjax.serve.source import Loaded


@dataclass(frozen=True)
class PlanSpans:
    """A plan for the model, as plan.json in the output folder: the best at `validation` tokens, which no profile has.

    texts: what the model answers itself, of one length of answers; only their loss counts. batch: texts answered at a
    time. cuts and seconds: see `pareto` and `Effort`.
    """

    texts: Sequence[CalibrationTexts] = field(default_factory=lambda: (Questions(),))
    space: SearchSpace = field(default_factory=SearchSpace)
    validation: int = 12288
    batch: int = 4
    cuts: int = 4
    seconds: float = 30.0
    name: str = "moa"

    def __post_init__(self):
        if self.validation in self.space.profiles:
            raise ValueError(
                f"plan_spans.validation {self.validation} is one of the profiled lengths; choose one in between"
            )
        answers = sorted({texts.answer for texts in self.texts})
        if len(answers) != 1:
            raise ValueError(f"plan_spans.texts have answers of {answers} tokens; give them one length")
        if self.validation <= answers[0]:
            raise ValueError(f"plan_spans.validation {self.validation} leaves no room before an answer; raise it")

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """Loss of the answers at the validation length, dense and under the plan, and the density at each length."""
        influence.check_full_attention(model.spec)
        engine = Engine(capacity=max(*self.space.profiles, self.validation), batch=self.batch)
        generator = Generator(model.graphdef, model.params, model.spec, model.tokenizer, engine)
        ask = functools.partial(self.ask, model, generator)
        problem = self.problem(model, ask)
        choices = pareto(problem, self.cuts, Effort(seconds=self.seconds))
        rows = ask(self.validation)
        rules = self.space.rules()
        tried = [[rules[r] for r in choice] for choice in choices]
        losses = validate(model, rows, [[Rule(0.0, 1.0)] * len(tried[0]), *tried], self.space.block)
        best = int(np.argmin(losses[1:]))
        density = dict(zip(self.space.lengths, self.space.densities()[:, choices[best]].mean(1).tolist(), strict=True))
        about = {
            "space": asdict(self.space),
            "texts": [{"kind": type(texts).__name__, **asdict(texts)} for texts in self.texts],
            "validation": {"length": self.validation, "dense": losses[0], "plans": losses[1:]},
            "density": density,
            "influence_lost": problem.scaled().total(choices[best]).tolist(),
        }
        plan_of(model, tried[best], self.space.block, about).save(output / "plan.json")
        print(f"{self.name}: {len(tried)} plans, written to {output / 'plan.json'}", flush=True)
        at = str(self.validation)
        tables = {"dense_loss": {at: losses[0]}, "loss": {at: losses[1 + best]}}
        tables["density"] = {str(length): share for length, share in density.items()}
        return {f"{self.name}_{name}": table for name, table in tables.items()}

    def ask(self, model: Loaded, generator: Generator, length: int) -> Answered:
        """Rows of `length` tokens from all texts."""
        rows = [texts.ask(model, generator, length) for texts in self.texts]
        return Answered(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))

    def problem(self, model: Loaded, ask: Callable[[int], Answered]) -> Problem:
        """The influence that each rule loses on each head, at every profiled length; `ask` gives rows of a length."""
        heads, losses = model.spec.num_layers * model.spec.num_kv_heads, []
        for length in self.space.profiles:
            began = time.perf_counter()
            found = mean_profile(model, ask(length), self.space.block)
            blocks = found.shape[-1]
            losses.append(lost_influence(found.reshape(heads, blocks, blocks), self.space.kept_blocks(length)))
            print(f"{self.name}: profile of {length} tokens, {time.perf_counter() - began:.0f} s", flush=True)
        bounds = self.space.fill * self.space.density, self.space.density
        densities = self.space.densities()
        return Problem(np.stack(losses), densities, bounds, model.spec.num_kv_heads, self.space.rules_per_layer)


def plan_of(model: Loaded, rules: Sequence[Rule], block: int, about: dict[str, Any]) -> Plan:
    """The plan that gives these rules to the model's KV heads, in the order of its layers."""
    table = np.array(rules).reshape(model.spec.num_layers, model.spec.num_kv_heads, 2)
    alphas, betas = (tuple(map(tuple, table[..., n].tolist())) for n in (0, 1))
    return Plan(alphas, betas, block, identity_of(model.spec, model.params), model.source, about)


def mean_profile(model: Loaded, rows: Answered, block: int) -> Float[np.ndarray, "L K n n"]:
    """`influence.profile`, one text at a time: mean over texts."""
    program = _profile(model.graphdef, block)
    total = sum(np.asarray(program(model.params, *_row(rows, i)), np.float64) for i in range(len(rows.tokens)))
    return np.asarray(total) / len(rows.tokens)


def validate(model: Loaded, rows: Answered, plans: Sequence[Sequence[Rule]], block: int) -> list[float]:
    """Mean loss of the answers when the heads have each plan's rules; one program for all plans."""
    length = rows.tokens.shape[1]
    program = _loss(model.graphdef, block)
    found = []
    for plan in plans:
        windows = windows_of(plan, length, block).reshape(model.spec.num_layers, -1)
        each = [program(model.params, *_row(rows, i), jnp.asarray(windows)) for i in range(len(rows.tokens))]
        found.append(float(np.mean([float(loss[0]) for loss in each])))
    return found


def windows_of(plan: Sequence[Rule], length: int, block: int) -> Int[np.ndarray, " H"]:
    """Tokens of each head's window, behind a sink of one block; one that keeps everything reads everything."""
    keeps = np.array([kept_tokens(*rule, length, block) for rule in plan], np.int32)
    return np.where(keeps >= length, length, keeps - block).astype(np.int32)


def _row(rows: Answered, i: int) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(rows.tokens[i : i + 1]), jnp.asarray(rows.answered[i : i + 1])


@functools.lru_cache(maxsize=4)
def _profile(graphdef: Any, block: int) -> Any:
    return jax.jit(lambda params, *row: influence.profile(nnx.merge(graphdef, params), *row, block))


@functools.lru_cache(maxsize=4)
def _loss(graphdef: Any, block: int) -> Any:
    return jax.jit(lambda params, *row: influence.loss_under(nnx.merge(graphdef, params), *row, block))
