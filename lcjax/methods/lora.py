"""LoRA and DoRA: train low-rank adapters of chosen linear layers and nothing else; merge them when done."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flax import nnx

from lcjax.layers.adapter import Adapter
from lcjax.methods.base import Method
from lcjax.models.decoder import Decoder, abstract
from lcjax.models.spec import Adapters, ModelSpec

if TYPE_CHECKING:
    from lcjax.train.job import Train

ATTENTION = (r"mixer\.query$", r"mixer\.key$", r"mixer\.value$", r"mixer\.out$")


@dataclass(frozen=True)
class Lora(Method):
    """Adapters of `rank` on the linear layers that `targets` (regular expressions on dotted paths) find.

    Hu et al., arXiv 2106.09685: W becomes W + (alpha / rank) down up, `down` normal, `up` zero, so that training starts
    at the given model. dora: columns are rescaled to a trained magnitude (arXiv 2402.09353). also: parameters trained
    beside the adapters, such as LongLoRA's embeddings and norms. rank=0 is the identity.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ATTENTION
    dora: bool = False
    also: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"Lora.rank is {self.rank}; it must be positive, or 0 for no adapters")

    def model(self, spec: ModelSpec) -> ModelSpec:
        if self.rank == 0:
            return spec
        if spec.adapters is not None:
            raise ValueError(f"{spec.name!r} has adapters already: merge them first (lcjax.methods.lora.merge)")
        return replace(spec, adapters=Adapters(self.rank, self.alpha, self.targets, self.dora))

    def recipe(self, job: "Train") -> "Train":
        """Only adapters and `also` are trained."""
        return job if self.rank == 0 else replace(job, trainable=(r"\.adapter\.", *self.also))


def merge(spec: ModelSpec, params: nnx.State) -> tuple[ModelSpec, nnx.State]:
    """The model without adapters that computes the same: (spec, params), each kernel replaced by its merged one."""
    if spec.adapters is None:
        return spec, params
    model: Decoder = nnx.merge(abstract(spec)[0], params, copy=True)  # the given kernels stay as they are
    for _, module in nnx.iter_graph(model):
        if isinstance(adapter := getattr(module, "adapter", None), Adapter):
            module.kernel[...] = adapter.merged(module.kernel[...])
            module.adapter = None
    return replace(spec, adapters=None), nnx.split(model, nnx.Param)[1]
