"""Every method: its identity setting changes nothing, another setting acts, two writers of one field are refused."""

import dataclasses
from dataclasses import dataclass, replace

import pytest

from lcjax.methods import (
    DuoGates,
    Lawcat,
    Lolcats,
    LongGen,
    LongLora,
    Lora,
    Method,
    MethodConflict,
    Positions,
    adapt_job,
    adapt_model,
)
from lcjax.methods.base import changes
from lcjax.methods.linearize import STUDENT
from lcjax.models.decoder import abstract
from lcjax.models.recurrent import GatedLinear, Linearized
from lcjax.models.spec import Attention, ModelSpec
from lcjax.positions import DualChunk

SPEC = ModelSpec(
    vocab_size=61, width=32, mlp_width=48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8,
    pattern=(Attention(), Attention(window=7)), dtype="float32",
)  # fmt: skip
METHODS = {  # name: (identity, a setting that acts)
    "lora": (Lora(rank=0), Lora(rank=2)),
    "longlora": (LongLora(groups=1, rank=0), LongLora()),
    "lawcat": (Lawcat(layers=()), Lawcat()),
    "lolcats": (Lolcats(layers=()), Lolcats(layers=(1, 2))),
    "duo_gates": (DuoGates(layers=()), DuoGates(layers=(0, 2))),
}


@dataclass(frozen=True)
class Job:
    """The part of a training job that recipes write."""

    trainable: tuple[str, ...] = ()
    length: int = 64
    step_methods: tuple[Method, ...] = ()


@dataclass(frozen=True)
class Longer(Method):
    factor: int = 2

    def model(self, spec):
        return replace(spec, max_length=spec.max_length * self.factor)


class Writer(Method):
    def recipe(self, job):
        return replace(job, trainable=(*job.trainable, "x"))


@pytest.mark.parametrize(
    ("identity", "acting"),
    [
        (LongGen(full=4), LongGen(layers=(0, 1, 3))),
        (Positions(), Positions(remap=DualChunk(size=48, local=8), max_length=4096)),
    ],
)
def test_methods_without_a_recipe(identity, acting):
    spec = replace(SPEC, pattern=(Attention(),))
    assert identity.model(spec) == spec
    assert acting.model(spec) != spec
    assert acting.recipe(Job()) == Job()


@pytest.mark.parametrize("name", METHODS)
def test_identity_and_effect(name):
    identity, acting = METHODS[name]
    assert dataclasses.is_dataclass(identity)
    assert identity.model(SPEC) == SPEC
    assert identity.recipe(Job()) == Job()
    assert acting.model(SPEC) != SPEC
    assert acting.recipe(Job()) != Job()


def test_methods_apply_in_order_and_conflicts_are_named():
    spec = adapt_model([Lawcat(layers=(0,)), Lora(rank=2), Longer()], SPEC)
    assert [type(mixer) for mixer in spec.layers] == [Linearized, Attention, Attention, Attention]
    assert spec.adapters.rank == 2
    assert spec.max_length == 2 * SPEC.max_length
    assert adapt_model([Lawcat(layers=(0,)), Lolcats(layers=(2,))], SPEC).layers[2].window == 64
    with pytest.raises(MethodConflict, match="Longer and Longer both write max_length"):
        adapt_model([Longer(), Longer(3)], SPEC)
    with pytest.raises(MethodConflict, match="Lawcat and Lora both write trainable"):
        adapt_job([Lawcat(), Lora()], Job())
    with pytest.raises(MethodConflict, match="Lora and Writer both write trainable"):
        adapt_job([Lora(), Writer()], Job())
    with pytest.raises(ValueError, match="has 1, which is Linearized and no softmax attention"):
        adapt_model([Lawcat(), Lolcats(layers=(1,))], SPEC)


def test_changes_are_named_by_layer():
    wider = replace(SPEC, pattern=(Attention(), Attention(window=9), Attention(), Attention(window=7)))
    assert changes(SPEC, wider) == ["layers.1.window"]
    other = replace(SPEC, pattern=(Attention(), GatedLinear()), width=16)
    assert sorted(changes(SPEC, other)) == ["layers.1", "layers.3", "width"]


def test_what_a_conversion_keeps():
    spec = Lawcat(decay="none", conv_width=0, normalise=False).model(SPEC)
    assert spec.pattern[1] == Linearized(Attention(window=7), conv_width=0, decay="none", normalise=False)
    assert spec.pattern[0].rope == SPEC.pattern[0].rope
    assert Lawcat().recipe(Job()).trainable == STUDENT


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Lawcat(layers=(4,)), "layers has 4, but 'decoder' has the layers 0 to 3"),
        (Lora(rank=2, targets=("mixer_nothing",)), "'mixer_nothing', which names no linear layer"),
        (Lora(rank=2, targets=()), "targets is empty"),
    ],
)
def test_bad_settings(method, message):
    with pytest.raises(ValueError, match=message):
        abstract(method.model(SPEC))


def test_bad_ranks():
    with pytest.raises(ValueError, match="rank is -1"):
        Lora(rank=-1)
    with pytest.raises(ValueError, match="has adapters already"):
        adapt_model([Lora()], Lora().model(SPEC))
