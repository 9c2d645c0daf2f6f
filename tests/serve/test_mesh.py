"""Requests spread over a mesh get the answers of one device."""

import dataclasses

import jax
import pytest

from lcjax.parallel.mesh import make_mesh
from lcjax.parallel.rules import shardings
from lcjax.serve import Engine, Generator, Request
from lcjax.serve.source import random_model
from tests.serve.toy import SPEC, TOKENIZER

PROMPTS = ("A short one.", "A prompt that is somewhat longer than one chunk of the engine.", "x")
MODEL = dataclasses.replace(SPEC, vocab_size=260, num_layers=2, pattern=SPEC.pattern[1:])  # windowed, linear


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])


def test_answers_on_a_mesh_are_those_of_one_device(mesh):
    """Three requests on two parts: one row stays empty."""
    model = random_model(MODEL, TOKENIZER, seed=3)
    requests = [Request(prompt, max_new_tokens=6) for prompt in PROMPTS]

    def answers(params, mesh=None):
        engine = Engine(batch=4, chunk=16, steps=4)
        generator = Generator(model.graphdef, params, model.spec, TOKENIZER, engine, mesh=mesh)
        return [a.tokens for a in generator.generate(requests)]

    assert answers(jax.device_put(model.params, shardings(model.params, mesh)), mesh) == answers(model.params)


def test_a_batch_that_does_not_split_is_refused(mesh):
    with pytest.raises(ValueError, match=r"Engine.batch 3 does not split over the 2 parts of the mesh axes data"):
        Generator(None, None, MODEL, TOKENIZER, Engine(batch=3), mesh=mesh)
