"""Which tokens the filters leave, and that seeds belong to requests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcjax.serve.sampling import Sampling, sample, stack

PROBABILITIES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
DRAWS = 400
draw = jax.jit(sample)


def drawn(setting: Sampling) -> np.ndarray:
    """Share of each token in many draws with different seeds."""
    settings = [Sampling(setting.temperature, setting.top_k, setting.top_p, setting.min_p, s) for s in range(DRAWS)]
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (DRAWS, 5))
    tokens = draw(logits, stack(settings), jnp.zeros(DRAWS, jnp.int32))
    return np.bincount(np.asarray(tokens), minlength=5) / DRAWS


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        (Sampling(1.0), 5),
        (Sampling(1.0, top_k=2), 2),
        (Sampling(1.0, top_p=0.69), 2),
        (Sampling(1.0, top_p=0.71), 3),
        (Sampling(1.0, min_p=0.3), 3),
        (Sampling(1.0, top_k=3, top_p=0.8), 2),
        (Sampling(1.0, top_k=99), 5),
        (Sampling(1.0, top_p=1e-6), 1),
        (Sampling(0.0), 1),
    ],
)
def test_filters_keep_the_right_tokens_in_proportion(setting, kept):
    share = drawn(setting)
    want = np.where(np.arange(5) < kept, PROBABILITIES, 0)
    assert (share[kept:] == 0).all()
    np.testing.assert_allclose(share, want / want.sum(), atol=0.08)


def test_temperature_sharpens():
    assert drawn(Sampling(0.5))[0] > drawn(Sampling(1.0))[0] > drawn(Sampling(2.0))[0]


def test_each_row_has_its_own_settings_and_numbers():
    logits = jax.random.normal(jax.random.key(0), (3, 50))
    settings = [Sampling(0.0), Sampling(1.0, seed=1), Sampling(1.5, top_k=5, seed=-1)]
    together = draw(logits, stack(settings), jnp.array([0, 4, 9]))
    assert together[0] == jnp.argmax(logits[0])
    for row, setting in enumerate(settings):
        alone = draw(logits[row : row + 1], stack([setting]), jnp.array([[0, 4, 9][row]]))
        assert alone[0] == together[row]


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}], ids=str
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=rf"Sampling.{next(iter(bad))} must"):
        Sampling(**bad)
