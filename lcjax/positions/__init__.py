"""Position laws: frozen dataclasses that turn a head dimension (and, for some, a length) into rotary frequencies."""

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
    "rope_table",
]
