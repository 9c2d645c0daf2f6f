"""What `evaluate.py` can run: a `Measure` turns a model into numbers by length."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from lcjax.serve.source import Loaded

type Table = Mapping[str, float]  # length -> value


@runtime_checkable
class Measure(Protocol):
    """One entry of an evaluation."""

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """{result name: {length: value}}; plots and single results go into the folder `output`."""
        ...
