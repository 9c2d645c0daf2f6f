"""LongLoRA (arXiv 2309.12307): a longer context trained cheaply, with shifted groups and low-rank adapters."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lcjax.methods.base import Method, check_unwritten
from lcjax.methods.lora import ATTENTION, Lora
from lcjax.models.family import period
from lcjax.models.groups import ShiftedGroups
from lcjax.models.spec import Attention, Mixer, ModelSpec

if TYPE_CHECKING:
    from lcjax.train.job import Train


@dataclass(frozen=True)
class ShiftedSparse(Method):
    """Full attention layers read groups of `group` tokens of rows of `length`; group=None is the identity.

    KV head h of layer i is shifted by half a group where h + i is odd: half of the heads, in each layer where their
    number is even.
    """

    group: int | None = None
    length: int = 0

    def model(self, spec: ModelSpec) -> ModelSpec:
        if self.group is None:
            return spec
        mixers = tuple(self._grouped(i, mixer, spec.num_kv_heads) for i, mixer in enumerate(spec.layers))
        return replace(spec, pattern=period(mixers))

    def _grouped(self, layer: int, mixer: Mixer, num_kv_heads: int) -> Mixer:
        if not isinstance(mixer, Attention) or mixer.window is not None or self.group is None:
            return mixer
        full = check_unwritten(self, layer, mixer)
        shifted = tuple((head + layer) % 2 == 1 for head in range(num_kv_heads))
        return replace(full, pattern=ShiftedGroups(self.group, self.length, shifted))


@dataclass(frozen=True)
class LongLora(Method):
    """Adapters on the attention projections, norms and embeddings in full, and training steps in shifted groups.

    A row is cut into `groups` groups. The trained model, merged, is one of full attention: nothing of the groups is in
    it. Give the longer context its positions with another method (`Positions`; the paper interpolates linearly). rank,
    alpha, targets, also: as in `Lora`; rank=0 trains every weight. groups=1 is full attention, and the identity where
    rank=0 too.
    """

    groups: int = 4
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ATTENTION
    also: tuple[str, ...] = ("embed", "norm")

    def __post_init__(self):
        if self.groups < 1:
            raise ValueError(f"LongLora.groups is {self.groups}; it must be at least 1")

    @property
    def adapters(self) -> Lora:
        """The part that says which weights are trained."""
        return Lora(self.rank, self.alpha, self.targets, also=self.also)

    def model(self, spec: ModelSpec) -> ModelSpec:
        return self.adapters.model(spec)

    def recipe(self, job: "Train") -> "Train":
        """Raises ValueError for rows that don't divide into the groups and their halves."""
        job = self.adapters.recipe(job)
        if self.groups == 1:
            return job
        if job.length % (2 * self.groups):
            raise ValueError(
                f"LongLora: rows of {job.length} tokens don't divide into {self.groups} groups of an even length; "
                f"make train.length a multiple of {2 * self.groups}"
            )
        return replace(job, step_methods=(*job.step_methods, ShiftedSparse(job.length // self.groups, job.length)))
