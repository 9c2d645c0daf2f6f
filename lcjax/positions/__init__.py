"""Position laws: frozen dataclasses that turn a head dimension (and, for some, a length) into rotary frequencies."""

from lcjax.positions.from_hf import law_from_hf, law_to_hf
from lcjax.positions.laws import DynamicNTK, Linear, Llama3, LongRoPE, Proportional, Rope, YaRN
from lcjax.positions.rotary import apply_rope, rope_table

__all__ = [
    "DynamicNTK",
    "Linear",
    "Llama3",
    "LongRoPE",
    "Proportional",
    "Rope",
    "YaRN",
    "apply_rope",
    "law_from_hf",
    "law_to_hf",
    "rope_table",
]
