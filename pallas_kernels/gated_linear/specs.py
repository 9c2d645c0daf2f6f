"""The shapes gated linear attention is timed on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One call. `decay` is 'none', 'scalar' or 'vector'."""

    batch: int
    tokens: int
    heads: int
    key_width: int
    value_width: int
    decay: str = "vector"

    @property
    def bytes_forward(self) -> int:
        """The fewest bytes a bfloat16 forward moves: every input read once, every output written once."""
        decay = {"none": 0, "scalar": 1, "vector": self.key_width}[self.decay]
        return 2 * self.batch * self.tokens * self.heads * (2 * self.key_width + 2 * self.value_width + decay)


SHAPES = {
    "32x64-128k": Shape(1, 131072, 32, 64, 64),
    "32x64-8k": Shape(1, 8192, 32, 64, 64),
    "16x128-128k": Shape(1, 131072, 16, 128, 128),
    "32x64-8k-batch16": Shape(16, 8192, 32, 64, 64),
    "32x64-128k-scalar": Shape(1, 131072, 32, 64, 64, "scalar"),
    "32x64-128k-none": Shape(1, 131072, 32, 64, 64, "none"),
}
