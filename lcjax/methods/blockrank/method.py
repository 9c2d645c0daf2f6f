"""BlockRank as a method: document blocks in place of full attention."""

from dataclasses import dataclass, replace

from lcjax.methods.base import Method, check_unwritten
from lcjax.models.documents import DocumentBlocks
from lcjax.models.spec import ModelSpec


@dataclass(frozen=True)
class BlockRank(Method):
    """Every layer reads rows of `documents` blocks of `size` tokens, one before and one after; size=None: the identity.

    Meant for training steps (`train.step_methods`) beside `RankingData` and `RankingLoss`: the trained model is then
    saved as one of full attention, and ranking gives it the blocks of its own documents.
    """

    size: int | None = None
    documents: int = 30

    def model(self, spec: ModelSpec) -> ModelSpec:
        """Raises ValueError for a layer that is not full attention."""
        if self.size is None:
            return spec
        blocks = DocumentBlocks(self.size, self.documents)
        full = (check_unwritten(self, layer, mixer) for layer, mixer in enumerate(spec.pattern))
        return replace(spec, pattern=tuple(replace(mixer, pattern=blocks) for mixer in full))
