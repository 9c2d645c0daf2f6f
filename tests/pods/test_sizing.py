"""The sizing report: collectives read from a module's text, FLOPs from the jaxpr, slices by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcjax.models.flops import flops_per_token
from lcjax.models.recurrent import GatedLinear
from lcjax.models.spec import Attention, ModelSpec
from lcjax.parallel.collectives import collectives
from lcjax.parallel.mesh import make_mesh
from lcjax.parallel.sizing import Sizing, Work
from lcjax.parallel.slices import GIB, Slice, named_slice
from lcjax.parallel.work import checkpoint, count_flops, visible_pairs
from lcjax.train import state as states
from lcjax.train.losses import CrossEntropy
from lcjax.train.optimizers import AdamW, Cosine
from lcjax.train.step import BATCH_DTYPES, StepOptions, make_step
from pallas_kernels.masks import Causal, Intervals, Sink, Stride, Window, per_head

MODULE = """\
HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[]}

%all-reduce-scatter.7 (input: bf16[16,4]) -> bf16[4,4] {
  %input = bf16[16,4]{1,0} parameter(0)
  %all-reduce.3 = bf16[16,4]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %dynamic-slice.1 = bf16[4,4]{1,0} dynamic-slice(%all-reduce.3, %zero, %zero), dynamic_slice_sizes={4,4}
}

%inner (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %p = (s32[], f32[2]{0}) parameter(0)
  %cp = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %cpd = f32[2]{0} collective-permute-done(%cp)
  ROOT %t = (s32[], f32[2]{0}) tuple(%i, %cpd)
}

%inner_condition (p: (s32[], f32[2])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %w = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %all-gather.1 = bf16[32,8]{1,0} all-gather(%w), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %rs = bf16[2,8]{1,0} reduce-scatter(%w), channel_id=2, replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%sum
  %while.2 = (s32[], f32[2]{0}) while(%u), condition=%inner_condition, body=%inner
  ROOT %r = (s32[], bf16[4,8]{1,0}) tuple(%i, %w)
}

ENTRY %main (a: f32[8,4]) -> f32[] {
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%v), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %fusion.1 = bf16[4,4]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.7
  ROOT %all-reduce.9 = f32[]{:T(128)} all-reduce(%s), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
}
"""


def test_collectives_are_counted_with_the_loops_around_them():
    found = {(c.kind, c.bytes, c.times) for c in collectives(MODULE)}
    assert found == {
        ("all-gather", 32 * 8 * 2, 3),
        ("reduce-scatter", 2 * 8 * 2 * 2, 3),
        ("collective-permute", 2 * 4, 3 * 5),
        ("reduce-scatter", 16 * 4 * 2, 1),
        ("all-reduce", 4, 1),
    }


def test_collectives_of_a_program_compiled_here():
    mesh = make_mesh(fsdp=8)
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    whole = jax.NamedSharding(mesh, jax.P())

    def run(x):
        body = lambda _, x: jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, whole) * 2, rows)
        return jax.lax.fori_loop(0, 6, body, x)

    compiled = jax.jit(run, in_shardings=rows, out_shardings=rows).lower(jnp.ones((16, 4))).compile()
    gathers = [c for c in collectives(compiled.as_text()) if c.kind == "all-gather"]
    assert [(c.bytes, c.times) for c in gathers] == [(16 * 4 * 4, 6)]


def test_what_goes_between_slices_goes_through_the_hosts():
    sent = """ENTRY %main (a: bf16[8,4]) -> token[] {
      ROOT %send = (bf16[8,4]{1,0}, u32[]{:S(2)}, token[]) send(%a, %t), is_host_transfer=true, NAME
    }"""
    name = 'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'
    assert [(c.kind, c.bytes) for c in collectives(sent.replace("NAME", name))] == [("send between slices", 64)]
    assert collectives(sent.replace("NAME", "x=1")) == []


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("mesh['data'=1,'fsdp'=8,'context'=4] {'fsdp','context'}", 32),
        ("mesh['a'=8] {'a':(2)4}", 4),
    ],
)
def test_groups_as_compilers_write_them(groups, size):
    module = f"ENTRY %main (a: f32[8]) -> f32[2] {{\n %r = f32[2] reduce-scatter(%a), replica_groups={groups}, x=1\n}}"
    assert [c.bytes for c in collectives(module)] == [8 * size]


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("nothing")


EXPIRY = np.asarray([2**31 - 1, 9, 40, 60], np.int32)
SECOND = np.asarray([[0, 0], [20, 41], [50, 60], [0, 0]], np.int32)


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        Causal() & Window(7),
        Causal() & (Sink(5) | Window(9) | Stride(block=4, every=3)),
        Causal() & (Window(3) | Intervals(16, EXPIRY, SECOND)),
        per_head([Causal(), Causal() & Window(2), Causal()]),
    ],
    ids=str,
)
def test_visible_pairs(mask):
    expected = jnp.broadcast_to(mask.to_array(61, 61), (3, 61, 61)).sum()
    assert visible_pairs(mask, 3, 61) == expected


@pytest.mark.parametrize("scan", [False, True])
def test_flops_of_a_step_are_those_of_the_formula(scan):
    spec = ModelSpec(
        vocab_size=512, width=64, mlp_width=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16,
        pattern=(Attention(window=32, sink=4), GatedLinear(conv_width=4, decay="scalar"), Attention()),
    )  # fmt: skip
    optimizer = AdamW(Cosine(peak=1e-3, warmup=1))
    start = states.Start(spec, optimizer.build(5))
    shapes = jax.eval_shape(start.state)
    batch = {name: jax.ShapeDtypeStruct((2, 256), dtype) for name, dtype in BATCH_DTYPES.items()}
    from lcjax.models.decoder import abstract

    options = StepOptions(remat="full", scan=scan)
    step = make_step(abstract(spec)[0], start.optimizer, optimizer.schedule.build(5), CrossEntropy(), options)
    once = count_flops(step, shapes, batch, recomputed=False)
    formula = flops_per_token(spec, 256, training=True) * 2 * 256
    assert once == pytest.approx(formula, rel=0.05)
    # Everything but the embedding is computed a second time: four thirds of the work.
    assert count_flops(step, shapes, batch, recomputed=True) == pytest.approx(once * 4 / 3, rel=0.05)


def test_a_checkpointed_function_counts_its_second_run_only_where_asked():
    square = checkpoint(lambda w: jnp.sum(jnp.tanh(w @ w)))
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def gradient(w):
        return jax.grad(checkpoint(lambda w: jnp.sum(jnp.tanh(w @ w))))(w)

    assert count_flops(gradient, shape, recomputed=False) == 3 * 2 * 8**3
    assert count_flops(gradient, shape, recomputed=True) == 4 * 2 * 8**3
    assert square(jnp.zeros((8, 8))) == 0


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, int, int]
    device_kind: str = "TPU v5p"


@pytest.mark.usefixtures("unchecked")  # `Device` stands in for a chip's
def test_a_report_says_whether_it_fits():
    where = Slice("v5p:1x1x2", (Device((0, 0, 0)), Device((0, 0, 1))))
    assert where.hbm == 95 * GIB
    sized = Sizing("toy", where, 3.0, Work(10**15, 12 * 10**14, 1e15), 10 * GIB, 80 * GIB, 91 * GIB)
    assert sized.fits
    assert "peak                   91.00  96%: fits" in sized.text()
    assert not dataclasses.replace(sized, peak=96 * GIB).fits
    refused = Sizing("toy", where, 3.0, refusal="Ran out of memory")
    assert not refused.fits
    assert "does not fit: Ran out of memory" in refused.text()


@pytest.mark.usefixtures("unchecked")
def test_two_devices_of_a_chip_share_its_memory():
    assert Slice("v4:1x1x1", (Device((0, 0, 0), "TPU v4"),) * 2).hbm == 16 * GIB


@pytest.mark.parametrize("name", ["", "v5p", "v9:2x2"])
def test_a_slice_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match="name a generation and its chips, such as v5p:4x4x4"):
        named_slice(name)
