"""DuoAttention: gates between two attentions, plans, documents, and the split caches."""

import dataclasses
import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcjax.cache import CacheLayout, GroupedCache, RingCache, cache_bytes, init_caches
from lcjax.data.documents import Scored
from lcjax.data.passkeys import PasskeyDocuments
from lcjax.data.pipeline import build_pipeline
from lcjax.data.spec import DataSpec
from lcjax.data.tokenizers import load_tokenizer
from lcjax.eval.duo import DuoPlan
from lcjax.methods import Duo, DuoGates, Lawcat, LongGen, MethodConflict, adapt_model
from lcjax.methods.duo import TRAINED, Gates
from lcjax.models.decoder import Decoder, abstract
from lcjax.models.patterns import Spans
from lcjax.models.spec import Attention, ModelSpec
from lcjax.serve.source import Loaded, random_model
from lcjax.train.gates import GateDistillation, two_streams
from lcjax.train.optimizers import AdamW, Clamped, Trapezoid
from lcjax.train.state import Start, divide
from lcjax.train.step import StepOptions, make_step

SPEC = ModelSpec(
    vocab_size=61, width=24, mlp_width=32, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=4, dtype="float32",
)  # fmt: skip
T, SINK, WINDOW = 20, 2, 5
GATED = DuoGates(sink=SINK, window=WINDOW).model(SPEC)
TOKENS = jax.random.randint(jax.random.key(1), (2, T + 1), 0, 61)
BATCH = {
    "inputs": TOKENS[:, :-1],
    "targets": TOKENS[:, 1:],
    "positions": jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T)),
    "segment_ids": jnp.ones((2, T), jnp.int32),
    "loss_weights": jnp.broadcast_to((jnp.arange(T) >= 12).astype(jnp.float32), (2, T)),
}
LOSS = GateDistillation(l1=0.05)


@pytest.fixture(scope="module")
def params():
    return nnx.split(Decoder(GATED, rngs=nnx.Rngs(0)), nnx.Param)[1]


def with_gates(params, value):
    """All gates at a number, or drawn in between."""
    trained, frozen = divide(params, TRAINED)
    leaves, tree = jax.tree.flatten(trained)
    if value is None:
        leaves = [jax.random.uniform(jax.random.key(n), x.shape, minval=0.2, maxval=0.8) for n, x in enumerate(leaves)]
    else:
        leaves = [jnp.full_like(x, value) for x in leaves]
    return tree.unflatten(leaves), frozen


@partial(jax.jit, static_argnums=0)
def streams(graphdef, params):
    return two_streams(nnx.merge(graphdef, params), BATCH, StepOptions())


@partial(jax.jit, static_argnums=(0, 3))
def graded(graphdef, trained, frozen, how):
    return LOSS.gradients(graphdef, trained, frozen, BATCH, how)


def hidden(spec, params):
    graphdef = abstract(spec)[0]
    run = jax.jit(lambda params: nnx.merge(graphdef, params).hidden(BATCH["inputs"])[0])
    return run(params)


def test_open_gates_are_the_model_and_closed_ones_stream(params):
    graphdef = abstract(GATED)[0]
    plain = nnx.split_state(params, nnx.PathContains("gates"), ...)[1]
    reference, gated = streams(graphdef, nnx.merge_state(*with_gates(params, 1.0)))
    np.testing.assert_array_equal(reference, gated)
    np.testing.assert_allclose(reference, hidden(SPEC, plain), atol=1e-5)
    reference, gated = streams(graphdef, nnx.merge_state(*with_gates(params, 0.0)))
    near = dataclasses.replace(SPEC, pattern=(Attention(window=WINDOW, sink=SINK),))
    np.testing.assert_allclose(gated, hidden(near, plain), atol=1e-5)
    assert float(jnp.abs(gated - reference).max()) > 1e-2


def test_the_loss_of_open_gates_is_the_penalty(params):
    gradient, sums = graded(abstract(GATED)[0], *with_gates(params, 1.0), StepOptions())
    assert float(sums.parts["distance"]) == 0
    assert float(sums.nll / sums.weight) == pytest.approx(0.05)
    assert float(sums.weight) == 16
    for leaf in jax.tree.leaves(gradient):  # at the border the slope is that of the inside
        np.testing.assert_allclose(leaf / sums.weight, 0.05 / 9, rtol=1e-4)


def test_gradients_are_the_slope_of_the_loss(params):
    graphdef = abstract(GATED)[0]
    trained, frozen = with_gates(params, None)
    gradient, sums = graded(graphdef, trained, frozen, StepOptions())
    for how in (StepOptions(scan=True, remat="full"),):
        again, _ = graded(graphdef, trained, frozen, how)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), again, gradient)
    leaves, tree = jax.tree.flatten(trained)
    directions = [jax.random.normal(jax.random.key(7 + n), x.shape) for n, x in enumerate(leaves)]
    step = 2e-2
    moved = [tree.unflatten([x + s * step * d for x, d in zip(leaves, directions, strict=True)]) for s in (1, -1)]
    high, low = (graded(graphdef, m, frozen, StepOptions())[1].nll for m in moved)
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), directions, strict=True))
    assert float((high - low) / (2 * step)) == pytest.approx(float(slope), rel=2e-2)
    assert float(sums.nll) > 0


def test_training_moves_gates_only_and_keeps_them_in_range(params):
    optimizer = Clamped(AdamW(Trapezoid(0.05, 1), weight_decay=0.0, clip_norm=None))
    start = Start(GATED, optimizer.build(4), 0, TRAINED, params)
    step = make_step(abstract(GATED)[0], start.optimizer, optimizer.schedule.build(4), LOSS, StepOptions(), TRAINED)
    state, step = start.state(), jax.jit(step)
    before = dict(nnx.to_flat_state(state.params))
    for n in range(4):
        state, metrics = step(state, BATCH)
        for path, after in nnx.to_flat_state(state.params):
            if path[-1] != "gates":
                np.testing.assert_array_equal(after[...], before[path][...])
                continue
            assert 0 <= float(after[...].min()) <= float(after[...].max()) <= 1
            if n == 0:  # open gates differ from the model by the penalty alone
                assert float(after[...].max()) < 1
    assert {"distance", "gate"} <= metrics.keys()


def test_only_gates_can_be_distilled(params):
    with pytest.raises(ValueError, match=r"cannot train layers\.\d\.mixer"):
        LOSS.gradients(abstract(GATED)[0], *divide(params, ("mixer",)), BATCH, StepOptions())
    with pytest.raises(ValueError, match="the model has no gates"):
        LOSS.gradients(abstract(GATED)[0], nnx.State({}), params, BATCH, StepOptions())


def test_the_rate_rises_and_falls():
    rate = Trapezoid(0.02, 400).build(2000)
    steps = (0, 39, 199, 399, 1000, 1600, 1800, 1999)
    wanted = [0.02 * min(1, max((n + 1) / 400, 0.1), max((2000 - n) / 400, 0.1)) for n in steps]
    np.testing.assert_allclose([float(rate(n)) for n in steps], wanted, rtol=1e-6)


@cache
def weights(seed=0):
    return random_model(SPEC, None, seed).params


def plan_file(folder, **changes):
    Gates.made(SPEC, weights(), {0: (0.9, 0.1, 0.5), 1: (0.2, 0.95, 0.3), 2: (0.0, 1.0, 0.4)}).save(
        folder / "plan.json"
    )
    held = json.loads((folder / "plan.json").read_text()) | changes
    (folder / "plan.json").write_text(json.dumps(held))
    return str(folder / "plan.json")


def test_the_quantile_of_all_gates_divides_the_heads(tmp_path):
    plan = plan_file(tmp_path)
    spec = Duo(plan, sparsity=5 / 9, sink=SINK, window=WINDOW).model(SPEC)
    assert [mixer.pattern.windows for mixer in spec.layers] == [(None, 5, None), (5, None, 5), (5, None, 5)]
    assert [mixer.pattern.sinks for mixer in spec.layers] == [(0, 2, 0), (2, 0, 2), (2, 0, 2)]
    assert Duo(plan, sparsity=0.0).model(SPEC) == SPEC
    assert Duo(plan, sparsity=5 / 9, sink=SINK, window=WINDOW).model(GATED) == spec
    ties = Gates.made(SPEC, weights(), dict.fromkeys(range(3), (1.0,) * 3)).retrieval(1 / 3)
    assert sum(sum(heads) for heads in ties.values()) == 6


def test_a_plan_is_written_from_a_run_and_read_again(tmp_path, params):
    trained, frozen = with_gates(params, None)
    model = Loaded(abstract(GATED)[0], nnx.merge_state(trained, frozen), GATED, None, "run")
    table = DuoPlan().run(model, tmp_path)
    plan = Gates.load(tmp_path / "plan.json")
    for layer, mine in plan.gates.items():
        np.testing.assert_allclose(mine, model.params["layers"][layer]["mixer"]["gates"][...], rtol=1e-6)
        assert table["duo_plan"][str(layer)] == pytest.approx(np.mean(mine))


def test_plans_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"made for 'decoder' with num_layers=3, and 'decoder' has num_layers=4"):
        Duo(plan_file(tmp_path)).model(dataclasses.replace(SPEC, num_layers=4))
    plan = Duo(plan_file(tmp_path))
    plan.check(jax.tree.map(lambda x: x.astype(jnp.bfloat16) * 1.1, weights()))
    with pytest.raises(ValueError, match=r"made for 'decoder', and this model has the same sizes but other weights"):
        plan.check(weights(seed=1))
    bad = {"1": (0.2, 1.5, 0.3)}
    cases = ({"gates": bad}, "layer 1 has the gate 1.5, which is not in 0 to 1"), ({"format": 9}, "not of format 1")
    for number, (changes, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValueError, match=message):
            Duo(plan_file(folder, **changes)).model(SPEC)
    with pytest.raises(ValueError, match=r"Duo.sparsity is 1"):
        Duo("plan.json", sparsity=1.0)
    with pytest.raises(FileNotFoundError):
        Duo(str(tmp_path / "none.json")).model(SPEC)
    with pytest.raises(ValueError, match=r"DuoGates.layers has 3"):
        DuoGates(layers=(3,)).model(SPEC)


def test_conflicts_are_named(tmp_path):
    plan = Duo(plan_file(tmp_path))
    with pytest.raises(MethodConflict, match=r"Duo and a method before it, .* write layers\.0\.pattern"):
        adapt_model([LongGen(), plan], SPEC)
    with pytest.raises(MethodConflict, match=r"LongGen and a method before it, .* write layers\.0\.pattern"):
        adapt_model([plan, LongGen()], SPEC)
    with pytest.raises(MethodConflict, match=r"Duo and Lawcat both write layers\.1\.pattern"):
        adapt_model([plan, Lawcat(layers=(1,))], SPEC)


def test_split_caches_hold_what_they_should_and_no_more():
    """Retrieval heads everything, in int8 where that is asked for; streaming heads sinks and the latest tokens."""
    spec = dataclasses.replace(SPEC, pattern=(Attention(pattern=Spans((SINK, 0, SINK), (WINDOW, None, WINDOW))),))
    for layout, per_token in ((CacheLayout(), 2 * 4 * 4), (CacheLayout(dtype="int8"), 2 * (4 + 2))):
        caches = init_caches(spec, 2, 64, layout)
        assert cache_bytes(caches) == 3 * 2 * (64 * per_token + 2 * (SINK + WINDOW) * 2 * 4 * 4)
    cache = caches[0]
    assert isinstance(cache, GroupedCache)
    ring = next(part for part in cache.caches if isinstance(part, RingCache))
    new = jnp.zeros((2, 1, 2, 4))
    for t in range(15):
        ring = ring.append(new, new)
        held = sorted(int(p) for p in ring.positions()[0] if p >= 0)
        assert held == sorted({*range(min(SINK, t + 1)), *range(max(t - WINDOW + 1, 0), t + 1)}) or t < SINK + WINDOW


@dataclasses.dataclass(frozen=True)
class Words:
    """A haystack of one text."""

    split: str = "train"
    fingerprint: str = "words"

    def open(self, data_dir):
        return self

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return "it was a quiet day and nothing was said. " * 40

    def sizes(self):
        return np.array([len(self[0])])


def test_documents_hide_keys_and_only_the_questions_count():
    source = PasskeyDocuments(Words(), count=3, keys=3, words=2, least=200, most=900)
    corpus = source.open("")
    text = corpus[1]
    assert isinstance(text, Scored)
    assert text == corpus[1]
    body, tail = text[: text.begin], text[text.begin :]
    for ordinal in ("first", "second", "third"):
        fact = next(line for line in body.splitlines() if line.startswith(f"The {ordinal} pass key is: "))
        assert tail.count(fact) == 1
    assert body.index("first") < body.index("second") < body.index("third")
    rows = build_pipeline(
        DataSpec(source, packing="pad", long_documents="skip", shuffle=False, prefetch=0),
        load_tokenizer("bytes"),
        batch=1,
        length=2000,
    )
    try:
        row = next(rows)
    finally:
        rows.close()
    scored = bytes(int(i) for i, w in zip(row["targets"][0], row["loss_weights"][0], strict=True) if w and i < 256)
    first = corpus[0]
    assert scored.decode() == first[first.begin :]
    read = bytes(int(i) for i, s in zip(row["inputs"][0], row["segment_ids"][0], strict=True) if s and i < 256)
    assert read.decode() == first
