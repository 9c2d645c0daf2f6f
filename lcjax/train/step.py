"""One training step as a pure function of (state, batch)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from lcjax.models.stacked import stacked_like, unstacked
from lcjax.parallel.adjoint import Adjoint, through_recurrences
from lcjax.parallel.layout import Exchange, attention_exchange
from lcjax.train.losses import Loss, LossSums
from lcjax.train.state import TrainState, divide

type Batch = dict[str, Array]  # inputs, targets, positions, segment_ids, loss_weights, each [B,T]
type Metrics = dict[str, Array]
type Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

BATCH_DTYPES = {
    "inputs": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "loss_weights": jnp.float32,
}


@dataclass(frozen=True)
class StepOptions:
    """How a step spends memory for time; only an `adjoint` other than the exact one changes what is computed."""

    accumulate: int = 1  # micro-batches per update
    remat: Literal["none", "full", "attention", "dots"] = "none"
    scan: bool = False
    exchange: Exchange = "auto"  # of full attention over a split sequence, see `lcjax.parallel.dense`
    adjoint: Adjoint = field(default_factory=Adjoint)  # the gradient of recurrent layers


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    loss: Loss,
    options: StepOptions = StepOptions(),
    trainable: tuple[str, ...] = (),
) -> Step:
    """The step for `jax.jit(step, donate_argnums=0)`.

    A step whose loss or gradient is not finite leaves parameters and optimiser state bit for bit as they were; it is
    counted in `skipped`. `accumulate` > 1 cuts the batch's rows into that many micro-batches: the update is that of
    the whole batch, since losses are summed and divided by the batch's total weight. Only parameters that `trainable`
    matches (empty: all) have gradients and optimiser state; the others pass through. The state may be stacked (see
    `lcjax.models.stacked`), which changes no number either.
    """

    def gradients(trained: nnx.State, frozen: nnx.State, batch: Batch) -> tuple[Any, LossSums]:
        def grad(trained: nnx.State, batch: Batch) -> tuple[Any, LossSums]:
            with attention_exchange(options.exchange), through_recurrences(options.adjoint):
                grads, sums = loss.gradients(graphdef, unstacked(trained), unstacked(frozen), batch, options)
            return stacked_like(grads, trained), sums

        if options.accumulate == 1:
            return grad(trained, batch)

        # Row r goes to micro-batch r mod accumulate, so that each holds rows of every data shard.
        split = lambda x: jnp.moveaxis(x.reshape(-1, options.accumulate, *x.shape[1:]), 1, 0)
        add = lambda total, part: (jax.tree.map(jnp.add, total, grad(trained, part)), None)
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(grad, trained, jax.tree.map(lambda x: split(x)[0], batch)),
        )
        return jax.lax.scan(add, zeros, jax.tree.map(split, batch))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trained, frozen = divide(state.params, trainable)
        grads, sums = gradients(trained, frozen, batch)
        weight = jnp.maximum(sums.weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        mean_nll = sums.nll / weight
        finite = jnp.isfinite(mean_nll) & jnp.isfinite(norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        updated = optax.apply_updates(trained, updates)
        keep = lambda new, old: jnp.where(finite, new, old)
        skip = (~finite).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=nnx.merge_state(jax.tree.map(keep, updated, trained), frozen),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            key=jax.random.split(state.key, 1)[0],
            skipped=state.skipped + skip,
            skipped_in_row=(state.skipped_in_row + 1) * skip,
        )
        metrics = {
            "loss": mean_nll,
            "z": sums.z / weight,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(learning_rate(state.step - state.skipped), jnp.float32),
            "tokens": sums.weight,
            **{name: part / weight for name, part in (sums.parts or {}).items()},
            "skipped": new_state.skipped,
            "skipped_in_row": new_state.skipped_in_row,
        }
        return new_state, metrics

    return step
