"""Requests spread over a mesh get the answers of one device."""

import dataclasses

import jax

from lcjax.parallel.mesh import make_mesh
from lcjax.parallel.rules import shardings
from lcjax.serve import Engine, Generator, Request
from lcjax.serve.source import random_model
from tests.serve.toy import SPEC, TOKENIZER

PROMPTS = ("A short one.", "A prompt that is somewhat longer than one chunk of the engine.", "x", "yes")


def test_answers_on_a_mesh_are_those_of_one_device():
    model = random_model(dataclasses.replace(SPEC, vocab_size=260), TOKENIZER, seed=3)
    requests = [Request(prompt, max_new_tokens=6) for prompt in PROMPTS]

    def answers(params):
        engine = Engine(batch=4, chunk=16, steps=4)
        return [a.tokens for a in Generator(model.graphdef, params, model.spec, TOKENIZER, engine).generate(requests)]

    expected = answers(model.params)
    mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert answers(jax.device_put(model.params, shardings(model.params, mesh))) == expected
