"""The model of a training run, loaded from its newest sound checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lcjax.checkpoint.manager import CheckpointManager
from lcjax.checkpoint.manifest import describe
from lcjax.checkpoint.run import is_run, load_run
from lcjax.models.decoder import Decoder
from lcjax.models.native import RECORDS
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention, ModelSpec
from lcjax.positions.laws import YaRN
from lcjax.train import state as states

SPEC = ModelSpec(
    vocab_size=40,
    width=16,
    mlp_width=24,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    dtype="float32",
    pattern=(Attention(window=8, sink=2), GatedLinear(), Attention(rope=YaRN(factor=2.0, original_length=64))),
)


@pytest.fixture
def run(tmp_path):
    state = states.Start(SPEC, optax.adamw(1e-3), seed=3).state()
    manager = CheckpointManager(tmp_path / "checkpoints")
    sections = {"model": describe(SPEC), "tokenizer": "fingerprint", "about": {"tokenizer": "bytes"}, "mesh": ""}
    manager.save(7, state, {}, sections)
    manager.close()
    return tmp_path, state.params


def test_a_run_gives_back_its_model(run):
    folder, params = run
    assert is_run(folder)
    loaded = load_run(folder, dtype="float32")
    assert loaded.spec == SPEC
    assert loaded.tokenizer_source == "bytes"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    graphdef = nnx.split(Decoder(SPEC, rngs=nnx.Rngs(0)), nnx.Param)[0]
    assert nnx.merge(graphdef, loaded.params)(jnp.ones((1, 5), jnp.int32)).shape == (1, 5, 40)


def test_in_another_dtype(run):
    loaded = load_run(run[0], dtype="bfloat16")
    assert loaded.spec == dataclasses.replace(SPEC, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}


def test_nothing_saved_yet(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        load_run(tmp_path, dtype="float32")


def test_every_record_of_a_spec_is_known():
    assert {"ModelSpec", "Attention", "GatedLinear", "Rope", "YaRN", "LongRoPE"} <= RECORDS.keys()
