"""The loss that teaches a model to rank documents by attention: next tokens, and a contrast of one layer's shares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lcjax.data.ranking import RELEVANT
from lcjax.methods.blockrank.shares import by_document, contrastive_loss, read_documents
from lcjax.models.documents import DocumentBlocks
from lcjax.models.stack import apply_stacked
from lcjax.train.losses import CrossEntropy, LossSums, Passes


@dataclass(frozen=True)
class RankingLoss:
    """Cross-entropy of the answer plus `weight` x InfoNCE of the documents' shares at `layer` (arXiv 2510.05396).

    layer: counted from 0; the paper takes 20 of 32, and ranks by it later. temperature: of the shares. A row's contrast
    counts as often as it has answer tokens, as its cross-entropy does. Reported: `contrast`, and `top1`, how often a
    relevant document has the largest share.
    """

    layer: int = 20
    temperature: float = 0.05
    weight: float = 0.1
    cross_entropy: CrossEntropy = field(default_factory=CrossEntropy)

    def __post_init__(self):
        if self.layer < 0 or self.temperature <= 0 or self.weight < 0:
            raise ValueError(
                f"RankingLoss: layer {self.layer} and weight {self.weight} must not be negative, temperature "
                f"{self.temperature} must be positive"
            )

    def gradients(
        self, graphdef: Any, trained: nnx.State, frozen: nnx.State, batch: Mapping[str, Array], how: Passes
    ) -> tuple[nnx.State, LossSums]:
        """See `Loss`. Raises ValueError for a model without document blocks or without the layer."""

        def total(trained: nnx.State) -> tuple[Array, LossSums]:
            model = nnx.merge(graphdef, trained, frozen)
            size = self.block_size(model, batch)
            shares, x, context = read_documents(model, dict(batch), self.layer, size, how.remat, how.scan)
            x = apply_stacked(list(model.layers)[self.layer :], x, context, how.remat, how.scan)
            sums = self.cross_entropy(model, model.norm(x), batch["targets"], batch["loss_weights"])
            relevant = by_document(batch["roles"] == RELEVANT, size).any(-1)
            present = by_document(batch["segment_ids"] > 0, size).any(-1)
            each = contrastive_loss(shares, relevant, present, self.temperature)
            of_row = jnp.sum(batch["loss_weights"], axis=1)
            best = jnp.take_along_axis(relevant, jnp.argmax(shares, axis=1)[:, None], axis=1)[:, 0]
            parts = {"contrast": jnp.sum(of_row * each), "top1": jnp.sum(of_row * best)}
            objective = sums.nll + self.cross_entropy.z_loss * sums.z + self.weight * parts["contrast"]
            return objective, sums._replace(parts=parts)

        return jax.grad(total, has_aux=True)(trained)

    def describe(self) -> dict[str, Any]:
        """See `Loss`."""
        fields = {"layer": self.layer, "temperature": self.temperature, "weight": self.weight}
        return {"ranking": fields, **self.cross_entropy.describe()}

    def block_size(self, model: Any, batch: Mapping[str, Array]) -> int:
        """Tokens of a block. Raises ValueError for a model or batch that the loss is not for."""
        if self.layer >= len(model.layers):
            raise ValueError(f"RankingLoss.layer is {self.layer}, the model's layers are 0 to {len(model.layers) - 1}")
        pattern = getattr(model.layers[self.layer].mixer.mixer, "pattern", None)
        if not isinstance(pattern, DocumentBlocks):
            raise ValueError("RankingLoss needs document blocks: set train.step_methods = (@BlockRank(),)")
        if "roles" not in batch or batch["inputs"].shape[1] != pattern.length:
            raise ValueError(
                f"RankingLoss needs rows of train.data = @RankingData() of {pattern.length} tokens, which are "
                f"BlockRank.documents={pattern.documents} + 2 blocks of {pattern.size}; got {batch['inputs'].shape[1]}"
            )
        return pattern.size
