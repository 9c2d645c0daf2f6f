"""What training minimises: the protocol, and the next-token loss whose T x V logits never exist at once."""

import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lcjax.parallel.layout import current_layout, per_shard
from lcjax.parallel.rules import partition
from lcjax.parallel.weights import storage_axes
from lcjax.parallel.work import checkpoint


@runtime_checkable
class Unembedding(Protocol):
    """The part of a decoder that the loss needs."""

    spec: Any

    def logits(
        self, x: Float[Array, "*batch width"], unembedding: Float[Array, "width V"] | None = None
    ) -> Float[Array, "*batch V"]: ...

    def unembedding(self) -> Float[Array, "width V"]: ...


@runtime_checkable
class Passes(Protocol):
    """How forward and backward pass spend memory for time: the arguments of `Decoder.hidden`."""

    @property
    def remat(self) -> str: ...

    @property
    def scan(self) -> bool: ...


class LossSums(NamedTuple):
    """Sums over tokens, so that micro-batches add up: divide by `weight` at the end."""

    nll: Float[Array, ""]  # sum of weight * negative log-likelihood, nats
    z: Float[Array, ""]  # sum of weight * log(Z)**2, before its coefficient
    weight: Float[Array, ""]
    parts: dict[str, Array] | None = None  # further sums to report, by name


@runtime_checkable
class Loss(Protocol):
    """What a training step minimises."""

    def gradients(
        self, graphdef: Any, trained: nnx.State, frozen: nnx.State, batch: Mapping[str, Array], how: Passes
    ) -> tuple[nnx.State, LossSums]:
        """Gradients of the sum over the batch with respect to `trained`, and the sums; `how` changes no number."""
        ...

    def describe(self) -> dict[str, Any]:
        """What two runs must have in common to share checkpoints (JSON)."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Weighted cross-entropy plus `z_loss` * log(Z)**2 (PaLM, arXiv 2204.02311, section 5).

    chunk_tokens: logits exist for about this many tokens at a time (memory: chunk_tokens * V * 4 bytes).
    implementation: 'chunked' runs anywhere; 'tokamax' is its fused kernel (no z-loss, no soft cap, one device);
      'auto' takes the fused kernel on a TPU where it is installed and applies.
    """

    z_loss: float = 0.0
    chunk_tokens: int = 2048
    implementation: Literal["auto", "chunked", "tokamax"] = "auto"

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"z_loss is {self.z_loss}; it must not be negative")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}; it must be at least 1")

    def __call__(
        self,
        model: Unembedding,
        hidden: Float[Array, "B T width"],
        targets: Int[Array, "B T"],
        weights: Float[Array, "B T"],
    ) -> LossSums:
        """Sums over all tokens. A token of weight 0 has no effect, whatever its hidden state holds."""
        if reason := self._fused_refusal(model):
            if self.implementation == "tokamax":
                raise ValueError(f"CrossEntropy.implementation='tokamax' cannot run: {reason}; use 'auto' or 'chunked'")
            return chunked(model, hidden, targets, weights, self.chunk_tokens)
        # The fused kernel has no weights; 0 and 1 it can express (see `fused`), others go the chunked way.
        binary = jnp.all((weights == 0) | (weights == 1))
        return jax.lax.cond(
            binary,
            lambda: fused(model, hidden, targets, weights),
            lambda: chunked(model, hidden, targets, weights, self.chunk_tokens),
        )

    def gradients(
        self, graphdef: Any, trained: nnx.State, frozen: nnx.State, batch: Mapping[str, Array], how: Passes
    ) -> tuple[nnx.State, LossSums]:
        """See `Loss`."""

        def total(trained: nnx.State) -> tuple[Array, LossSums]:
            model = nnx.merge(graphdef, trained, frozen)
            hidden, _ = model.hidden(
                batch["inputs"],
                positions=batch["positions"],
                segment_ids=batch["segment_ids"],
                remat=how.remat,
                scan=how.scan,
            )
            sums = self(model, hidden, batch["targets"], batch["loss_weights"])
            return sums.nll + self.z_loss * sums.z, sums

        return jax.grad(total, has_aux=True)(trained)

    def describe(self) -> dict[str, Any]:
        """See `Loss`."""
        return {"z_loss": self.z_loss}

    def _fused_refusal(self, model: Unembedding) -> str:
        if self.implementation == "chunked":
            return "chunked was asked for"
        if importlib.util.find_spec("tokamax") is None:
            return "tokamax is not installed"
        if self.z_loss or model.spec.logit_soft_cap is not None:
            return "its kernel has neither z-loss nor a logit soft cap"
        if jax.device_count() > 1:
            return "its kernel runs on one device"
        if self.implementation == "auto" and jax.default_backend() != "tpu":
            return "its kernel is for TPUs; elsewhere tokamax materialises the logits"
        return ""


def chunked(
    model: Unembedding,
    hidden: Float[Array, "B T width"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk_tokens: int,
) -> LossSums:
    """Scan over slices of T; logits are recomputed in the backward pass, one slice at a time.

    Over a mesh every shard of the tokens scans its own: the unembedding is put together once, and so is its gradient.
    """
    w = model.unembedding()
    layout = current_layout(hidden.shape[0], (), hidden.shape[1])
    if layout is None or not layout.axes("batch", "length"):
        return _scanned(model, w, hidden, targets, weights, chunk_tokens)
    sizes = {axis: jax.sharding.get_abstract_mesh().shape[axis] for axis in layout.axes("batch", "length")}
    each = max(1, chunk_tokens // math.prod(sizes.values()))
    stored = partition(("embed", "vocab"), sizes)

    def shard(w: Array, hidden: Array, targets: Array, weights: Array) -> LossSums:
        for axis in reversed(storage_axes(stored)):
            w = jax.lax.all_gather(w, axis, axis=0, tiled=True)
        return jax.lax.psum(_scanned(model, w, hidden, targets, weights, each), (*sizes,))

    tokens = layout.spec("batch", "length")
    in_specs = (stored, tokens, tokens, tokens)
    return per_shard(shard, in_specs, PartitionSpec(), (*sizes,))(w, hidden, targets, weights)


def _scanned(
    model: Unembedding,
    w: Float[Array, "width V"],
    hidden: Float[Array, "B T width"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk_tokens: int,
) -> LossSums:
    """`chunked` on one shard."""
    batch, length, _ = hidden.shape
    count = max(1, min(length, -(-batch * length // chunk_tokens)))
    size = -(-length // count)

    def slices(x: Array) -> Array:
        pad = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad).reshape(batch, count, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)  # [count, B, size, ...]

    @checkpoint
    def one(h: Float[Array, "B C width"], target: Int[Array, "B C"], weight: Float[Array, "B C"]) -> LossSums:
        real = weight > 0
        logits = model.logits(jnp.where(real[..., None], h, 0), w)  # f32 [B,C,V]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return LossSums(
            nll=jnp.sum(jnp.where(real, weight * (log_z - picked), 0)),
            z=jnp.sum(jnp.where(real, weight * log_z**2, 0)),
            weight=jnp.sum(weight),
        )

    def add(total: LossSums, part: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, total, one(*part)), None

    nothing = jnp.zeros((), jnp.float32)
    parts = (slices(hidden), slices(targets), slices(weights.astype(jnp.float32)))
    return jax.lax.scan(add, LossSums(nothing, nothing, nothing), parts)[0]


def fused(
    model: Unembedding, hidden: Float[Array, "B T width"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> LossSums:
    """Tokamax's linear + softmax + cross-entropy kernel, for weights of 0 and 1; its z is reported as 0.

    A zero row has logits 0, so it adds exactly log(V) to the sum and nothing to any gradient: masked rows are zeroed
    and their log(V) taken off again.
    """
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():  # or tokamax parses the command line of whatever program it runs in
        flags.FLAGS(sys.argv[:1])

    real = weights.reshape(-1) > 0
    x = jnp.where(real[:, None], hidden.reshape(-1, hidden.shape[-1]), 0)
    w = model.unembedding().astype(x.dtype)
    total = tokamax.linear_softmax_cross_entropy_loss(x, jnp.where(real, targets.reshape(-1), 0), w, reduction="sum")
    count = jnp.sum(real).astype(jnp.float32)
    masked = real.size - count
    nll = total.astype(jnp.float32) - masked * jnp.log(jnp.float32(w.shape[1]))
    return LossSums(nll, jnp.zeros((), jnp.float32), count)
