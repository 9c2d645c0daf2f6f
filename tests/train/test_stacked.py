"""A state whose scanned layers are stacked: nothing is lost on the way there and back, and rules see single layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.models.decoder import abstract
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention, ModelSpec
from lcjax.models.stacked import stacked, stacked_like, stacks, unstacked
from lcjax.models.weights import dotted
from lcjax.train.optimizers import AdamW, Cosine
from lcjax.train.state import divide

SPEC = ModelSpec(
    vocab_size=64, width=16, mlp_width=32, num_layers=5, num_heads=2, num_kv_heads=2, head_dim=8,
    pattern=(Attention(window=8), GatedLinear()),
)  # fmt: skip


def drawn():
    """Parameters that all differ, on the host's side of the model."""
    numbers = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(numbers.standard_normal(x.shape, np.float32))
    return jax.tree.map(draw, abstract(SPEC)[1])


def held(state):
    return {dotted(path): weight.get_metadata("layers", None) for path, weight in nnx.to_flat_state(state)}


def test_there_and_back():
    """Two layers of attention and two of linear attention take turns; the fifth runs alone."""
    params = drawn()
    groups = stacks(SPEC, params)
    tree = {"params": params, "moments": (jax.tree.map(lambda x: 2 * x, params), jnp.ones(()))}
    together = stacked(tree, groups)
    layers = held(together["params"])
    assert layers["layers.0.mlp.gate.kernel"] == (0, 2)
    assert layers["layers.1.mlp.gate.kernel"] == (1, 3)
    assert layers["layers.4.mlp.gate.kernel"] is None
    assert layers["embed.table"] is None
    assert not [name for name in layers if name.startswith(("layers.2.", "layers.3."))]
    kernel = together["params"]["layers"][0]["mlp"]["gate"]["kernel"]
    assert kernel.axes == ("layers", *params["layers"][0]["mlp"]["gate"]["kernel"].axes)
    np.testing.assert_array_equal(kernel[1], params["layers"][2]["mlp"]["gate"]["kernel"][...])

    apart = unstacked(together)
    assert jax.tree.structure(apart) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, apart, tree)
    jax.tree.map(np.testing.assert_array_equal, stacked_like(params, together["params"]), together["params"])


def test_what_trains_and_what_is_frozen_stay_apart():
    trained, frozen = divide(abstract(SPEC)[1], (r"layers\.0\.", r"mlp\.up"))
    groups = {dotted(group[0]): [path[1] for path in group] for group in stacks(SPEC, trained, frozen)}
    assert "layers.0.mlp.gate.kernel" not in groups, "layer 0 has nothing to be stacked with"
    assert groups["layers.1.mlp.gate.kernel"] == [1, 3]
    assert groups["layers.0.mlp.up.kernel"] == [0, 2], "all of it is trained"


def test_decay_sees_the_weights_of_single_layers():
    params = drawn()
    together = stacked(params, stacks(SPEC, params))
    optimizer = AdamW(Cosine(1e-3), no_decay=("embed", "layers/(1|3)/mlp/up"))
    expected = {dotted(path): weight.get_value() for path, weight in nnx.to_flat_state(optimizer.decayed(params))}
    found = {dotted(path): weight.get_value() for path, weight in nnx.to_flat_state(optimizer.decayed(together))}
    assert found == {name: expected[name] for name in found}
    assert not found["layers.0.mlp_norm.weight"], "a stack of vectors has two dimensions"
    assert not found["layers.1.mlp.up.kernel"]
    apart = dataclasses.replace(optimizer, no_decay=("layers/3/mlp/up",))
    with pytest.raises(ValueError, match=r"no_decay names layers/3/mlp/up/kernel but not all of the 2 layers"):
        apart.decayed(together)
