"""Attention layers of a given model into linear ones: LAWCAT (arXiv 2509.18467) and LoLCATs (arXiv 2410.10254)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lcjax.methods.base import Method
from lcjax.models.family import period
from lcjax.models.recurrent import Linearized
from lcjax.models.spec import Attention, ModelSpec

if TYPE_CHECKING:
    from lcjax.train.job import Train

STUDENT = (r"mixer\.(query_map|key_map|convs|decay_down|decay_up|window_logit)",)
"""The parameters that a linearised layer has beside its teacher's."""


@dataclass(frozen=True)
class Lawcat(Method):
    """Linear attention with convolution across tokens; distil with `AttentionTransfer`, then finetune with `Lora`.

    layers: the layers to convert, counted from 0; None: every softmax layer. The others stay as they are (a hybrid).
    The other fields are those of `Linearized`; decay='none', conv_width=0 and normalise=False are the ablations.
    `horizons` and `stretched` are ours, for texts far longer than the rows of training.
    layers=() is the identity.
    """

    layers: tuple[int, ...] | None = None
    features: int | None = None
    tied: bool = False
    conv_width: int = 4
    conv_value: bool = False
    decay: str = "vector"
    horizons: tuple[float, float] | None = None
    stretched: bool = False
    normalise: bool = True
    rotate: bool = False
    window: int = 0

    def model(self, spec: ModelSpec) -> ModelSpec:
        def convert(teacher: Attention) -> Linearized:
            return Linearized(
                teacher,
                features=self.features,
                tied=self.tied,
                conv_width=self.conv_width,
                conv_value=self.conv_value,
                decay=self.decay,
                horizons=self.horizons,
                stretched=self.stretched,
                normalise=self.normalise,
                rotate=self.rotate,
                window=self.window,
            )

        return _linearized(self, spec, self.layers, convert)

    def recipe(self, job: "Train") -> "Train":
        """Only what the teacher does not have is trained."""
        return job if self.layers == () else replace(job, trainable=STUDENT)


@dataclass(frozen=True)
class Lolcats(Method):
    """Hedgehog feature maps over rotated q and k for what lies before a softmax window of `window` tokens.

    Distil with `AttentionTransfer`, then finetune with `Lora`. layers: as in `Lawcat`; () is the identity. window=0 is
    the pure Hedgehog layer (arXiv 2402.04347).
    """

    layers: tuple[int, ...] | None = None
    window: int = 64

    def model(self, spec: ModelSpec) -> ModelSpec:
        return _linearized(self, spec, self.layers, lambda teacher: Linearized.lolcats(teacher, self.window))

    def recipe(self, job: "Train") -> "Train":
        """Only what the teacher does not have is trained."""
        return job if self.layers == () else replace(job, trainable=STUDENT)


def _linearized(
    method: Method, spec: ModelSpec, layers: tuple[int, ...] | None, convert: Callable[[Attention], Linearized]
) -> ModelSpec:
    """The spec with these layers converted; refuses a layer that is not there or not softmax attention."""
    if layers == ():
        return spec
    mixers = list(spec.layers)
    name = type(method).__name__
    for i in [i for i, mixer in enumerate(mixers) if isinstance(mixer, Attention)] if layers is None else layers:
        if not 0 <= i < len(mixers):
            raise ValueError(f"{name}.layers has {i}, but {spec.name!r} has the layers 0 to {len(mixers) - 1}")
        teacher = mixers[i]
        if not isinstance(teacher, Attention):
            raise ValueError(f"{name}.layers has {i}, which is {type(teacher).__name__} and no softmax attention")
        mixers[i] = convert(teacher)
    return replace(spec, pattern=period(tuple(mixers)))
