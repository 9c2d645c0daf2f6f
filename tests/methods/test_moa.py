"""MoA: the influence of deleting attention, the choice of spans, plan files, and decoding under a plan."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax import settings
from lcjax.eval import moa
from lcjax.eval.answered import Answered, Questions, Quotations
from lcjax.methods.moa import MoA, Plan, influence
from lcjax.methods.moa.influence import block_influence, deletion_effects
from lcjax.methods.moa.plan import under
from lcjax.methods.moa.rules import Rule, SearchSpace, lost_influence
from lcjax.methods.moa.solve import Effort, Problem, pareto, solve, undominated
from lcjax.models.decoder import abstract
from lcjax.models.elastic import Elastic, kept_tokens
from lcjax.models.patterns import Spans
from lcjax.models.spec import Attention, ModelSpec
from lcjax.serve.engine import Engine
from lcjax.serve.programs import Programs
from lcjax.serve.sampling import Sampling, stack
from lcjax.serve.source import random_model
from lcjax.serve.steps import Limits
from tests.serve.toy import TOKENIZER


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# Influence


def causal_weights(scores):
    seen = np.tril(np.ones(scores.shape[-2:], bool))
    weights = np.where(seen, np.exp(scores), 0.0)
    return weights / weights.sum(-1, keepdims=True)


def test_the_effect_of_a_deletion_is_that_of_deleting():
    """Exact for a loss linear in the weights: delete an entry, renormalise, compare."""
    rows = 7
    weights, slope = causal_weights(draw(rows, rows)), draw(rows, rows, seed=1)
    with jax.enable_x64(True):
        found = np.asarray(deletion_effects(jnp.asarray(weights), jnp.asarray(slope)))
    for i, j in itertools.product(range(rows), range(rows)):
        left = weights[i].copy()
        left[j] = 0.0
        left = left / left.sum() if i else left
        change = np.sum(slope[i] * (left - weights[i]))
        assert found[i, j] == pytest.approx(change if j <= i else 0.0, abs=1e-12)
    np.testing.assert_allclose((found[1:] * (1 - weights[1:])).sum(1), 0.0, atol=1e-12)


def test_block_influence_is_the_sum_of_effects_in_blocks():
    length, block, heads, kv_heads, dim = 24, 8, 6, 2, 4
    q, gradient = draw(2, length, heads, dim), draw(2, length, heads, dim, seed=1)
    k, v = draw(2, length, kv_heads, dim, seed=2), draw(2, length, kv_heads, dim, seed=3)
    run = jax.jit(block_influence, static_argnames=("scale", "block"))
    found = run(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, gradient)), scale=0.6, block=block)
    keys, values = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    weights = causal_weights(np.einsum("bthd,bshd->bhts", q, keys) * 0.6)
    slope = np.einsum("bthd,bshd->bhts", gradient, values)
    mean = (weights * slope).sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        effects = weights / (1 - weights) * (mean - slope)
    effects[..., 0, 0] = -slope[..., 0, 0]
    want = np.abs(effects).reshape(2, heads, 3, block, 3, block).sum((3, 5))
    np.testing.assert_allclose(found, want, rtol=2e-4, atol=1e-5)


def test_effects_hold_where_one_weight_is_nearly_all():
    weights = causal_weights(np.diag([0.0, 20.0, 35.0, 0.0]))
    slope = draw(4, 4, seed=2)
    with jax.enable_x64(True):
        want = np.asarray(deletion_effects(jnp.asarray(weights), jnp.asarray(slope)))
    found = deletion_effects(jnp.asarray(weights, jnp.float32), jnp.asarray(slope, jnp.float32))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-12)


# Rules


def test_kept_tokens():
    alphas, betas, lengths = (-2048.0, -100.0, 0.0, 777.0), (0.0, 0.125, 0.77, 1.0), (128, 1000, 8192, 9999)
    for alpha, beta, length in itertools.product(alphas, betas, lengths):
        kept = kept_tokens(alpha, beta, length)
        assert kept % 64 == 0
        assert 128 <= kept <= -(-length // 64) * 64
    assert kept_tokens(-1024.0, 1.0, 4096) == 3072
    assert kept_tokens(4096.0, 0.0, 4096) == kept_tokens(0.0, 1.0, 4096) == 4096


def test_the_search_space_fits_its_lengths():
    space = SearchSpace()
    rules = space.rules()
    assert len({tuple(space.kept_blocks(n)[i] for n in space.lengths) for i in range(len(rules))}) == len(rules)
    for rule in rules:
        assert rule.alpha + rule.beta * 2048 > 0
        assert rule.alpha + rule.beta * 8192 <= 8192
        assert rule.alpha + rule.beta * 16384 <= 16384
    assert any(rule.alpha < 0 for rule in rules)
    assert (space.densities() <= 1).all()
    assert (0.0, 1.0) in rules


def test_lost_influence_is_that_of_the_masked_blocks():
    influence = np.tril(np.abs(draw(3, 6, 6)))
    kept = np.array([2, 3, 5, 6, 7])
    found = lost_influence(influence, kept)
    i, j = np.arange(6)[:, None], np.arange(6)[None]
    for column, count in enumerate(kept):
        seen = (j < 1) | (i - j < count - 1)
        np.testing.assert_allclose(found[:, column], np.where(seen, 0.0, influence).sum((1, 2)), atol=1e-12)


# Solver


def brute_force(problem, profile=0):
    _, heads, rules = problem.losses.shape
    best = None
    for choice in itertools.product(range(rules), repeat=heads):
        density = problem.densities[:, list(choice)].mean(1)
        layers = np.asarray(choice).reshape(-1, problem.heads_per_layer)
        few = problem.rules_per_layer or rules
        if (density > problem.bounds[1] + 1e-9).any() or (density < problem.bounds[0] - 1e-9).any():
            continue
        if any(len(set(layer)) > few for layer in layers.tolist()):
            continue
        total = problem.total(np.array(choice))[profile]
        best = total if best is None else min(best, total)
    return best


@pytest.mark.parametrize(("heads", "limit"), [((1, 3), None), ((1, 3), 2), ((2, 2), None), ((2, 2), 1)])
def test_the_solver_finds_the_best_choice(heads, limit):
    layers, per_layer = heads
    losses = np.sort(np.abs(draw(1, layers * per_layer, 5, seed=layers)))[..., ::-1]
    densities = np.array([[0.1, 0.3, 0.4, 0.7, 1.0], [0.15, 0.35, 0.5, 0.65, 0.9]])
    problem = Problem(losses, densities, (0.3, 0.5), per_layer, limit)
    choice = solve(problem, 0, effort=Effort(gap=0.0))
    assert problem.total(choice)[0] == pytest.approx(brute_force(problem))
    assert solve(problem._replace(bounds=(0.01, 0.05)), 0) is None


def test_the_front_meets_the_bounds_and_holds_what_no_other_choice_beats():
    losses = np.sort(np.abs(draw(2, 6, 4, seed=5)))[..., ::-1]
    densities = np.array([[0.1, 0.3, 0.6, 1.0], [0.1, 0.25, 0.5, 1.0]])
    problem = Problem(losses, densities, (0.3, 0.5), 3, 2)
    found = pareto(problem)
    totals = np.stack([problem.total(choice) for choice in found])
    assert len(found) > 1
    for choice, mine in zip(found, totals, strict=True):
        assert (densities[:, choice].mean(1) <= 0.5 + 1e-9).all()
        assert (densities[:, choice].mean(1) >= 0.3 - 1e-9).all()
        assert all(len(set(layer)) <= 2 for layer in choice.reshape(2, 3).tolist())
        assert not ((totals <= mine).all(1) & (totals < mine).any(1)).any()
    for p in range(2):
        assert totals[:, p].min() == pytest.approx(brute_force(problem, p), rel=2e-3)
    with pytest.raises(ValueError, match=r"no plan keeps between 0\.01 and 0\.05"):
        pareto(problem._replace(bounds=(0.01, 0.05)))
    assert len(undominated([np.array([0])] * 2, np.array([[1.0, 2.0], [1.0, 2.0]]))) == 1


# Models and plans

SPEC = ModelSpec(
    vocab_size=TOKENIZER.vocab_size, width=24, mlp_width=32, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8,
    dtype="float32", max_length=256,
)  # fmt: skip
SPACE = SearchSpace(profiles=(32,), lengths=(32, 64), density=0.6, fill=0.8, step=16, betas=5, block=4)


@functools.cache
def toy():
    model = random_model(SPEC, TOKENIZER, seed=3)
    return model._replace(params=jax.tree.map(lambda x: 3 * x, model.params))  # attention that is far from even


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens):
    return nnx.merge(graphdef, params)(tokens)


def test_a_profile_is_the_influence_of_every_layer():
    """Against one backward pass through plain attention, with an array added to every layer's heads."""
    model, block = toy(), 8
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, SPEC.vocab_size)
    answered = jnp.array([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    whole = nnx.merge(model.graphdef, model.params)
    found = jax.jit(lambda: influence.profile(whole, tokens, answered, block))()

    def loss(added):
        x, seen = whole.embedded(tokens), []
        context = whole.context(jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), tokens.shape), 0, None, None)
        for layer, extra in zip(whole.layers, added, strict=True):
            q, k, v = layer.mixer.rotated(layer.mixer_norm(x), context)
            seen.append((q, k, v))
            keys, values = (jnp.repeat(y, 3, axis=2) for y in (k, v))
            scores = jnp.einsum("bthd,bshd->bhts", q, keys) * 8**-0.5
            weights = jax.nn.softmax(jnp.where(jnp.tri(24, dtype=bool), scores, -jnp.inf))
            x = layer.after_mixer(x, layer.mixer.out(jnp.einsum("bhts,bshd->bthd", weights, values) + extra))
        logits = jax.nn.log_softmax(whole.logits(whole.norm(x)))
        nll = -jnp.take_along_axis(logits[:, -5:-1], tokens[:, -4:, None], 2)[..., 0]
        return jnp.sum((nll * answered).sum(1) / answered.sum(1)), seen

    @jax.jit
    def every_layer(zeros):
        gradients, seen = jax.grad(loss, has_aux=True)(zeros)
        pairs = zip(seen, gradients, strict=True)
        return jnp.stack([block_influence(*qkv, each, scale=8**-0.5, block=block) for qkv, each in pairs])

    want = every_layer([jnp.zeros((2, 24, 6, 8))] * 2).mean(1).reshape(2, 2, 3, 3, 3).max(2)
    assert want.max() > 0
    np.testing.assert_allclose(found, want, rtol=2e-3, atol=1e-6)


def rules(*pairs):
    return [Rule(float(alpha), float(beta)) for alpha, beta in pairs]


MIXED = rules((0, 0.25), (0, 1.0), (-8, 0.75), (12, 0.0))


def test_the_loss_under_windows_is_that_of_the_planned_model():
    model = toy()
    plan = moa.plan_of(model, MIXED, 4, {})
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (2, 33), 0, SPEC.vocab_size), np.int32)
    rows = Answered(tokens[:, 1:], np.ones((2, 5), np.float32))
    dense, mixed = moa.validate(model, rows, [rules(*[(0, 1.0)] * 4), MIXED], 4)
    for spec, got in ((SPEC, dense), (under(SPEC, plan, 32), mixed)):
        logits = forward(abstract(spec)[0], model.params, jnp.asarray(rows.tokens))
        nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, -6:-1], rows.tokens[:, -5:, None], 2)
        assert got == pytest.approx(nll.mean(), rel=1e-5)
    assert abs(dense - mixed) > 1e-4


def test_spans_follow_the_length_and_then_stay():
    pattern = Elastic((0.0, 12.0, 0.0), (0.25, 0.0, 1.0), block=4)
    assert pattern.at(64) == Spans((4, 4, 0), (12, 8, None))
    assert pattern.at(16) == Spans((4, 4, 0), (4, 8, None))
    assert pattern.at(8) == Spans((0, 0, 0), (None, None, None))
    assert pattern.at(64).at(16) == pattern.at(64)
    with pytest.raises(ValueError, match="made for 3 KV heads, the model has 2"):
        dataclasses.replace(SPEC, pattern=(Attention(pattern=pattern),))
    with pytest.raises(ValueError, match=r"fix it \(ModelSpec\.at"):
        pattern.mask(3, 3)
    with pytest.raises(ValueError, match="1 alphas and 2 betas"):
        Elastic((0.0,), (1.0, 1.0))


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("moa") / "plan.json"
    moa.plan_of(toy(), MIXED, 4, {"why": "a test"}).save(path)
    return path


def test_plan_files(plan_file, tmp_path):
    plan = Plan.load(plan_file)
    assert plan == moa.plan_of(toy(), MIXED, 4, {"why": "a test"})
    assert plan.alphas == ((0.0, 0.0), (-8.0, 12.0))
    assert MoA().model(SPEC) == SPEC
    method = MoA(str(plan_file), length=64)
    assert method.model(SPEC) == MoA(str(plan_file)).model(SPEC).at(64)
    assert method.model(SPEC).layers[1].pattern == Spans((4, 4), (36, 8))
    with pytest.raises(ValueError, match=r"made for 'random' with num_kv_heads=2, and 'decoder' has num_kv_heads=3"):
        method.model(dataclasses.replace(SPEC, num_kv_heads=3))
    method.check(toy().params)
    with pytest.raises(ValueError, match=r"MoA\.plan .* was made for 'random', and this model has .* other weights"):
        method.check(jax.tree.map(jnp.negative, toy().params))
    with pytest.raises(ValueError, match=r"MoA\.length must be positive, got 0"):
        MoA(str(plan_file), length=0)
    with pytest.raises(ValueError, match=r"layer 0 is Attention\(window=5"):
        method.model(dataclasses.replace(SPEC, pattern=(Attention(window=5), Attention())))
    other = '{"format": 1, "method": "DPE"}'
    empty = '{"format": 1, "method": "MoA"}'
    bad = (
        ("{}", "not of format 1"),
        (other, "of MoA"),
        ("[1]", "of MoA"),
        (empty, "'alphas' is missing"),
        ("x", "Exp"),
    )
    for text, message in bad:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=f"is no plan of MoA .*{message}"):
            MoA(str(tmp_path / "bad.json")).model(SPEC)
    cut = json.loads(plan_file.read_text()) | {"alphas": [[0.0, 0.0]], "betas": [[1.0, 1.0]]}
    (tmp_path / "cut.json").write_text(json.dumps(cut))
    with pytest.raises(ValueError, match="rules for 1 of 2 layers"):
        Plan.load(tmp_path / "cut.json")


def test_the_engine_fixes_spans_for_the_size_of_its_caches(plan_file):
    """What programs are made for says which spans; that spans decode as they prefill is the zoo's `spans`."""
    model = toy()
    planned = MoA(str(plan_file)).model(SPEC)
    sizes = Engine(chunk=8).sizes(1, 64)
    programs = Programs(abstract(planned)[0], model.params, planned, sizes)
    settings = stack([Sampling()]), Limits(jnp.ones(1, jnp.int32), jnp.array([-1]), jnp.ones(1, jnp.int32))
    state, _ = programs.shapes(*settings)
    first, second = (cache.caches for cache in state.caches)
    assert planned.at(64).layers[0].pattern == Spans((4, 0), (12, None))
    assert [cache.k.shape[1] for cache in first] == [4 + 12, 64]
    assert [cache.k.shape[1] for cache in second] == [4 + 36, 4 + 8]
    assert model._replace(spec=planned).at(64).spec == planned.at(64)
    assert model.at(64) is model


def test_a_plan_from_texts_to_file(tmp_path):
    """The whole way on a toy: density within bounds, two rules a layer at most, and a file that decodes."""
    text = tmp_path / "text.txt"
    text.write_text("The miller counted nine sacks, and the carter drove them home before the rain. " * 40)
    questions = Questions(text=str(text), question="What?", count=1, answer=6, chat=False)
    quotations = Quotations(text=str(text), cue=3, count=1, answer=6)
    job = moa.PlanSpans((questions, quotations), SPACE, validation=40, batch=2)
    tables = job.run(toy(), tmp_path)
    plan = Plan.load(tmp_path / "plan.json")
    for length, share in tables["moa_density"].items():
        rules = zip(sum(plan.alphas, ()), sum(plan.betas, ()), strict=True)
        keeps = [kept_tokens(*rule, int(length), 4) for rule in rules]
        assert share == pytest.approx(np.mean(keeps) / int(length))
        assert 0.48 - 1e-9 <= share <= 0.6 + 1e-9
    assert all(len({*zip(a, b, strict=True)}) <= 2 for a, b in zip(plan.alphas, plan.betas, strict=True))
    assert tables["moa_loss"]["40"] == min(plan.about["validation"]["plans"])
    with pytest.raises(ValueError, match="question alone takes 8 tokens"):
        list(questions.prompts(toy(), 8))
    with pytest.raises(ValueError, match="hold no passage of 9"):
        list(quotations.prompts(toy(), 12))
    prompt = next(iter(quotations.prompts(toy(), 40)))
    assert len(prompt) == 40
    assert prompt[-3:] in [prompt[i : i + 3] for i in range(len(prompt) - 3 - 6)]
    with pytest.raises(ValueError, match=r"answers of \[6, 7\] tokens"):
        moa.PlanSpans((questions, dataclasses.replace(quotations, answer=7)), SPACE, validation=40)
    with pytest.raises(ValueError, match="is one of the profiled lengths"):
        dataclasses.replace(job, validation=32)


def test_the_shipped_settings_build(plan_file):
    job, _ = settings.load("evaluate", ["configs/eval/moa_plan.gin"])
    assert job.tasks[0].space.lengths == (1024, 2048, 4096, 8192)
    assert 30 <= len(job.tasks[0].space.rules()) <= 100
    files = ["configs/decode/smollm2.gin", "configs/decode/moa.gin"]
    job, _ = settings.load("generate", files, [f"MoA.plan = {str(plan_file)!r}"])
    assert job.model.methods == (MoA(str(plan_file)),)
