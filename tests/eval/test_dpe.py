"""Effective lengths that are planted in a hand-made model are found, written, and kept from being used elsewhere."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax import settings
from lcjax.eval.dpe import DetectDPE
from lcjax.eval.laws import CompareLaws, Law
from lcjax.eval.perplexity import Perplexity
from lcjax.eval.task import Example
from lcjax.methods import DetectedDPE, adapt_model
from lcjax.methods.base import identity_of
from lcjax.methods.dpe import Plan, trial
from lcjax.models.decoder import Decoder, abstract
from lcjax.models.spec import Attention, ModelSpec
from lcjax.positions import DPE, Rope
from lcjax.positions.dpe import pair_contributions
from lcjax.serve.source import Loaded, random_model
from tests.serve.toy import TOKENIZER

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "eval"
LENGTH, TRAINED, WINDOW, PAIRS = 256, 64, 16, 8
LETTERS = "ABCDEFGH"
SHARPNESS = 20.0  # a letter's score is 20 cos(angle), against the filler's log(255): an angle of 1.27 is too far


def planted(pair: int, frequency: float) -> Loaded:
    """One layer, one head: after "?" it writes the one letter of the text, which it looks up through `pair` alone.

    Features 0 to 7 name the letter; 8 marks letters, 9 the space that asks, 10 the filler, 11 the question mark.
    """
    spec = ModelSpec(
        vocab_size=TOKENIZER.vocab_size, width=16, mlp_width=2, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=2 * PAIRS, pattern=(Attention(rope=Rope(frequency ** (-PAIRS / pair))),), dtype="float32",
        max_length=TRAINED, tie_embeddings=False,
    )  # fmt: skip
    graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)), nnx.Param)
    held = {path: np.zeros(leaf.shape, np.float32) for path, leaf in nnx.to_flat_state(params)}
    for path in held:
        held[path] += path[-1] == "weight"  # of norms
    token = lambda text: TOKENIZER.encode(text)[0]
    table, head = held["embed", "table"], held["head", "kernel"]
    query, key, value, out = (held["layers", 0, "mixer", name, "kernel"] for name in ("query", "key", "value", "out"))
    for i, letter in enumerate(LETTERS):
        table[token(letter), [i, 8]] = head[i, token(letter)] = 1
    for feature, text in ((9, " "), (10, "."), (11, "?")):
        table[token(text), feature] = 1
    head[10, token(".")], head[11, token(" ")] = 1, 100
    query[9, 0, pair] = SHARPNESS / 8**0.5  # behind the norm a space is 4, a letter's mark 8**0.5; the scale is 1/4
    key[[8, 9], 0, pair] = 1
    for i in (*range(8), 10):
        value[i, 0, i] = out[0, i, i] = 1
    flat = [(path, leaf.replace(jnp.asarray(held[path]))) for path, leaf in nnx.to_flat_state(params)]
    return Loaded(graphdef, nnx.from_flat_state(flat), spec, TOKENIZER, "planted")


@dataclasses.dataclass(frozen=True)
class OneLetter:
    """A letter at a depth of the filler."""

    name: str = "one_letter"
    category: str = ""

    def examples(self, tokenizer, budget, seed):
        for index, letter in enumerate(LETTERS):
            room = budget - 4
            before = round(room * index / (len(LETTERS) - 1))
            text = "." * before + letter + "." * (room - before) + "?"
            yield Example(str(index), text, (letter,), 2)

    def score(self, example, text):
        raise NotImplementedError

    def ideal(self, example):
        return example.references[0]


@pytest.fixture
def measure(tmp_path):
    (tmp_path / "text.txt").write_text("..A? A.. ..B? B.." * 10, encoding="utf-8")
    return DetectDPE(
        OneLetter(), length=LENGTH, groups=4, window=WINDOW, least=16, text=str(tmp_path / "text.txt"), excerpts=2
    )


@pytest.mark.parametrize(
    ("pair", "frequency", "factors"),
    [
        (2, 1 / 64, (1, 4, 1, 1)),  # 16 + 240 / 4 tokens are 1.2, 16 + 240 / 2 are 2.1
        (7, 1 / 32, (1, 1, 1, 16)),  # 16 + 240 / 16 are 1.0, 16 + 240 / 8 are 1.4: the background of 8 fails too
    ],
)
def test_a_planted_effective_length_is_found(pair, frequency, factors, measure, tmp_path):
    model = planted(pair, frequency)
    if max(factors) == 4:  # once: the model is then evaluated under its plan
        text = Perplexity(measure.text, lengths=(96,), window=32, chunk=96)
        measure = dataclasses.replace(measure, then=CompareLaws((Law("plain"),), (text,)))
    found = measure.run(model, tmp_path)
    if measure.then is not None:
        assert found["perplexity/DPE, detected"]["96"] != found["perplexity/plain"]["96"]
    assert tuple(found["dpe_factors"].values()) == factors
    assert found["dpe_lengths"][str(pair // 2)] == LENGTH / max(factors)
    assert found["dpe_detected"] == {"256": 1.0}
    assert found["dpe_plain"]["256"] < 0.8
    assert (found["dpe_one_factor"]["256"] < 1) == (max(factors) > 8)
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.factors == factors
    assert all(pair in head and len(head) == 6 for head in plan.selected[0])
    spec = adapt_model((DetectedDPE(str(tmp_path / "plan.json")),), model.spec)
    assert spec.layers[0].remap == DPE(window=WINDOW, factors=factors, pairs=PAIRS, selected=plan.selected[0])


def test_trials_are_the_model_under_dpe():
    """What one program tries with arrays is what the model does whose spec has the numbers; so are its pairs."""
    spec = ModelSpec(
        vocab_size=61, width=32, mlp_width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32",
        pattern=(Attention(window=9), Attention()),
    )  # fmt: skip
    graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(1)), nnx.Param)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 70)), jnp.int32)
    places = jnp.asarray([[20, 69, 40]])
    masks = np.random.default_rng(1).random((2, 4, 8)) < 0.6
    selected = tuple(tuple(np.flatnonzero(head).tolist()) for head in masks[1])
    remap = DPE(window=16, factors=(1, 4, 8, 2), pairs=8, selected=selected)
    changed = abstract(dataclasses.replace(spec, pattern=(spec.pattern[0], Attention(remap=remap))))[0]
    numbers = trial.Numbers(jnp.repeat(jnp.asarray(remap.factors), 2), jnp.asarray(masks))

    @jax.jit
    def both(params):
        model = nnx.merge(graphdef, params)
        last = model.layers[1]
        q, k, _ = last.mixer.project(
            last.mixer_norm(model.layers[0](model.embedded(tokens), model.context_of_rows(tokens))[0])
        )
        tried = trial.logits(model, tokens, places, numbers, 16), trial.contributions(model, tokens)
        return tried, (nnx.merge(changed, params)(tokens)[:, places[0]], pair_contributions(q, k)), model(tokens)

    (tried, weighed), (wanted, pairs), plain = both(params)
    np.testing.assert_allclose(tried, wanted, atol=2e-5)
    assert not np.allclose(wanted, plain[:, places[0]], atol=1e-3)
    np.testing.assert_allclose(weighed[1], pairs, rtol=1e-5)
    assert not np.asarray(weighed[0]).any(), "a layer with a window of its own keeps its positions"


def test_a_plan_is_for_its_model(tmp_path):
    model = random_model(planted(2, 1 / 64).spec, TOKENIZER)
    path = tmp_path / "plan.json"
    Plan((1, 4), 16, PAIRS, {0: ((2,),)}, identity_of(model.spec, model.params), "random", {}).save(path)
    method = DetectedDPE(str(path))
    method.check(model.params)
    with pytest.raises(ValueError, match="same sizes but other weights"):
        method.check(random_model(model.spec, TOKENIZER, seed=1).params)
    with pytest.raises(ValueError, match=r"made for 'random' with width=16, and 'decoder' has width=8"):
        method.model(dataclasses.replace(model.spec, width=8))
    with pytest.raises(ValueError, match=r"gives layer 0 a remap, which is .* not full attention"):
        method.model(dataclasses.replace(model.spec, pattern=(Attention(window=4),)))
    assert DetectedDPE().model(model.spec) is model.spec
    path.write_text(json.dumps(json.loads(path.read_text()) | {"factors": [1, 5]}))
    with pytest.raises(ValueError, match=r"is no plan of DPE .*the factor 5 must divide it.*configs/eval/dpe.gin"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least": 0}, "least 0 must lie in 1..256"),
        ({"window": 24, "least": 16}, "window 24 does not fit: the largest factor 16 must divide it"),
        ({"selected": 0.0}, "selected 0.0 must be a share above 0"),
        ({"groups": 3}, "groups 3 must divide the 8 pairs"),
        ({"length": 64}, "length 64 be above the 64 tokens of planted"),
    ],
)
def test_bad_settings(options, message, measure, tmp_path):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(measure, **options).run(planted(2, 1 / 64), tmp_path)


def test_the_configuration_detects_and_evaluates():
    job, _ = settings.load("evaluate", [FOLDER / "dpe.gin"], ["perplexity.text = 'book.txt'"])
    (measure,) = job.tasks
    assert [law.name for law in measure.then.laws] == ["plain", "self-extend"]
    assert measure.length == max(measure.then.perplexities[0].lengths) == max(measure.then.suite.lengths)
