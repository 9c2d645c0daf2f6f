"""Positions: laws give rotary frequencies, remaps say which rotation a pair of tokens gets, samplers make positions."""

from lcjax.positions.by_factor import CLEX, ByFactor, DynamicLinear, DynamicYaRN, Tabulated
from lcjax.positions.dpe import DPE
from lcjax.positions.from_hf import law_from_hf, law_to_hf
from lcjax.positions.giraffe import Giraffe
from lcjax.positions.laws import NTK, ByParts, DynamicNTK, Linear, Llama3, LongRoPE, Proportional, Rope, YaRN
from lcjax.positions.mrope import MRope, MRopePlus, grid_positions
from lcjax.positions.remap import DualChunk, Remap, SelfExtend
from lcjax.positions.rotary import apply_rope, rope_table
from lcjax.positions.xpos import XPos

__all__ = [
    "CLEX",
    "DPE",
    "NTK",
    "ByFactor",
    "ByParts",
    "DualChunk",
    "DynamicLinear",
    "DynamicNTK",
    "DynamicYaRN",
    "Giraffe",
    "Linear",
    "Llama3",
    "LongRoPE",
    "MRope",
    "MRopePlus",
    "Proportional",
    "Remap",
    "Rope",
    "SelfExtend",
    "Tabulated",
    "XPos",
    "YaRN",
    "apply_rope",
    "grid_positions",
    "law_from_hf",
    "law_to_hf",
    "rope_table",
]
