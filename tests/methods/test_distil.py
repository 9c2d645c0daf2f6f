"""Distillation of a tiny model: transfer against a separate teacher, adapters, stages, and that it learns at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.checkpoint.hf import export_pretrained, load_pretrained
from lcjax.methods import Lawcat, Lolcats, Lora, adapt_model
from lcjax.methods.linearize import STUDENT
from lcjax.methods.lora import merge
from lcjax.models.decoder import Decoder, abstract
from lcjax.models.recurrent import DeltaNet, Linearized, Mamba2
from lcjax.models.spec import Attention, ModelSpec
from lcjax.models.weights import carry_over, check_patterns
from lcjax.train.losses import CrossEntropy
from lcjax.train.optimizers import AdamW, Cosine
from lcjax.train.state import Start, divide
from lcjax.train.step import StepOptions, make_step
from lcjax.train.transfer import AttentionTransfer

SPEC = ModelSpec(
    vocab_size=32, width=32, mlp_width=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher():
    return nnx.split(Decoder(SPEC, rngs=nnx.Rngs(0)), nnx.Param)


def batch(rows=2, length=16, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (rows, length + 1), 0, 32)
    segments = jnp.where(jnp.arange(length) < length - 3, 1, 0)
    wide = lambda x: jnp.broadcast_to(x, (rows, length)).astype(jnp.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": wide(jnp.arange(length)),
        "segment_ids": wide(segments),
        "loss_weights": wide(segments).astype(jnp.float32),
    }


def student_of(teacher, method, seed=1):
    spec = method.model(SPEC)
    return spec, carry_over(spec, teacher[1], key=jax.random.key(seed))


def test_transfer_is_the_error_against_a_separate_teacher(teacher):
    """Loss and gradients against plain autodiff of a mean over layers, the hidden states being the softmax model's."""
    spec, params = student_of(teacher, Lawcat(layers=(0, 1)))
    graphdef, _ = abstract(spec)
    trained, frozen = divide(params, STUDENT)
    data = batch()

    def expected(trained):
        model, original = nnx.merge(graphdef, trained, frozen), nnx.merge(*teacher)
        context = model.context(data["positions"], 0, data["segment_ids"], None)
        x, total = original.embedded(data["inputs"]), 0.0
        for i, (block, other) in enumerate(zip(model.layers, original.layers, strict=True)):
            h = other.mixer_norm(x)
            target, _ = other.mixer.mix(h, context)
            if i in (0, 1):
                y, _ = block.mixer.mix(jax.lax.stop_gradient(h), context)
                error = jnp.mean((y - jax.lax.stop_gradient(target)) ** 2, axis=(2, 3))
                total += 500.0 * jnp.sum(error * (data["segment_ids"] > 0))
            x, _ = other(x, context)
        return total

    loss, gradient = jax.jit(jax.value_and_grad(expected))(trained)
    transfer = jax.jit(
        lambda trained, how: AttentionTransfer().gradients(graphdef, trained, frozen, data, how),
        static_argnums=1,
    )
    for scan in (False, True):
        got = transfer(trained, StepOptions(scan=scan))
        np.testing.assert_allclose(got[1].nll, loss, rtol=1e-5)
        assert sorted(got[1].parts) == ["mse_0", "mse_1"]
        assert jax.tree.structure(got[0]) == jax.tree.structure(gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), got[0], gradient)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_transfer_keeps_one_layers_activations(teacher):
    """Four more layers need no more room than their gradients."""

    def memory(layers):
        spec = Lawcat().model(dataclasses.replace(SPEC, num_layers=layers))
        graphdef, params = abstract(spec)
        trained, frozen = divide(params, STUDENT)
        run = lambda trained, frozen, data: AttentionTransfer().gradients(
            graphdef, trained, frozen, data, StepOptions()
        )
        compiled = jax.jit(run).lower(trained, frozen, batch(length=256)).compile()
        return compiled.memory_analysis().temp_size_in_bytes, sum(x.size * 4 for x in jax.tree.leaves(trained))

    (few, small), (many, large) = memory(2), memory(6)
    assert many - few < large - small + few / 8


def test_transfer_refuses_what_has_no_teacher(teacher):
    spec, params = student_of(teacher, Lawcat())
    with pytest.raises(ValueError, match=r"cannot train layers\.0\.mlp"):
        AttentionTransfer().gradients(abstract(spec)[0], *divide(params, ("mlp",)), batch(), StepOptions())
    with pytest.raises(ValueError, match="no linearised layer"):
        AttentionTransfer().gradients(teacher[0], *divide(teacher[1], ()), batch(), StepOptions())


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_start_at_the_model_and_merge_into_it(teacher, dora):
    spec = Lora(rank=3, dora=dora, targets=(r"mixer\.(query|out)$", "mlp.up")).model(SPEC)
    params = carry_over(spec, teacher[1], key=jax.random.key(5))
    graphdef, _ = abstract(spec)
    tokens = batch()["inputs"]
    forward = jax.jit(lambda g, p: nnx.merge(g, p)(tokens), static_argnums=0)
    np.testing.assert_allclose(forward(graphdef, params), forward(*teacher), atol=1e-6)  # DoRA divides norms
    trained, frozen = divide(params, (r"\.adapter\.",))
    names = {path[-1] for path, _ in nnx.to_flat_state(trained)}
    assert names == {"down", "up", "magnitude"} if dora else {"down", "up"}
    leaves, tree = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(6), len(leaves))
    moved = tree.unflatten([x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])
    params = nnx.merge_state(moved, frozen)
    adapted = forward(graphdef, params)
    assert float(jnp.abs(adapted - forward(*teacher)).max()) > 0.05
    plain, merged = merge(spec, params)
    assert plain == SPEC
    np.testing.assert_allclose(forward(abstract(plain)[0], merged), adapted, atol=3e-5)


def test_a_run_of_stages_learns_to_recall(tmp_path):
    """Transfer lowers every layer's error, then adapters the loss of a recall toy; what is frozen stays."""
    teacher = nnx.split(Decoder(SPEC, rngs=nnx.Rngs(0)), nnx.Param)
    tokens, weights = recall(64)

    def run(spec, start, trainable, loss, peak, steps):
        optimizer = AdamW(Cosine(peak), weight_decay=0.0)
        state = Start(spec, optimizer.build(steps), 0, trainable, start).state()
        step = make_step(
            abstract(spec)[0], optimizer.build(steps), optimizer.schedule.build(steps), loss, StepOptions(), trainable
        )
        step, metrics = jax.jit(step), []
        for i in range(steps):
            rows = slice(i % 4 * 16, i % 4 * 16 + 16)
            length = tokens.shape[1] - 1
            ones = jnp.ones((16, length), jnp.int32)
            data = {
                "inputs": tokens[rows, :-1],
                "targets": tokens[rows, 1:],
                "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ones.shape),
                "segment_ids": ones,
                "loss_weights": weights[rows],
            }
            state, found = step(state, data)
            metrics.append(jax.device_get(found))
        return state, metrics

    state, found = run(SPEC, teacher[1], (), CrossEntropy(), 1e-2, 60)
    assert found[-1]["loss"] < 0.5 * found[0]["loss"], "the teacher learns the toy"
    spec = Lawcat().model(SPEC)
    student, found = run(spec, state.params, STUDENT, AttentionTransfer(), 1e-2, 160)
    for i in range(3):
        assert found[-1][f"mse_{i}"] < 0.67 * found[0][f"mse_{i}"]
    kept = dict(nnx.to_flat_state(student.params))
    for path, variable in nnx.to_flat_state(state.params):
        np.testing.assert_array_equal(kept[path].get_value(), variable.get_value())
    adapted = adapt_model([Lora(rank=4)], spec)
    tuned, found = run(adapted, student.params, (r"\.adapter\.",), CrossEntropy(), 1e-2, 120)
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert jax.tree.leaves(tuned.opt_state)
    plain, params = merge(adapted, tuned.params)
    export_pretrained(plain, params, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.spec == plain
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def recall(rows, pairs=4):
    """Key-value pairs, then each key again: the loss counts the values that then follow. `[rows, 4 pairs]`."""
    rng = np.random.default_rng(0)
    keys = np.stack([rng.permutation(8)[:pairs] for _ in range(rows)])
    values = rng.integers(8, 16, (rows, pairs))
    order = np.stack([rng.permutation(pairs) for _ in range(rows)])
    asked = np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)
    shown = np.stack([keys, values], axis=2).reshape(rows, -1)
    tokens = np.concatenate([shown, np.stack(asked, axis=2).reshape(rows, -1)], axis=1)
    weights = np.zeros((rows, tokens.shape[1] - 1), np.float32)
    weights[:, 2 * pairs :: 2] = 1
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(weights)


@pytest.mark.parametrize(
    "mixer", [Linearized.lolcats(window=5), DeltaNet(gated=True), Mamba2(num_heads=4, head_dim=8, state=16)], ids=str
)
def test_every_kind_of_layer_is_exported_and_reloaded(mixer, tmp_path):
    spec = dataclasses.replace(SPEC, pattern=(mixer, Attention()), num_layers=2)
    params = nnx.split(Decoder(spec, rngs=nnx.Rngs(3)), nnx.Param)[1]
    export_pretrained(spec, params, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.spec == spec
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_weights_follow_their_paths(teacher):
    spec, params = student_of(teacher, Lolcats())
    flat = dict(nnx.to_flat_state(params))
    for path, variable in nnx.to_flat_state(teacher[1]):
        assert flat[path] is variable
    with pytest.raises(ValueError, match=r"lack \d+ parameters of 'decoder', the first is layers.0.mixer.key_map"):
        carry_over(spec, teacher[1])
    with pytest.raises(ValueError, match=r"embed\.table has shape"):
        carry_over(dataclasses.replace(SPEC, vocab_size=33), teacher[1])
    with pytest.raises(ValueError, match="pattern 'nothing', which matches no parameter"):
        check_patterns("train.trainable", ("nothing",), params)
