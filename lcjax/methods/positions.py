"""Another position law in the full-attention layers: the training-free extensions, and the start of trained ones."""

from dataclasses import dataclass, replace

from flax import nnx

from lcjax.methods.base import Method
from lcjax.models.decoder import Decoder, abstract
from lcjax.models.spec import Attention, Mixer, ModelSpec
from lcjax.positions.by_factor import CLEX
from lcjax.positions.laws import Rope
from lcjax.positions.remap import Remap


@dataclass(frozen=True)
class Positions(Method):
    """`rope` and `remap` in place of the model's own, for contexts up to `max_length`; all None is the identity."""

    rope: Rope | None = None
    remap: Remap | None = None
    max_length: int | None = None

    def model(self, spec: ModelSpec) -> ModelSpec:
        if self == Positions():
            return spec
        if not spec.laws:
            raise ValueError(f"Positions: {spec.name!r} has no rotary positions to replace")
        return spec.with_positions(self.rope or spec.laws[0][0], self.remap, self.max_length)


def solve_flows(spec: ModelSpec, params: nnx.State) -> tuple[ModelSpec, nnx.State]:
    """The model with the constants that its CLEX flows give in place of the flows: for decoding and evaluation."""
    if not any(isinstance(law, CLEX) for law, _ in spec.laws):
        return spec, params
    model: Decoder = nnx.merge(abstract(spec)[0], params)
    solved = {flow.law: flow.solved() for flow in model.flows}

    def constant(mixer: Mixer) -> Mixer:
        if isinstance(mixer, Attention) and isinstance(mixer.rope, CLEX):
            return replace(mixer, rope=solved[mixer.rope])
        return mixer

    _, rest = nnx.split_state(params, nnx.PathContains("flows"), ...)
    return replace(spec, pattern=tuple(map(constant, spec.pattern))), rest
