"""The engine against the plain model; batches, limits, compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.cache import CacheLayout
from lcjax.eval.shared_prefix import SharedPrefixGenerator
from lcjax.models.decoder import abstract
from lcjax.models.spec import Attention
from lcjax.positions import DynamicLinear, Linear
from lcjax.serve import Engine, Generator, Request, Sampling
from lcjax.serve.programs import Programs
from lcjax.serve.sampling import stack
from lcjax.serve.source import random_model
from lcjax.serve.steps import Limits
from tests.serve.toy import SPEC, TOKENIZER, toy

ENGINE = Engine(batch=4, chunk=16, steps=4)
PROMPTS = ("A short one.", "A prompt that is somewhat longer than one chunk of the engine.", "Grüße, 世界", "x")


@pytest.fixture(scope="module")
def model():
    return toy()


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model.graphdef, model.params, model.spec, model.tokenizer, ENGINE)


def requests(**options):
    return [Request(prompt, max_new_tokens=10, **options) for prompt in PROMPTS]


def test_greedy_answers_are_the_models_own(model, generator):
    forward = jax.jit(lambda params, tokens: nnx.merge(model.graphdef, params)(tokens))
    for prompt, answer in zip(PROMPTS, generator.generate(requests()), strict=True):
        ids = TOKENIZER.encode(prompt)
        sequence = np.zeros((1, 96), np.int32)  # causal: what follows changes nothing before it
        sequence[0, : len(ids) + len(answer.tokens)] = ids + answer.tokens
        best = np.asarray(jnp.argmax(forward(model.params, sequence), -1))[0, len(ids) - 1 :]
        assert best[: len(answer.tokens)].tolist() == answer.tokens
        assert answer.reason == ("length" if len(answer.tokens) == 10 else "end")


def test_laws_that_follow_the_length_take_that_of_the_whole_request():
    """As interpolation by one factor a request, from its first chunk on; prompts that begin alike are read apart."""
    law, new = DynamicLinear(original_length=24, max_factor=8), 10
    model = random_model(dataclasses.replace(SPEC, pattern=(Attention(rope=law),), num_layers=2), TOKENIZER, seed=3)
    generator = SharedPrefixGenerator(model.graphdef, model.params, model.spec, model.tokenizer, ENGINE)
    prompts = [PROMPTS[1][:38], 2 * PROMPTS[1], PROMPTS[1][:34]]  # 48, 134 and 44 tokens with their answers
    answers = generator.generate([Request(prompt, max_new_tokens=new) for prompt in prompts])
    for prompt, answer, factor in zip(prompts, answers, (2, 6, 2), strict=True):
        ids = TOKENIZER.encode(prompt)
        assert -(-(len(ids) + new) // 24) == factor
        fixed = dataclasses.replace(model.spec, pattern=(Attention(rope=Linear(factor=float(factor))),))
        sequence = np.zeros((1, 144), np.int32)
        sequence[0, : len(ids) + len(answer.tokens)] = ids + answer.tokens
        logits = nnx.merge(abstract(fixed)[0], model.params)(jnp.asarray(sequence))
        best = np.asarray(jnp.argmax(logits, -1))[0, len(ids) - 1 :]
        assert best[: len(answer.tokens)].tolist() == answer.tokens


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=7)])
def test_a_request_gets_the_same_text_in_any_batch(generator, sampling):
    together = generator.generate(requests(sampling=sampling))
    for request, answer in zip(requests(sampling=sampling), together, strict=True):
        assert generator.generate([request])[0] == answer


def test_nothing_is_compiled_for_a_second_request(generator):
    generator.generate(requests())
    compiled = generator.compiled
    generator.generate([Request(p + "!", max_new_tokens=7, stop=("zz",), sampling=Sampling(1.0)) for p in PROMPTS])
    assert generator.compiled == compiled
    assert generator.report.compile_seconds < 0.1


def test_pieces_join_to_the_answers(generator):
    texts = dict.fromkeys(range(4), "")
    for piece in generator.stream(requests()):
        texts[piece.index] += piece.text
    assert [texts[i] for i in range(4)] == [answer.text for answer in generator.generate(requests())]


def test_stop_strings_and_budgets(generator):
    free = generator.generate([Request("Tell me.", max_new_tokens=24)])[0]
    stop = free.text[5:8]
    cut = generator.generate([Request("Tell me.", max_new_tokens=24, stop=(stop,))])[0]
    assert cut.reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    assert generator.generate([Request("Tell me.", max_new_tokens=3)])[0].tokens == free.tokens[:3]


def test_report(generator):
    generator.generate(requests())
    report = generator.report
    assert report.prompt_tokens == sum(len(TOKENIZER.encode(p)) for p in PROMPTS)
    assert 0 < report.new_tokens <= 36
    assert report.cache_bytes > 0
    assert "tokens/s" in str(report)


def test_bad_requests_are_refused_by_name(generator):
    with pytest.raises(
        ValueError, match=r"has 200 tokens and up to 10 are to follow, but the cache holds 160; shorten"
    ):
        generator.generate([Request("x" * 200, max_new_tokens=10)])
    with pytest.raises(ValueError, match="request 1: the prompt is empty"):
        generator.generate([Request("x"), Request("")])
    with pytest.raises(ValueError, match="token id 99999 is not in the model's vocabulary"):
        generator.generate([Request((1, 99999))])
    with pytest.raises(ValueError, match=r"Request.max_new_tokens must be positive, got 0"):
        Request("x", max_new_tokens=0)
    with pytest.raises(ValueError, match=r"Engine.chunk must be positive, got 0"):
        Engine(chunk=0)


def test_a_step_makes_nothing_of_the_caches_size():
    """Compiled from shapes alone: caches are updated in place, temporaries stay small."""
    spec = dataclasses.replace(SPEC, pattern=(Attention(),), head_dim=64)
    graphdef, params = abstract(spec)
    sizes = {"batch": 1, "capacity": 8192, "chunk": 16, "steps": 4, "cache": CacheLayout()}
    programs = Programs(graphdef, params, spec, sizes)
    programs.prepare(stack([Sampling()]), Limits(jnp.full(1, 9), jnp.array([-1]), jnp.full(1, 9)), extend=False)
    memory = programs.memory("decode")
    held = 2 * 3 * 8192 * 2 * 64 * 4
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < 0.05 * held
