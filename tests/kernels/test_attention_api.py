"""Arguments, dispatch, sinks and merging: what does not depend on a backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockList, Unsupported, block_sparse_attention, merge_attention
from pallas_kernels.masks import Causal, Full, Segments, Sink, Stride, Window, per_head
from pallas_kernels.op import dispatch, target_platform

Q = jnp.ones((2, 8, 4, 16))
KV = jnp.ones((2, 8, 2, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.ones((2, 8, 3, 16)), "v": jnp.ones((2, 8, 3, 16))}, "q: 4 heads are not a multiple of k's 3"),
        ({"k": jnp.ones((2, 8, 2, 8))}, "k: head dim 8 differs from q's 16"),
        ({"v": jnp.ones((2, 9, 2, 16))}, "v: length and heads"),
        ({"k": KV.astype(jnp.bfloat16)}, "k: dtype bfloat16 differs"),
        ({"q": Q[:, :0]}, "empty axis"),
        ({"mask": per_head([Causal()] * 3)}, "per_head gives 3 heads, q has 4"),
        ({"mask": Causal() & Segments()}, "segment_ids: None"),
        ({"segment_ids": jnp.ones((2, 7), jnp.int32)}, r"segment_ids: shape \(2, 7\)"),
        (
            {"mask": Causal() & (Sink(4) & Stride(4, 2)), "segment_ids": jnp.ones((2, 8), jnp.int32)},
            "cannot be combined with segment_ids",
        ),
        ({"q_offset": -1}, "q_offset: -1 is negative"),
        ({"kv_length": jnp.asarray([3, 9])}, "kv_length: 9 is outside 0..8"),
        ({"scale": 0.0}, "scale: 0.0 must be a positive"),
        ({"soft_cap": float("nan")}, "soft_cap: nan"),
        ({"sink_logits": jnp.ones(3)}, "sink_logits: shape"),
        ({"implementation": "cuda"}, "implementation='cuda' is not one of"),
        (
            {"lists": BlockList(np.full((2, 1, 1, 1), 4, np.int32), np.ones((2, 1, 1), np.int32), 8, 4)},
            r"block index 4 is outside 0\.\.1",
        ),
    ],
)
def test_bad_arguments_are_named_with_their_value(change, message, unchecked):
    call = {"q": Q, "k": KV, "v": KV, "mask": Causal(), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        block_sparse_attention(**call)


def test_a_forced_backend_says_why_it_declines():
    with pytest.raises(Unsupported, match="cudnn: cuDNN runs on NVIDIA GPUs, this is cpu"):
        block_sparse_attention(Q, KV, KV, Causal(), implementation="cudnn")
    with target_platform("gpu"), pytest.raises(Unsupported, match="only plain causal and full masks"):
        block_sparse_attention(Q, KV, KV, Causal() & Window(3), implementation="cudnn")


def test_dispatch_falls_through_in_order_and_lists_every_reason():
    def no(reason):
        def decline(_):
            raise Unsupported(reason)

        return decline

    backends = {"a": no("first reason"), "b": no("second reason"), "c": lambda x: x + 1}
    assert dispatch("op", backends, ("a", "b", "c"), None)(1) == 2
    with pytest.raises(Unsupported, match="a: first reason; b: second reason"):
        dispatch("op", backends, ("a", "b"), None)(1)
    with pytest.raises(Unsupported, match=r"\(b: second reason\)"):
        dispatch("op", backends, ("a", "b", "c"), "b")(1)


def draw(n, shape):
    return jax.random.normal(jax.random.key(n), shape)


def test_merging_parts_equals_one_call_with_gradients():
    q, k, v = draw(0, (2, 40, 4, 16)), draw(1, (2, 40, 2, 16)), draw(2, (2, 40, 2, 16))

    def split(q, k, v):
        near = block_sparse_attention(q, k[:, 24:], v[:, 24:], Full(), kv_length=None, return_lse=True)
        far = block_sparse_attention(q, k[:, :24], v[:, :24], Full(), return_lse=True)
        none = (jnp.zeros_like(near[0]), jnp.full_like(near[1], -jnp.inf))
        return merge_attention(near, far, none)

    def whole(q, k, v):
        return block_sparse_attention(q, k, v, Full(), return_lse=True)

    loss = lambda f: lambda *x: sum((y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum() for y in f(*x))
    for got, want in zip(split(q, k, v), whole(q, k, v), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    grads = (jax.jit(jax.grad(loss(f), (0, 1, 2)))(q, k, v) for f in (split, whole))
    for got, want in zip(*grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_merging_only_empty_rows_gives_zero_and_finite_gradients():
    o, lse = jnp.ones((1, 3, 2, 4)), jnp.full((1, 2, 3), -jnp.inf)
    merged = merge_attention((o, lse), (o, lse))
    assert (merged[0] == 0).all()
    assert (merged[1] == -jnp.inf).all()
    grads = jax.grad(lambda o, lse: merge_attention((o, lse), (o, lse))[0].sum(), (0, 1))(o, lse)
    assert all(jnp.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("parts", [(), ((jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2))),)])
def test_bad_merges(parts, unchecked):
    with pytest.raises(ValueError, match="merge_attention"):
        merge_attention(*parts)


def test_sink_logits_act_as_one_more_key_of_value_zero():
    q, k, v, logits = draw(0, (1, 9, 2, 8)), draw(1, (1, 9, 1, 8)), draw(2, (1, 9, 1, 8)), draw(3, (2,))
    o, lse = block_sparse_attention(q, k, v, Causal(), sink_logits=logits, return_lse=True)
    score = jnp.einsum("bthd,bskd->bhts", q, k) * 8**-0.5
    score = jnp.where(jnp.tri(9, dtype=bool), score, -jnp.inf)
    score = jnp.concatenate([score, jnp.broadcast_to(logits[None, :, None, None], (1, 2, 9, 1))], -1)
    want = jnp.einsum("bhts,bskd->bthd", jax.nn.softmax(score)[..., :-1], v)
    np.testing.assert_allclose(o, want, atol=1e-5)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(score, axis=-1), atol=1e-5)


def test_sink_logits_of_rows_without_keys_have_finite_gradients():
    def loss(logits):
        o = block_sparse_attention(Q, KV, KV, Causal() & Sink(0), sink_logits=logits)
        return o.sum()

    assert jnp.isfinite(jax.grad(loss)(jnp.ones(4))).all()
