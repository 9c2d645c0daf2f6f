"""Another position law in the full-attention layers: the training-free extensions, and the start of trained ones."""

from dataclasses import dataclass

from lcjax.methods.base import Method
from lcjax.models.spec import ModelSpec
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
