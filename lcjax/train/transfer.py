"""Attention transfer: each linearised layer learns to give what its softmax teacher gives, on the teacher's states."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcjax.layers.linearized import LinearizedLayer
from lcjax.models.stack import fold
from lcjax.models.weights import dotted
from lcjax.train.losses import LossSums, Passes


@dataclass(frozen=True)
class AttentionTransfer:
    """`scale` x the mean over layers of the squared error between student and teacher, before the output projection.

    The first stage of LoLCATs (arXiv 2410.10254) and LAWCAT (arXiv 2509.18467). The hidden states are the teacher's:
    every layer passes on what softmax attention gives, so errors do not compound, and one layer's gradient is taken
    before the next layer runs, so that only one layer's activations are alive. Trained parameters must lie in the
    mixers of linearised layers. The error of layer i is reported as `mse_i`.
    """

    scale: float = 1000.0

    def gradients(
        self, graphdef: Any, trained: nnx.State, frozen: nnx.State, batch: Mapping[str, Array], how: Passes
    ) -> tuple[nnx.State, LossSums]:
        """See `Loss`. `how.remat` has no effect: nothing is kept for a backward pass."""
        model = nnx.merge(graphdef, trained, frozen)
        students = [i for i, block in enumerate(model.layers) if isinstance(block.mixer, LinearizedLayer)]
        _check(trained, students)
        context = model.context(batch["positions"], 0, batch["segment_ids"], None)
        real = (batch["segment_ids"] > 0).astype(jnp.float32)

        def body(kind: Any, state: tuple[nnx.State, nnx.State], x: Array) -> tuple[Array, Any]:
            block = nnx.merge(kind, *state)
            if not isinstance(block.mixer, LinearizedLayer):
                return block(x, context)[0], None
            h = block.mixer_norm(x)
            target = block.mixer.target(h, context)

            def error(trained: nnx.State) -> Float[Array, ""]:
                y, _ = nnx.merge(kind, trained, state[1]).mixer.mix(h, context)
                each = jnp.mean((y.astype(jnp.float32) - target.astype(jnp.float32)) ** 2, axis=(2, 3))
                return jnp.sum(real * each)

            out = jax.value_and_grad(error)(state[0])
            x = block.after_mixer(x, block.mixer.out(target))
            return jax.lax.optimization_barrier((x, out))

        kinds, states = _by_layer(model, trained)
        _, outs = fold(kinds, states, body, model.embedded(batch["inputs"]), how.scan)
        factor = self.scale / len(students)
        found: dict[tuple[Any, ...], Any] = {}
        for i in students:
            for path, gradient in nnx.to_flat_state(outs[i][1]):
                found[("layers", i, *path)] = gradient.replace(factor * gradient.get_value())
        errors = {f"mse_{i}": outs[i][0] for i in students}
        total = factor * sum(errors.values(), jnp.zeros((), jnp.float32))
        return nnx.from_flat_state(found), LossSums(total, jnp.zeros((), jnp.float32), jnp.sum(real), errors)

    def describe(self) -> dict[str, Any]:
        """See `Loss`."""
        return {"transfer": self.scale}


def _check(trained: nnx.State, students: list[int]) -> None:
    if not students:
        raise ValueError("AttentionTransfer: the model has no linearised layer; add a method such as @Lawcat()")
    for path, _ in nnx.to_flat_state(trained):
        if path[0] != "layers" or path[1] not in students or path[2] != "mixer":
            raise ValueError(
                f"AttentionTransfer cannot train {dotted(path)}: only mixers of linearised layers have a teacher; "
                "narrow train.trainable"
            )


def _by_layer(model: Any, trained: nnx.State) -> tuple[list[Any], list[tuple[nnx.State, nnx.State]]]:
    """Each block's graphdef, and its state in (trained, frozen)."""
    chosen = {path for path, _ in nnx.to_flat_state(trained)}
    kinds, states = [], []
    for i, block in enumerate(model.layers):
        kind, mine, rest = nnx.split(block, lambda path, _, i=i: ("layers", i, *path) in chosen, ...)
        kinds.append(kind)
        states.append((mine, rest))
    return kinds, states
