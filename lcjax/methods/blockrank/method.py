"""BlockRank as a method: document blocks in place of full attention."""

from dataclasses import dataclass, replace

from lcjax.methods.base import Method
from lcjax.models.documents import DocumentBlocks
from lcjax.models.spec import Attention, ModelSpec


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
        mixers = []
        for i, mixer in enumerate(spec.pattern):
            if not isinstance(mixer, Attention) or mixer.window is not None or mixer.pattern is not None:
                raise ValueError(f"BlockRank: layer {i} is {mixer}; document blocks need full attention in every layer")
            mixers.append(replace(mixer, pattern=blocks))
        return replace(spec, pattern=tuple(mixers))
