"""Gate learning of DuoAttention (arXiv 2410.10819): which KV heads need the whole text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcjax.layers.gated_heads import GatedHeadsLayer
from lcjax.models.stack import fold, rematerialised
from lcjax.models.weights import dotted
from lcjax.train.losses import LossSums, Passes


@dataclass(frozen=True)
class GateDistillation:
    """Squared distance of the final normed states of a gated and an untouched stream, and `l1` x the mean gate.

    Both streams read the same rows. The untouched one is the model; in the gated one each KV head gives
    gate x full + (1 - gate) x near attention. The distance is a mean over features and over the tokens that the data
    weighs: of passkey documents, the questions and answers. Only gates are trained. Reported are `distance` and the
    mean `gate`.
    """

    l1: float = 0.05

    def __post_init__(self):
        if self.l1 < 0:
            raise ValueError(f"GateDistillation.l1 is {self.l1}; it must not be negative")

    def gradients(
        self, graphdef: Any, trained: nnx.State, frozen: nnx.State, batch: Mapping[str, Array], how: Passes
    ) -> tuple[nnx.State, LossSums]:
        """See `Loss`."""
        _check(trained)
        weights = batch["loss_weights"].astype(jnp.float32)
        weight = jnp.sum(weights)

        def total(trained: nnx.State) -> tuple[Array, LossSums]:
            model = nnx.merge(graphdef, trained, frozen)
            reference, gated = two_streams(model, batch, how)
            each = jnp.mean((gated.astype(jnp.float32) - reference.astype(jnp.float32)) ** 2, axis=-1)
            distance = jnp.sum(jnp.where(weights > 0, weights * each, 0))
            gates = jnp.concatenate(jax.tree.leaves(trained))
            gate = jnp.mean(jnp.abs(gates))
            loss = distance + weight * self.l1 * gate
            parts = {"distance": distance, "gate": weight * gate}
            return loss, LossSums(loss, jnp.zeros((), jnp.float32), weight, parts)

        return jax.grad(total, has_aux=True)(trained)

    def describe(self) -> dict[str, Any]:
        """See `Loss`."""
        return {"gates": self.l1}


def two_streams(
    model: Any, batch: Mapping[str, Array], how: Passes
) -> tuple[Float[Array, "B T width"], Float[Array, "B T width"]]:
    """Final normed states of the untouched and of the gated stream; the first is not differentiated."""
    context = model.context(batch["positions"], 0, batch["segment_ids"], None)

    def layer(block: Any, reference: Array, x: Array) -> tuple[Array, Array]:
        reference = jax.lax.stop_gradient(reference)
        mixer, pair = block.mixer, (block.mixer_norm(reference), block.mixer_norm(x))
        if isinstance(mixer, GatedHeadsLayer):
            outs = [mixer.out(o) for o in mixer.streams(*pair, context)]
        else:
            outs = [mixer(h, context)[0] for h in pair]
        first, second = (block.after_mixer(y, out) for y, out in zip((reference, x), outs, strict=True))
        return first, second

    def body(kind: Any, state: Any, pair: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        apply = lambda state, pair: layer(nnx.merge(kind, state), *pair)
        return rematerialised(apply, how.remat)(state, pair), None

    parts = [nnx.split(block) for block in model.layers]
    x = model.embedded(batch["inputs"])
    (reference, gated), _ = fold([kind for kind, _ in parts], [state for _, state in parts], body, (x, x), how.scan)
    return jax.lax.stop_gradient(model.norm(reference)), model.norm(gated)


def _check(trained: nnx.State) -> None:
    paths = [path for path, _ in nnx.to_flat_state(trained)]
    if not paths:
        raise ValueError("GateDistillation: the model has no gates; add the method @DuoGates()")
    for path in paths:
        if path[-1] != "gates":
            raise ValueError(
                f"GateDistillation cannot train {dotted(path)}: only gates are learned; narrow train.trainable"
            )
