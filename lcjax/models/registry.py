"""The families, and how to find one for a config, a GGUF architecture or a spec."""

from collections.abc import Mapping
from typing import Any

from lcjax.models import gemma, llama, mistral, native, qwen
from lcjax.models.family import Family
from lcjax.models.spec import ModelSpec

FAMILIES = (llama.FAMILY, mistral.FAMILY, qwen.QWEN2, qwen.QWEN3, gemma.GEMMA2, gemma.GEMMA3)
COMPARED = {*ModelSpec.__dataclass_fields__, "layers"} - {"name", "dtype", "pattern"}


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family of a HF config dictionary, by its `model_type`."""
    kind = config.get("model_type")
    for family in (*FAMILIES, native.FAMILY):
        if kind in family.model_types:
            return family
    known = ", ".join(kind for family in (*FAMILIES, native.FAMILY) for kind in family.model_types)
    raise ValueError(f"model_type {kind!r} is not supported; known: {known}")


def family_of_gguf(architecture: str) -> Family:
    """The family of a GGUF file, by its `general.architecture`."""
    for family in FAMILIES:
        if architecture in family.gguf_architectures:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.gguf_architectures)
    raise ValueError(f"GGUF architecture {architecture!r} is not supported; known: {known}")


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a HF config: every field mapped, checked to be neutral, or refused by name."""
    return family_of_config(config).spec_from_hf(config)


def spec_to_hf(spec: ModelSpec) -> tuple[Family, dict[str, Any]]:
    """A family that expresses the spec exactly, and its HF config; the family that names the spec is tried first.

    Raises ValueError with every family's reason when none does.
    """
    reasons = []
    for family in sorted(FAMILIES, key=lambda family: spec.name not in family.model_types):
        try:
            config = family.spec_to_hf(spec)
            back = family.spec_from_hf(config)
        except ValueError as error:
            reasons.append(f"{family.name}: {error}")
            continue
        lost = [field for field in sorted(COMPARED) if getattr(back, field) != getattr(spec, field)]
        if not lost:
            return family, config
        reasons.append(f"{family.name}: cannot express {lost[0]}={getattr(spec, lost[0])!r}")
    raise ValueError(f"no HF family expresses the spec {spec.name!r} ({'; '.join(reasons)})")
