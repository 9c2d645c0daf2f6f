"""Position laws from and to the `rope_scaling` (4.x) and `rope_parameters` (5.x) dictionaries of HF transformers."""

from collections.abc import Mapping
from typing import Any

from lcjax.positions.laws import ByParts, DynamicNTK, Linear, Llama3, LongRoPE, Proportional, Rope, YaRN
from lcjax.positions.mrope import MRope

ALIASES = {"su": "longrope"}
SHARED = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
KEYS = {
    "default": set(),
    "mrope": {"mrope_section"},
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
    "proportional": {"factor"},
}


def _kind(parameters: Mapping[str, Any]) -> str:
    names = {ALIASES.get(parameters[key], parameters[key]) for key in ("rope_type", "type") if parameters.get(key)}
    if len(names) > 1:
        raise ValueError(f"rope parameters name two types, {' and '.join(map(repr, sorted(names)))}; keep one")
    kind = names.pop() if names else "default"
    if kind not in KEYS:
        raise ValueError(f"rope type {kind!r} is not known; known types: {', '.join(KEYS)}")
    unknown = sorted(set(parameters) - SHARED - KEYS[kind])
    if unknown:
        raise ValueError(f"rope type {kind!r} has no field {unknown[0]!r}; its fields: {', '.join(sorted(KEYS[kind]))}")
    return kind


def _number(parameters: Mapping[str, Any], kind: str, key: str) -> float:
    value = parameters.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"rope type {kind!r} needs a number {key!r}, got {value!r}")
    return float(value)


def law_from_hf(
    parameters: Mapping[str, Any] | None,
    *,
    theta: float = 10_000.0,
    max_length: int,
    original_length: int | None = None,
    partial: float = 1.0,
) -> Rope:
    """The law of one flat dictionary (None or empty: plain rotary).

    theta, partial: the config's top-level `rope_theta` and `partial_rotary_factor`; the dictionary's own win.
    max_length: `max_position_embeddings`. original_length: a top-level `original_max_position_embeddings`, which wins
    over the dictionary's, as in HF. Raises ValueError on an unknown type or key, naming it.
    """
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    kind = _kind(given)
    shared: dict[str, Any] = {
        "base": float(given.get("rope_theta", theta)),
        "partial": float(given.get("partial_rotary_factor", partial)),
    }
    trained = original_length or given.get("original_max_position_embeddings") or max_length
    if kind == "default":
        return Rope(**shared)
    if kind == "mrope":
        return MRope(**shared, sections=tuple(map(int, given.get("mrope_section") or ())))
    if kind in ("linear", "dynamic", "llama3"):
        shared["factor"] = _number(given, kind, "factor")
    if kind == "linear":
        return Linear(**shared)
    if kind == "dynamic":
        return DynamicNTK(**shared, original_length=max_length)
    if kind == "proportional":
        return Proportional(**shared, factor=float(given.get("factor", 1.0)))
    if kind == "llama3":
        low, high = (_number(given, kind, f"{end}_freq_factor") for end in ("low", "high"))
        return Llama3(**shared, original_length=trained, low_turns=low, high_turns=high)
    shared |= {"factor": float(given.get("factor") or max_length / trained), "original_length": trained}
    shared["attention_factor"] = given.get("attention_factor")
    if kind == "longrope":
        short, long = (tuple(map(float, given.get(f"{end}_factor") or ())) for end in ("short", "long"))
        return LongRoPE(**shared, short_factor=short, long_factor=long)
    return YaRN(
        **shared,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=given.get("truncate", True),
        mscale=given.get("mscale"),
        mscale_all_dim=given.get("mscale_all_dim"),
    )


def law_to_hf(law: Rope, *, max_length: int) -> dict[str, Any]:
    """The 5.x dictionary (with `rope_theta`) from which `law_from_hf` rebuilds the law.

    Raises ValueError for a law that HF cannot express.
    """
    shared: dict[str, Any] = {"rope_theta": law.base}
    if law.partial != 1:
        shared["partial_rotary_factor"] = law.partial
    match law:
        case MRope() if type(law) is MRope:
            return shared | {"rope_type": "mrope", "mrope_section": list(law.sections)}
        case Linear():
            return shared | {"rope_type": "linear", "factor": law.factor}
        case Proportional():
            return shared | {"rope_type": "proportional", "factor": law.factor}
        case DynamicNTK() if law.original_length == max_length:
            return shared | {"rope_type": "dynamic", "factor": law.factor}
        case ByParts():
            shared |= {"rope_type": "llama3", "factor": law.factor, "low_freq_factor": law.low_turns}
            return shared | {
                "high_freq_factor": law.high_turns,
                "original_max_position_embeddings": law.original_length,
            }
        case YaRN() | LongRoPE():
            shared |= {"factor": law.factor, "original_max_position_embeddings": law.original_length}
            if law.attention_factor is not None:
                shared["attention_factor"] = law.attention_factor
            if isinstance(law, LongRoPE):
                factors = {"short_factor": list(law.short_factor), "long_factor": list(law.long_factor)}
                return shared | {"rope_type": "longrope"} | factors
            optional = {"mscale": law.mscale, "mscale_all_dim": law.mscale_all_dim}
            shared |= {key: value for key, value in optional.items() if value is not None}
            ramp = {"beta_fast": law.beta_fast, "beta_slow": law.beta_slow, "truncate": law.truncate}
            return shared | {"rope_type": "yarn"} | ramp
    if type(law) is Rope:
        return shared | {"rope_type": "default"}
    raise ValueError(f"HF transformers has no rope type for {law}")
