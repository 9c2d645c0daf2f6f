"""Logits and frequencies equal HF transformers' (golden arrays of tests/golden/hf/make.py)."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.checkpoint import safetensors
from lcjax.checkpoint.hf import load_pretrained
from lcjax.models.decoder import abstract
from lcjax.models.registry import spec_from_hf, spec_to_hf
from lcjax.models.spec import Attention
from lcjax.positions import law_from_hf

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"


def _script(name: str):
    spec = importlib.util.spec_from_file_location(f"golden_hf_{name}", GOLDEN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cases, weights = _script("cases"), _script("weights")
MODELS = json.loads((GOLDEN / "models.json").read_text())


# Scaled positions run with Llama, and once where layers differ in them; the slow tests run them in every family.
SWEPT = {
    name
    for name, config in cases.CASES.items()
    if config.get("rope_scaling") and not name.startswith("llama_") and name != "gemma3_text_yarn"
}


def write_model(name: str, folder: Path) -> Path:
    """A HF folder with the case's weights and its 4.x-style config."""
    config = cases.CASES[name]
    offset = 1.0 if config["model_type"].startswith("gemma") else 0.0
    shapes = MODELS[name]["shapes"].items()
    safetensors.write_folder(folder, ((key, weights.weight(key, tuple(shape), offset)) for key, shape in shapes))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SWEPT)) for n in cases.CASES])
def test_logits(name, tmp_path):
    model = load_pretrained(write_model(name, tmp_path))
    graphdef, _ = abstract(model.spec)
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    golden = np.load(GOLDEN / "logits.npz")
    long = forward(model.params, jnp.asarray(weights.tokens(cases.LONG, 64)))[0]
    np.testing.assert_allclose(long, golden[f"{name}.{cases.LONG}"], atol=1e-4, rtol=0)
    follows = any(m.rope.follows_length for m in model.spec.pattern if isinstance(m, Attention))
    short = forward(model.params, jnp.asarray(weights.tokens(cases.SHORT, 64)))[0] if follows else long[: cases.SHORT]
    np.testing.assert_allclose(short, golden[f"{name}.{cases.SHORT}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", cases.CASES)
def test_config_spellings(name):
    """The 4.x dictionary, the one HF 5.x saves for it, and our own export give one spec."""
    spec = spec_from_hf(cases.CASES[name])
    assert spec_from_hf(MODELS[name]["config"]) == spec
    family, config = spec_to_hf(spec)
    assert cases.CASES[name]["model_type"] in family.model_types
    assert spec_from_hf(json.loads(json.dumps(config))) == spec


@pytest.mark.parametrize("row", range(len(cases.FREQUENCIES)))
def test_frequencies(row):
    parameters, head_dim, max_length, length = cases.FREQUENCIES[row]
    golden = json.loads((GOLDEN / "frequencies.json").read_text())[row]
    law = law_from_hf(parameters, max_length=max_length)
    for given in (length, None if length is None else jnp.int32(length)):
        frequencies, factor = law.frequencies(head_dim, given)
        np.testing.assert_allclose(frequencies, golden["frequencies"], rtol=3e-6)
        assert factor == pytest.approx(golden["factor"], rel=1e-7)
