"""DuoAttention (arXiv 2410.10819): gates that tell retrieval from streaming heads, and the model that uses them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from lcjax.methods.base import Method, check_made_for, check_unwritten, check_weights, identity_of
from lcjax.methods.plan_file import read_plan, write_plan
from lcjax.models.family import period
from lcjax.models.gated_heads import GatedHeads
from lcjax.models.patterns import Spans
from lcjax.models.spec import Attention, ModelSpec

if TYPE_CHECKING:
    from lcjax.train.job import Train

TRAINED = (r"mixer\.gates$",)


@dataclass(frozen=True)
class DuoGates(Method):
    """Gates on the KV heads of these layers, and nothing else is trained; distil with `GateDistillation`.

    layers: counted from 0; None: every full-attention layer; () is the identity. sink, window, own: see `GatedHeads`.
    """

    layers: tuple[int, ...] | None = None
    sink: int = 128
    window: int = 256
    own: bool = False

    def model(self, spec: ModelSpec) -> ModelSpec:
        mixers = list(spec.layers)
        full = [i for i, mixer in enumerate(mixers) if is_full(mixer)]
        for i in full if self.layers is None else self.layers:
            if i not in full:
                raise ValueError(f"DuoGates.layers has {i}; the full-attention layers of {spec.name!r} are {full}")
            kept = {field.name: getattr(mixers[i], field.name) for field in fields(Attention)}
            mixers[i] = GatedHeads(**kept, near_sink=self.sink, near_window=self.window, own=self.own)
        return spec if self.layers == () else replace(spec, pattern=period(tuple(mixers)))

    def recipe(self, job: "Train") -> "Train":
        """Only gates are trained."""
        return job if self.layers == () else replace(job, trainable=TRAINED)


@dataclass(frozen=True)
class Gates:
    """Learned gates: `gates[l]` has one in [0, 1] for each KV head of layer l.

    model: identity of the model that they were learned for. source: that model's name.
    """

    gates: Mapping[int, tuple[float, ...]]
    model: Mapping[str, Any]
    source: str

    def __post_init__(self):
        for layer, mine in self.gates.items():
            heads, layers = self.model["num_kv_heads"], self.model["num_layers"]
            if len(mine) != heads or not 0 <= layer < layers:
                raise ValueError(
                    f"layer {layer} has {len(mine)} gates, in a model of {layers} layers, {heads} KV heads"
                )
            if bad := [gate for gate in mine if not 0 <= gate <= 1]:
                raise ValueError(f"layer {layer} has the gate {bad[0]}, which is not in 0 to 1")

    @classmethod
    def made(cls, spec: ModelSpec, params: nnx.State, gates: Mapping[int, Any]) -> "Gates":
        """For a model and its weights: arrays `[K]` by layer."""
        numbers = {layer: tuple(float(gate) for gate in mine) for layer, mine in gates.items()}
        return cls(numbers, identity_of(spec, params), spec.name)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_plan(path, "DuoAttention", asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Gates":
        """Read what `save` wrote. Raises ValueError for a file that is none of those; OSError for no file."""

        def make(held: dict[str, Any]) -> Gates:
            return cls({int(layer): tuple(mine) for layer, mine in held.pop("gates").items()}, **held)

        return read_plan(path, "DuoAttention", make, "@duo_plan()")

    def retrieval(self, sparsity: float) -> dict[int, tuple[bool, ...]]:
        """Which heads keep everything: those at or above the quantile `sparsity` of all gates.

        Equal gates are told apart by up to 1e-6 at random, the same for every call.
        """
        flat = np.concatenate([np.array(mine) for mine in self.gates.values()])
        flat = flat + np.random.default_rng(0).uniform(0, 1e-6, flat.shape)
        keeps = flat >= np.quantile(flat, sparsity)
        rows = np.split(keeps, np.cumsum([len(mine) for mine in self.gates.values()])[:-1])
        return {layer: tuple(map(bool, row)) for layer, row in zip(self.gates, rows, strict=True)}


@dataclass(frozen=True)
class Duo(Method):
    """Streaming heads keep `sink` first and `window` last tokens, retrieval heads everything; no training.

    plan: a file that @duo_plan() wrote. sparsity: the share of streaming heads among those that have gates (the
    authors': 0.75 where each query head has its own keys, 0.5 where they share them); 0 is the identity. A prompt is
    read with the exact window, whatever its chunks.
    """

    plan: str
    sparsity: float = 0.5
    sink: int = 64
    window: int = 256

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"Duo.sparsity is {self.sparsity}; it is a share of the heads, at least 0 and below 1")
        if self.sink < 0 or self.window < 1:
            raise ValueError(f"Duo.sink {self.sink} must be at least 0 and Duo.window {self.window} at least 1")

    def model(self, spec: ModelSpec) -> ModelSpec:
        """Raises ValueError for a plan of another model, and for layers that are not full attention."""
        plan = Gates.load(self.plan)
        check_made_for(f"Duo.plan {self.plan!r}", plan, spec)
        mixers = list(spec.layers)
        for layer, keeps in plan.retrieval(self.sparsity).items():
            mixer = check_unwritten(self, layer, mixers[layer])
            kept = {field.name: getattr(mixer, field.name) for field in fields(Attention)}
            if not all(keeps):
                spans = [(0, None) if keep else (self.sink, self.window) for keep in keeps]
                kept["pattern"] = Spans(tuple(sink for sink, _ in spans), tuple(window for _, window in spans))
            mixers[layer] = Attention(**kept)
        return replace(spec, pattern=period(tuple(mixers)))

    def check(self, params: nnx.State) -> None:
        """Raises ValueError for a plan of other weights."""
        check_weights(f"Duo.plan {self.plan!r}", Gates.load(self.plan), params)


def is_full(mixer: Any) -> bool:
    """Whether a layer is full attention with one rotation of its keys."""
    plain = isinstance(mixer, Attention) and mixer.window is None and mixer.pattern is None
    return plain and mixer.remap is None
