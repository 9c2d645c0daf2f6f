"""Long-context methods: frozen records that change a model's spec and, where they are trained, the training job."""

from lcjax.methods.base import Method, MethodConflict, adapt_job, adapt_model
from lcjax.methods.blockrank import BlockRank
from lcjax.methods.dpe import DetectedDPE
from lcjax.methods.duo import Duo, DuoGates
from lcjax.methods.linearize import Lawcat, Lolcats
from lcjax.methods.longgen import LongGen
from lcjax.methods.longlora import LongLora, ShiftedSparse
from lcjax.methods.lora import Lora
from lcjax.methods.moa import MoA
from lcjax.methods.positions import Positions

__all__ = [
    "BlockRank",
    "DetectedDPE",
    "Duo",
    "DuoGates",
    "Lawcat",
    "Lolcats",
    "LongGen",
    "LongLora",
    "Lora",
    "Method",
    "MethodConflict",
    "MoA",
    "Positions",
    "ShiftedSparse",
    "adapt_job",
    "adapt_model",
]
