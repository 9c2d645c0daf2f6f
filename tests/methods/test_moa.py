"""MoA: the influence of deleting attention, the choice of spans, plan files, and decoding under a plan."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcjax.methods.moa.influence import block_influence, deletion_effects
from lcjax.methods.moa.rules import SearchSpace, lost_influence
from lcjax.methods.moa.solve import Effort, Problem, pareto, solve, undominated
from lcjax.models.elastic import kept_tokens

QUICK = {"xla_backend_optimization_level": 0}


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
        alone = jnp.arange(rows)[:, None] == 0
        found = np.asarray(deletion_effects(jnp.asarray(weights), jnp.asarray(slope), alone))
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
    run = jax.jit(block_influence, static_argnames=("scale", "block"), compiler_options=QUICK)
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


# Rules


def test_kept_tokens():
    for alpha, beta, length in itertools.product((-2048.0, -100.0, 0.0, 777.0), (0.0, 0.125, 0.77, 1.0), (128, 1000, 8192, 9999)):
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
