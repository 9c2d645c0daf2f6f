"""The attention layer whose KV heads DuoAttention (arXiv 2410.10819) weighs."""

from dataclasses import dataclass

from lcjax.models.spec import Attention
from pallas_kernels.masks import Causal, Mask, Sink, Window


@dataclass(frozen=True)
class GatedHeads(Attention):
    """Full attention and a gate a KV head, which only `lcjax.train.gates.GateDistillation` reads.

    near_sink, near_window: first and last tokens that a streaming head would see. own: the full part of the gated
    stream from its own queries, keys and values, as the paper writes it; else from the untouched stream, as the
    authors' code does.
    """

    near_sink: int = 128
    near_window: int = 256
    own: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None or self.pattern is not None or self.remap is not None:
            raise ValueError(f"GatedHeads weighs full attention, and has no window, pattern or remap; got {self}")
        if self.near_sink < 0 or self.near_window < 1:
            raise ValueError(
                f"GatedHeads.near_sink is {self.near_sink} and near_window {self.near_window}: a window is at least 1, "
                "a sink at least 0"
            )

    @property
    def near(self) -> Mask:
        """What streaming heads see."""
        return Causal() & (Sink(self.near_sink) | Window(self.near_window))
