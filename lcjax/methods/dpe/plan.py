"""The plan file of DPE (Lu et al., arXiv 2504.18857), and the method that puts a model under it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from flax import nnx

from lcjax.methods.base import Method, check_made_for, check_weights
from lcjax.methods.duo import is_full
from lcjax.methods.plan_file import read_plan, write_plan
from lcjax.models.family import period
from lcjax.models.spec import Attention, ModelSpec
from lcjax.positions.dpe import DPE
from lcjax.positions.laws import Rope
from lcjax.positions.xpos import XPos


@dataclass(frozen=True)
class Plan:
    """Detected numbers: `factors` of the groups of pairs, and `selected[l]`, of layer l, as `DPE.selected`.

    window: exact distances. pairs: rotary pairs of a head. model: identity of the model that it was made for. source:
    that model's name. about: how it was found (JSON).
    """

    factors: tuple[int, ...]
    window: int
    pairs: int
    selected: Mapping[int, tuple[tuple[int, ...], ...]]
    model: Mapping[str, Any]
    source: str
    about: Mapping[str, Any]

    def __post_init__(self):
        self.remaps()

    def remaps(self) -> dict[int, DPE]:
        """The remap of each layer that has one."""
        make = lambda chosen: DPE(window=self.window, factors=self.factors, pairs=self.pairs, selected=chosen)
        return {layer: make(chosen) for layer, chosen in self.selected.items()}

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_plan(path, "DPE", asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what `save` wrote. Raises ValueError for a file that is none of those; OSError for no file."""

        def make(held: dict[str, Any]) -> Plan:
            selected = {int(layer): tuple(map(tuple, heads)) for layer, heads in held.pop("selected").items()}
            return cls(tuple(held.pop("factors")), selected=selected, **held)

        return read_plan(path, "DPE", make, "configs/eval/dpe.gin")


@dataclass(frozen=True)
class DetectedDPE(Method):
    """The remaps of a plan file, which @detect_dpe() wrote; no training. plan=None is the identity."""

    plan: str | None = None

    def model(self, spec: ModelSpec) -> ModelSpec:
        """Raises ValueError for a plan of another model, and for layers that are not full attention."""
        if self.plan is None:
            return spec
        plan = Plan.load(self.plan)
        check_made_for(f"DetectedDPE.plan {self.plan!r}", plan, spec)
        mixers = list(spec.layers)
        for layer, remap in plan.remaps().items():
            mixer = mixers[layer]
            if not takes_remap(mixer):
                raise ValueError(f"DetectedDPE gives layer {layer} a remap, which is {mixer} and not full attention")
            mixers[layer] = replace(mixer, remap=remap)
        return replace(spec, pattern=period(tuple(mixers)))

    def check(self, params: nnx.State) -> None:
        """Raises ValueError for a plan of other weights."""
        if self.plan is not None:
            check_weights(f"DetectedDPE.plan {self.plan!r}", Plan.load(self.plan), params)


def takes_remap(mixer: Any) -> TypeGuard[Attention]:
    """Whether a layer is full attention with rotary positions and no remap yet."""
    return is_full(mixer) and type(mixer) is Attention and mixer.rope is not None and not isinstance(mixer.rope, XPos)


def remapped(spec: ModelSpec) -> tuple[dict[int, Rope], int]:
    """The laws of the layers that a plan is for, and their rotary pairs.

    Raises ValueError where there are none, or the pairs differ.
    """
    found = {i: mixer.rope for i, mixer in enumerate(spec.layers) if takes_remap(mixer) and mixer.rope is not None}
    pairs = {len(rope.frequencies(spec.head_dim)[0]) for rope in found.values()}
    if len(pairs) != 1:
        raise ValueError(
            f"DPE: {spec.name!r} has {len(found)} full-attention layers with rotary positions, of {sorted(pairs)} "
            "pairs; it needs one number of pairs in all of them"
        )
    return found, pairs.pop()
