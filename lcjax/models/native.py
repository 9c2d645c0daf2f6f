"""The library's own family: any spec, written out record by record, with parameters under their own paths."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcjax.checkpoint.manifest import describe, rebuild
from lcjax.models import elastic, gated_heads, patterns, recurrent
from lcjax.models import spec as specs
from lcjax.models.family import Family
from lcjax.models.spec import ModelSpec
from lcjax.positions import by_factor, dpe, giraffe, laws, mrope, remap, xpos

MODEL_TYPE = "lcjax"
RECORDS = {
    kind.__name__: kind
    for module in (specs, patterns, elastic, gated_heads, recurrent, laws, by_factor, dpe, giraffe, mrope, remap, xpos)
    for kind in vars(module).values()
    if isinstance(kind, type) and kind.__module__ == module.__name__
}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec that a config.json of this family describes."""
    spec = rebuild(config.get("spec"), RECORDS)
    if not isinstance(spec, ModelSpec):
        raise ValueError(f"the {MODEL_TYPE} config's field 'spec' is {config.get('spec')!r}; export the model again")
    return spec


def spec_to_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of a spec."""
    return {"model_type": MODEL_TYPE, "spec": describe(spec)}


@dataclass(frozen=True)
class _OwnNames(Family):
    def names(self, path: str) -> tuple[str, str]:
        return path, path


FAMILY = _OwnNames(MODEL_TYPE, (MODEL_TYPE,), spec_from_config, spec_to_config, {})
