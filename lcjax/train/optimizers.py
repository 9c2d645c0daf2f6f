"""Optimisers and learning-rate schedules as records; `build` gives the optax chain."""

import re
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lcjax.models.stacked import names, rank


@runtime_checkable
class Schedule(Protocol):
    """Learning rate over optimiser updates; `steps` is the length of the run."""

    def build(self, steps: int) -> optax.Schedule: ...


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up to `peak`, then half a cosine down to `peak * final` at the end of the run."""

    peak: float
    warmup: int = 0
    final: float = 0.1

    def build(self, steps: int) -> optax.Schedule:
        _check_phases("Cosine", steps, warmup=self.warmup)
        floor = self.peak * self.final
        return optax.warmup_cosine_decay_schedule(0.0, self.peak, self.warmup, max(steps, self.warmup + 1), floor)


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, a constant stretch, and over the last `decay` updates a line down to `peak * final`
    (MiniCPM, arXiv 2404.06395)."""

    peak: float
    warmup: int = 0
    decay: int = 0
    final: float = 0.0

    def build(self, steps: int) -> optax.Schedule:
        _check_phases("WarmupStableDecay", steps, warmup=self.warmup, decay=self.decay)
        rise = optax.linear_schedule(0.0, self.peak, max(self.warmup, 1))
        fall = optax.linear_schedule(self.peak, self.peak * self.final, max(self.decay, 1))
        phases = [rise, optax.constant_schedule(self.peak), fall]
        return optax.join_schedules(phases, [self.warmup, steps - self.decay])


@dataclass(frozen=True)
class Trapezoid:
    """Over `ramp` updates up to `peak` and over the last `ramp` down again, never below `peak * floor`."""

    peak: float
    ramp: int
    floor: float = 0.1

    def build(self, steps: int) -> optax.Schedule:
        _check_phases("Trapezoid", steps, rise=self.ramp, fall=self.ramp)

        def rate(step: Any) -> Any:
            ends = jnp.minimum((step + 1) / max(self.ramp, 1), (steps - step) / max(self.ramp, 1))
            return self.peak * jnp.clip(ends, self.floor, 1.0)

        return rate


def _check_phases(name: str, steps: int, **phases: int) -> None:
    if min(phases.values()) < 0 or sum(phases.values()) > steps:
        said = " and ".join(f"{phase}={updates}" for phase, updates in phases.items())
        raise ValueError(f"{name}: {said} do not fit a run of {steps} steps")


@runtime_checkable
class Optimizer(Protocol):
    """What the training step needs of an optimiser record."""

    schedule: Schedule

    def build(self, steps: int) -> optax.GradientTransformation: ...


@dataclass(frozen=True)
class AdamW:
    """Gradient clipping by global norm, Adam, decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101).

    Weights of one dimension (norms, biases) and those whose path matches one of `no_decay` (regular expressions on
    `layers/0/...` paths) are not decayed.
    """

    schedule: Schedule
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    no_decay: tuple[str, ...] = ("embed",)

    def build(self, steps: int) -> optax.GradientTransformation:
        return optax.chain(
            optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=self.decayed),
            optax.scale_by_learning_rate(self.schedule.build(steps)),
        )

    def decayed(self, params: Any) -> Any:
        """True for every weight that weight decay acts on; a tree like `params`.

        Raises ValueError where patterns differ about layers whose weights are stacked.
        """

        def one(path: Any, weight: Any) -> Any:
            members = names(path, weight)
            spared = [name for name in members if any(re.search(pattern, name) for pattern in self.no_decay)]
            if len(spared) not in (0, len(members)):
                raise ValueError(
                    f"AdamW.no_decay names {spared[0]} but not all of the {len(members)} layers that are scanned with "
                    "it: name all of them or none, or set StepOptions.scan = False"
                )
            decayed = rank(weight) > 1 and not spared
            return weight.replace(decayed) if isinstance(weight, nnx.Variable) else decayed

        return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


@dataclass(frozen=True)
class Clamped:
    """Another optimiser, after whose every update the parameters are cut to `least`..`most`."""

    optimizer: Optimizer
    least: float = 0.0
    most: float = 1.0

    @property
    def schedule(self) -> Schedule:
        """The inner optimiser's."""
        return self.optimizer.schedule

    def build(self, steps: int) -> optax.GradientTransformation:
        def cut(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            return jax.tree.map(lambda u, p: jnp.clip(p + u, self.least, self.most) - p, updates, params), state

        inside = optax.GradientTransformation(lambda params: optax.EmptyState(), cut)
        return optax.chain(self.optimizer.build(steps), inside)
