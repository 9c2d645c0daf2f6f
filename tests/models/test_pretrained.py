"""Weights in and out: exact round trips, GGUF layouts, sharded loading, and what is refused."""

import dataclasses
import json
import os
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.checkpoint import safetensors
from lcjax.checkpoint.hf import export_pretrained, load_pretrained
from lcjax.checkpoint.source import TensorFileError
from lcjax.models.decoder import Decoder, abstract
from lcjax.models.recurrent import GatedLinear
from lcjax.models.registry import family_of_gguf, spec_from_hf, spec_to_hf
from lcjax.models.spec import Attention, ModelSpec
from lcjax.parallel.mesh import make_mesh
from lcjax.positions import Rope
from lcjax.serve.source import Pretrained

SIZES = {
    "vocab_size": 24,
    "width": 16,
    "mlp_width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "dtype": "float32",
}
GEMMA = {
    "norm_offset": 1.0,
    "post_norm": True,
    "embed_scale": 4.0,
    "activation": "gelu_tanh",
    "pattern": (Attention(window=8, scale=8**-0.5), Attention(rope=Rope(1e6), scale=8**-0.5)),
}
SPECS = {
    "llama": ModelSpec(**SIZES, name="llama", qkv_bias=True, out_bias=True, mlp_bias=True),
    "mistral": ModelSpec(**SIZES, name="mistral", pattern=(Attention(window=8),), tie_embeddings=False),
    "qwen2": ModelSpec(**SIZES, name="qwen2", qkv_bias=True),
    "qwen3": ModelSpec(**SIZES, name="qwen3", qk_norm=True, tie_embeddings=False),
    "gemma3_text": ModelSpec(**SIZES | GEMMA, name="gemma3_text", qk_norm=True),
}


def random_params(spec):
    """The spec's parameters, norms and biases drawn too."""
    graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)), nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return graphdef, jax.tree.unflatten(tree, drawn)


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("name", SPECS)
def test_round_trip_is_exact(name, tmp_path):
    spec = SPECS[name]
    _, params = random_params(spec)
    export_pretrained(spec, params, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.spec == spec
    assert_equal(loaded.params, params)


def test_the_mean_of_two_models(tmp_path):
    """Another source of the same shapes; in bfloat16 the mean is rounded once."""
    spec = SPECS["llama"]
    _, params = random_params(spec)
    other = jax.tree.map(lambda x: 3 * x + 1, params)
    for name, weights in (("a", params), ("b", other)):
        (tmp_path / name).mkdir()
        export_pretrained(spec, weights, tmp_path / name)
    (tmp_path / "c").mkdir()
    small = dataclasses.replace(spec, mlp_width=8)
    export_pretrained(small, jax.tree.map(lambda x: jnp.zeros(x.shape), abstract(small)[1]), tmp_path / "c")
    source = Pretrained(str(tmp_path / "a"), averaged_with=str(tmp_path / "b"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 2 * y + 0.5, atol=1e-6), source.read().params, params)
    same = dataclasses.replace(source, averaged_with=source.source, dtype="bfloat16")
    assert_equal(same.read().params, load_pretrained(tmp_path / "a", dtype="bfloat16").params)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down.kernel is \(32, 16\) in one and \(8, 16\) in the other"):
        dataclasses.replace(source, averaged_with=str(tmp_path / "c")).read()


def test_sharded_and_bfloat16(tmp_path):
    spec = SPECS["llama"]
    _, params = random_params(spec)
    export_pretrained(spec, params, tmp_path)
    mesh = make_mesh(fsdp=4, tensor=2)
    loaded = load_pretrained(tmp_path, dtype="bfloat16", mesh=mesh)
    assert loaded.spec.dtype == "bfloat16"
    kernel = loaded.params["layers"][1]["mlp"]["up"]["kernel"].get_value()
    assert kernel.dtype == jnp.bfloat16
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 16)
    assert_equal(loaded.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def hf_tensors(spec, params, folder):
    export_pretrained(spec, params, folder)
    source = safetensors.open_folder(folder)
    return {name: np.array(source.read(name)) for name in source.names()}


def paired(array, head_dim):
    """Rows as GGUF stores llama's q and k: (0, n, 1, n + 1, ...) in every head."""
    order = np.arange(head_dim).reshape(2, -1).T.ravel()
    return array.reshape(-1, head_dim, *array.shape[1:])[:, order].reshape(array.shape)


def write_gguf(path, architecture, spec, params, folder):
    """A GGUF file as the llama.cpp converter lays it out."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(spec.max_length)
    writer.add_embedding_length(spec.width)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.mlp_width)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.layers[-1].rope.base)
    if architecture == "gemma3":
        writer.add_sliding_window(spec.layers[0].window)
    tensors, family = hf_tensors(spec, params, folder), family_of_gguf(architecture)
    paths = {family.names(p)[0]: (p, family.names(p)[1]) for p in map(dotted, nnx.to_flat_state(params))}
    for name, array in tensors.items():
        dotted_path, stored = paths[name]
        if architecture == "llama" and dotted_path.split(".")[-2] in ("query", "key"):
            array = paired(array, spec.head_dim)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        writer.add_tensor(stored, np.ascontiguousarray(array))
    for finish in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        finish()


def dotted(item):
    return ".".join(map(str, item[0]))


@pytest.mark.parametrize(("architecture", "name"), [("llama", "llama"), ("gemma3", "gemma3_text"), ("qwen2", "qwen2")])
def test_gguf_equals_hf(architecture, name, tmp_path):
    spec = SPECS[name]
    if architecture == "gemma3":  # GGUF fixes five local layers to a global one
        local = spec.pattern[0]
        spec = ModelSpec(
            **SIZES | GEMMA | {"num_layers": 6, "pattern": (local,) * 5 + spec.pattern[1:]}, qk_norm=True, name=name
        )
    _, params = random_params(spec)
    write_gguf(tmp_path / "model.gguf", architecture, spec, params, tmp_path / "hf")
    loaded = load_pretrained(tmp_path / "model.gguf")
    assert loaded.spec == spec
    tolerance = 1e-6 if architecture == "gemma3" else 0  # its norms are stored plus one
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=0), loaded.params, params)


def damage(folder, change):
    """Rewrite the folder's tensors after `change(tensors)`."""
    source = safetensors.open_folder(folder)
    tensors = {name: np.array(source.read(name)) for name in source.names()}
    change(tensors)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    safetensors.write_folder(folder, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks 1 tensors .* 'model\.layers\.1\.mlp\.up_proj"),
        (
            lambda t: t.update(extra=np.ones(3)),
            r"holds 1 tensors that its config doesn't explain, the first is 'extra'",
        ),
        (lambda t: t.update({"model.norm.weight": np.ones(5)}), r"'model\.norm\.weight' has shape \(5,\); .* \(16,\)"),
    ],
)
def test_tensors_that_do_not_fit(change, message, tmp_path):
    spec = SPECS["qwen2"]
    export_pretrained(spec, random_params(spec)[1], tmp_path)
    damage(tmp_path, change)
    with pytest.raises(TensorFileError, match=message):
        load_pretrained(tmp_path)


def test_tolerated_tensors(tmp_path):
    """A tied head stored twice and a stored rotary table change nothing."""
    spec = SPECS["llama"]
    export_pretrained(spec, random_params(spec)[1], tmp_path)
    extra = {"lm_head.weight": np.ones((24, 16)), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}
    damage(tmp_path, lambda tensors: tensors.update(extra))
    load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"shiny": 1}, "'shiny' = 1, which is not supported"),
        ({"attention_dropout": 0.1}, "'attention_dropout' = 0.1; only 0 is supported"),
        ({"quantization_config": {}}, "'quantization_config'"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"rope_scaling": {"factor": 2}, "rope_parameters": {"factor": 3}}, "both rope_parameters and rope_scaling"),
        ({"rope_scaling": {"rope_type": "warp", "factor": 2}}, "'warp' is not known"),
    ],
)
def test_configs_refused_by_name(fields, message):
    _, config = spec_to_hf(SPECS["llama"])
    with pytest.raises(ValueError, match=message):
        spec_from_hf(config | fields)


def test_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_pretrained(tmp_path)
    with pytest.raises(TensorFileError, match="is not a file"):
        load_pretrained(tmp_path / "absent.gguf")


def test_specs_without_a_family():
    linear = ModelSpec(**SIZES, pattern=(Attention(), GatedLinear()))
    with pytest.raises(ValueError, match="layer 1 is GatedLinear"):
        spec_to_hf(linear)
    with pytest.raises(ValueError, match="cannot express norm_offset"):
        spec_to_hf(ModelSpec(**SIZES, norm_offset=0.5))


def test_tokenizer_files_are_copied(tmp_path):
    spec = SPECS["llama"]
    source = tmp_path / "tokenizer"
    source.mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds none of tokenizer\.json"):
        export_pretrained(spec, random_params(spec)[1], tmp_path / "first", tokenizer=source)
    (source / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    export_pretrained(spec, random_params(spec)[1], tmp_path / "second", tokenizer=source)
    assert (tmp_path / "second" / "tokenizer.json").read_text() == '{"version": "1.0"}'


def downloaded(variable, name):
    """A model file given by an environment variable or in models/ of the repository, else a skip."""
    path = Path(os.environ.get(variable, Path(__file__).parents[2] / "models" / name))
    if not path.is_file():
        pytest.skip(f"needs {name}: set {variable} or put it into models/")
    return str(path)


@pytest.mark.data
@pytest.mark.parametrize(
    ("variable", "name", "bos"),
    [
        ("LCJAX_SMOLLM2", "SmolLM2-135M-Instruct.Q4_1.gguf", False),
        ("LCJAX_GEMMA3", "gemma-3-270m.gguf", True),
    ],
)
def test_real_models_know_their_capital(variable, name, bos):
    path = downloaded(variable, name)
    from lcjax.data.tokenizers import load_tokenizer

    model, tokenizer = load_pretrained(path), load_tokenizer(path)
    graphdef, _ = abstract(model.spec)
    ids = jnp.asarray([tokenizer.encode("The capital of France is", add_bos=bos)], jnp.int32)
    logits = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids)[0, -1])(model.params, ids)
    best = [tokenizer.decode([int(token)]).strip() for token in jnp.argsort(-logits)[:3]]
    assert "Paris" in best
