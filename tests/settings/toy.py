"""A small job tree for the tests of lcjax.settings."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Layer:
    width: int
    window: int | None = None
    scale: float = 1.0
    kind: Literal["full", "window"] = "full"

    def __post_init__(self):
        if self.width % 8:
            raise ValueError(f"width {self.width} is not a multiple of 8")


@dataclasses.dataclass(frozen=True)
class Job:
    layers: tuple[Layer, ...]
    steps: int
    name: str = "toy"
    seed: int = 0
