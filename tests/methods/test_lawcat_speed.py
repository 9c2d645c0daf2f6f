"""What the benchmark of LAWCAT's speed times, and how it reads its figures."""

import jax
import pytest

from benchmarks import lawcat_speed
from pallas_kernels.attention import api
from pallas_kernels.op import target_platform


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({4: 1.1, 8: 1.2}, 4),
        ({4: 1.1, 8: 0.9, 16: 1.2}, 16),
        ({16: 1.2, 8: 1.1, 4: 0.5}, 8),
        ({4: 1.1, 8: None}, None),
        ({4: 2.0, 8: 1.0}, None),
    ],
)
def test_faster_from_asks_every_longer_length(ratios, expected):
    assert lawcat_speed.faster_from(ratios) == expected


def test_both_layers_and_cores_are_timed_on_the_same_sizes(monkeypatch):
    monkeypatch.setattr(lawcat_speed, "gate", lambda model: None)
    found = {
        name: jax.eval_shape(lambda run=run, arguments=arguments: run(*arguments(64)))
        for name, (run, arguments) in lawcat_speed.layer_programs(lawcat_speed.SMALL).items()
    }
    assert found["lawcat_ms"] == found["softmax_ms"]
    assert found["lawcat_ms"].shape == (1, 64, 64)
    assert found["lawcat_core_ms"] == found["softmax_core_ms"]
    assert found["lawcat_core_ms"].shape == (1, 64, 4, 16)


def test_the_softmax_layer_and_its_core_are_timed_on_cudnn(monkeypatch):
    """Also where the library would choose something else."""
    calls = []
    monkeypatch.setattr(lawcat_speed, "gate", lambda model: None)
    monkeypatch.setitem(api.ORDER, "gpu", ("xla", "cudnn"))
    monkeypatch.setitem(api.BACKENDS, "cudnn", lambda call: calls.append(call) or api.BACKENDS["xla"](call))
    programs = lawcat_speed.layer_programs(lawcat_speed.SMALL)
    for name in ("softmax_ms", "softmax_core_ms"):
        run, arguments = programs[name]
        shapes = jax.eval_shape(lambda arguments=arguments: arguments(64))
        with target_platform("gpu"):
            jax.eval_shape(run, *shapes)
    assert len(calls) == 2
