"""Softmax attention made linear: the student layers of LAWCAT (arXiv 2509.18467) and LoLCATs (arXiv 2410.10254)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lcjax.cache.recurrent import RecurrentCache, ragged_tail
from lcjax.layers.attention import Context, HeadProjections, attend
from lcjax.layers.forget import GATE_TEMPERATURE, log_forget
from lcjax.layers.linear import Linear
from lcjax.layers.recurrence import Convolution, Inputs, masked, recur, repeat_heads
from lcjax.layers.weight import Weight
from lcjax.layers.window import window_sums
from lcjax.models.recurrent import Linearized
from lcjax.models.spec import ModelSpec
from lcjax.positions.rotary import apply_rope
from pallas_kernels import LinearState, hedgehog

GATE_STD = 0.006  # of the gate's matrices: decay starts near logsigmoid(0) / 16, an e-fold in 23 tokens
OTHER_TAPS = 1e-3  # of a convolution that starts near the identity


def identity_maps(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[H, D, f]`: each head's features are its first f coordinates."""
    return jnp.broadcast_to(jnp.eye(shape[1], shape[2]), shape)


def identity_taps(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[W, H, D]`: the current token, and a little of those before."""
    return jnp.full(shape, OTHER_TAPS).at[-1].set(1.0)


def decay_logits(horizons: tuple[float, float] | None, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[G, 2f]`: gate biases at which feature i of each half decays to 1/e in h_i tokens, h from first to last."""
    if horizons is None:
        return jnp.zeros(shape)
    tokens = jnp.geomspace(*horizons, shape[-1] // 2)
    return jnp.broadcast_to(jnp.tile(-jnp.log(jnp.expm1(GATE_TEMPERATURE / tokens)), 2), shape)


def time_steps(context: Context) -> Float[Array, "B T"]:
    """How far each token's position lies beyond that of the one before; 1 where a document begins."""
    assert context.positions is not None
    steps = jnp.diff(context.positions, axis=-1, prepend=context.positions[..., :1] - 1)
    return jnp.where(steps > 0, steps, 1).astype(jnp.float32)


class LinearizedLayer(HeadProjections):
    """The teacher's projections; convolutions, feature maps, gate and window of the `Linearized` record."""

    def __init__(self, spec: ModelSpec, mixer: Linearized, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        super().__init__(spec, rngs=rngs, param_dtype=param_dtype)
        self.mixer = mixer
        heads, groups, dim, width = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.width
        keys, taps = mixer.keys(spec), mixer.conv_width
        init: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        maps = Weight((heads, dim, keys // 2), ("heads", "head_dim", "rank"), draw=identity_maps)
        self.query_map = maps.param(rngs, param_dtype)
        self.key_map = None if mixer.tied else maps.param(rngs, param_dtype)
        conv = Weight((taps, heads, dim), ("taps", "heads", "head_dim"), draw=identity_taps)
        names = (("q", "k", "v") if mixer.conv_value else ("q", "k")) if taps else ()
        self.convs = nnx.Dict({name: Convolution(conv, **init) for name in names})
        down = Weight((width, mixer.decay_rank), ("embed", "rank"), std=GATE_STD)
        up = Weight((mixer.decay_rank, groups, keys), ("rank", "kv_heads", "head_dim"), std=GATE_STD)
        gated = mixer.decay == "vector"
        self.decay_down = Linear(down, **init) if gated else None
        biases = functools.partial(decay_logits, mixer.horizons)
        self.decay_up = Linear(up, bias=biases, **init) if gated else None
        logit = Weight((heads,), ("heads",), fill=mixer.window_logit)
        self.window_logit = logit.param(rngs, param_dtype) if mixer.window else None
        self.window_scale = mixer.teacher.scale or dim**-0.5

    def _log_decay(self, x: Float[Array, "B T width"]) -> Float[Array, "B T K Dk"] | None:
        if self.decay_down is None or self.decay_up is None:
            return None
        return log_forget(self.decay_down(x), self.decay_up)

    def _features(
        self, streams: dict[str, jax.Array], context: Context, cache: RecurrentCache | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, Any]]:
        """phi(q), phi(k) (H heads), v (K heads, or H if convolved), and the convolutions' new tails."""
        tails: dict[str, Any] = {}
        key_map = self.query_map if self.key_map is None else self.key_map
        maps = {"q": self.query_map[...], "k": key_map[...]}
        for name, convolve in self.convs.items():
            tail = None if cache is None else cache.tails[name]
            if name in maps:
                streams[name], tails[name] = convolve.features(streams[name], maps[name], context, tail)
            else:
                streams[name], tails[name] = convolve(streams[name], context, tail)
        if not self.convs:
            streams |= {n: hedgehog(repeat_heads(streams[n], len(map_)), map_) for n, map_ in maps.items()}
        return streams["q"], streams["k"], streams["v"], tails

    def target(self, x: Float[Array, "B T width"], context: Context) -> Float[Array, "B T H D"]:
        """What the teacher's attention makes of x with the same projections."""
        teacher = self.mixer.teacher
        return attend(teacher, *self.project(x), context, scale=teacher.scale, soft_cap=teacher.soft_cap)

    def mix(
        self, x: Float[Array, "B T width"], context: Context, cache: RecurrentCache | None = None
    ) -> tuple[Float[Array, "B T H D"], RecurrentCache | None]:
        """The heads' outputs before the output projection."""
        q, k, v = self.project(x)
        turned_q, turned_k = q, k
        if self.mixer.rope is not None:
            tables = context.tables[self.mixer.rope, None]
            turned_q, turned_k = apply_rope(q, tables.queries[0]), apply_rope(k, tables.keys[0])
        if self.mixer.window:
            y, state, tails = self._mix_window(x, (turned_q, turned_k, v), (q, k), context, cache)
        else:
            streams = {"q": turned_q, "k": turned_k, "v": v} if self.mixer.rotate else {"q": q, "k": k, "v": v}
            phi_q, phi_k, v, tails = self._features(streams, context, cache)
            log_decay = self._log_decay(x)
            if self.mixer.stretched and cache is None:
                steps = time_steps(context)[..., None, None]
                phi_k, log_decay = phi_k * steps, None if log_decay is None else log_decay * steps
            inputs = Inputs(phi_q.astype(x.dtype), phi_k.astype(x.dtype), v, log_decay)
            y, state = recur(inputs, context, cache, normalise=self.mixer.normalise, scale=1.0)
        after = None if cache is None else cache.advance(state, tails, x.shape[1], context.valid)
        return y.astype(x.dtype), after

    def _mix_window(
        self,
        x: Float[Array, "B T width"],
        turned: tuple[jax.Array, jax.Array, jax.Array],
        plain: tuple[jax.Array, jax.Array],
        context: Context,
        cache: RecurrentCache | None,
    ) -> tuple[Float[Array, "B T H D"], LinearState, dict[str, Any]]:
        """(factor x window + linear numerators) / (the same of the denominators), the denominators in float32."""
        w, length = self.mixer.window, x.shape[1]
        q, k, v = turned
        before_k, before_v = self._before(k, cache)
        all_k, all_v = (jnp.concatenate(pair, axis=1) for pair in ((before_k, k), (before_v, v)))
        seen = _seen(w, length, x.shape[0], context, cache)
        near = window_sums(q, all_k, all_v, seen[:, :, 1:], self.window_scale)
        # The linear branch reads the keys as they leave the window, or all keys at once.
        linear_k, linear_v = (k if self.mixer.rotate else plain[1], v)
        if not self.mixer.overlap:
            linear_k, linear_v = all_k[:, :length], all_v[:, :length]
        linear_q = q if self.mixer.rotate else plain[0]
        phi_q, phi_k, wide_v, tails = self._features({"q": linear_q, "k": linear_k, "v": linear_v}, context, cache)
        if not self.mixer.overlap:
            phi_k = masked(phi_k, seen[:, :, 0])
        ones = jnp.ones((*wide_v.shape[:3], 1), jnp.float32)
        values = jnp.concatenate([wide_v.astype(jnp.float32), ones], axis=-1)
        o, state = recur(Inputs(phi_q, phi_k, values, self._log_decay(x)), context, cache, scale=1.0)
        assert self.window_logit is not None
        factor = jax.nn.sigmoid(self.window_logit[...].astype(jnp.float32))[:, None]  # [H,1]
        weighted = factor * near.weighted + o[..., :-1]
        total = factor * near.total[..., None] + o[..., -1:]
        if cache is not None:
            for name, new in (("window_k", k), ("window_v", v)):
                tails[name] = ragged_tail(new.reshape(*new.shape[:2], -1), cache.tails[name], context.valid)
        return weighted / (total + 1e-10), state, tails

    def _before(self, k: Float[Array, "B T K D"], cache: RecurrentCache | None) -> tuple[jax.Array, jax.Array]:
        """Rotated keys, and values, of the w tokens before the first one; zeros where there are none."""
        shape = (k.shape[0], self.mixer.window, *k.shape[2:])
        if cache is None:
            return jnp.zeros(shape, k.dtype), jnp.zeros(shape, k.dtype)
        held = (cache.tails[name].astype(k.dtype).reshape(shape) for name in ("window_k", "window_v"))
        return next(held), next(held)


def _seen(
    window: int, length: int, batch: int, context: Context, cache: RecurrentCache | None
) -> Bool[Array, "B T w1"]:
    """Whether the token w, w-1, ..., 0 places before each one exists, in the same segment."""
    at = jnp.arange(length)[:, None] + jnp.arange(window + 1)  # in the tail of w tokens, then the chunk
    held = jnp.zeros((batch,), jnp.int32) if cache is None else jnp.minimum(jnp.asarray(cache.length), window)
    exists = at[None] >= window - held[:, None, None]
    if context.segment_ids is None:
        return exists
    ids = jnp.pad(context.segment_ids, ((0, 0), (window, 0)), constant_values=-1)
    return exists & (ids[:, at] == context.segment_ids[:, :, None])
