"""The plan file of MoA (arXiv 2406.14909), and the method that puts a model under it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx

from lcjax.methods.base import Method, check_made_for, check_weights
from lcjax.methods.moa.influence import check_full_attention
from lcjax.methods.plan_file import read_plan, write_plan
from lcjax.models.elastic import Elastic
from lcjax.models.family import period
from lcjax.models.spec import Attention, ModelSpec, check_positive


@dataclass(frozen=True)
class Plan:
    """Head h of layer l keeps alphas[l][h] + betas[l][h] N tokens of a request of N, in blocks of `block`.

    model: identity of the model that it was made for. source: that model's name. about: how it was found (JSON).
    """

    alphas: tuple[tuple[float, ...], ...]
    betas: tuple[tuple[float, ...], ...]
    block: int
    model: Mapping[str, Any]
    source: str
    about: Mapping[str, Any]

    def __post_init__(self):
        if len(self.alphas) != self.model["num_layers"]:
            raise ValueError(f"it has rules for {len(self.alphas)} of {self.model['num_layers']} layers")
        self.patterns()

    def patterns(self) -> tuple[Elastic, ...]:
        """One a layer."""
        return tuple(Elastic(*rules, self.block) for rules in zip(self.alphas, self.betas, strict=True))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_plan(path, "MoA", asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what `save` wrote. Raises ValueError for a file that is none of those; OSError for no file."""

        def make(held: dict[str, Any]) -> Plan:
            alphas, betas = (tuple(map(tuple, held.pop(name))) for name in ("alphas", "betas"))
            return cls(alphas, betas, **held)

        return read_plan(path, "MoA", make, "configs/eval/moa_plan.gin")


@dataclass(frozen=True)
class MoA(Method):
    """Elastic spans of a plan file in every layer; no training. plan=None is the identity.

    length: requests that the spans are fixed for; None: each batch of requests gets those of its own length, prompt and
    answer, rounded up to the engine's next cache size.
    """

    plan: str | None = None
    length: int | None = None

    def __post_init__(self):
        check_positive(self, "length")

    def model(self, spec: ModelSpec) -> ModelSpec:
        """Raises ValueError for a plan of another model, and for layers that are not full attention."""
        if self.plan is None:
            return spec
        plan = Plan.load(self.plan)
        check_made_for(f"MoA.plan {self.plan!r}", plan, spec)
        return under(spec, plan, self.length)

    def check(self, params: nnx.State) -> None:
        """Raises ValueError for a plan of other weights."""
        if self.plan is not None:
            check_weights(f"MoA.plan {self.plan!r}", Plan.load(self.plan), params)


def under(spec: ModelSpec, plan: Plan, length: int | None = None) -> ModelSpec:
    """The spec with the plan's patterns, fixed for requests of `length` tokens unless None."""
    check_full_attention(spec)
    pairs = zip(spec.layers, plan.patterns(), strict=True)
    mixers = tuple(replace(mixer, pattern=pattern) for mixer, pattern in pairs if isinstance(mixer, Attention))
    found = replace(spec, pattern=period(mixers))
    return found if length is None else found.at(length)
