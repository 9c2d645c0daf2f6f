"""Cache layouts as gin chooses them, and that answers do not depend on them."""

import dataclasses
from pathlib import Path

import pytest

from lcjax import settings
from lcjax.cache import CacheLayout, Selection
from lcjax.models.spec import Attention
from lcjax.serve import Engine, Generator, Request
from lcjax.serve.source import random_model
from tests.serve.toy import SPEC, TOKENIZER

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "decode"
LAYOUTS = {
    "dense": CacheLayout(),
    "paged": CacheLayout("paged"),
    "int8": CacheLayout(dtype="int8"),
    "selected": CacheLayout("paged", selection=Selection()),
}
PROMPT = "Of a prompt of several blocks, all blocks are read, so that nothing that was said is lost."


@pytest.mark.parametrize("name", LAYOUTS)
def test_gin_chooses_the_layout(name):
    job, _ = settings.load("generate", [CONFIGS / "smollm2.gin", CONFIGS / f"{name}.gin"])
    assert job.engine.cache == LAYOUTS[name]


@pytest.fixture(scope="module")
def model():
    return random_model(dataclasses.replace(SPEC, num_layers=1, pattern=(Attention(),)), TOKENIZER, seed=3)


def answer(model, layout):
    generator = Generator(*model[:4], Engine(batch=1, chunk=32, steps=4, cache=layout))
    return generator.generate([Request(PROMPT, max_new_tokens=12)])[0].tokens


def test_pages_all_of_them_selected_answer_as_dense_and_int8_nearly(model):
    dense = answer(model, LAYOUTS["dense"])
    everything = Selection(tokens=250, sink=0, window=16, block=16, every=2)  # of a capacity of 256
    assert answer(model, CacheLayout("paged", page=16, selection=everything)) == dense
    assert answer(model, CacheLayout("paged", "int8"))[:3] == dense[:3]


def test_bad_layouts_are_named():
    with pytest.raises(ValueError, match=r"CacheLayout.kind is 'ring'; choose 'dense' or 'paged'"):
        CacheLayout("ring")
    with pytest.raises(ValueError, match=r"CacheLayout.dtype is 'int4'"):
        CacheLayout(dtype="int4")
