import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import LinearState, Unsupported, aot, gated_linear_attention, op, recurrent_step, testing
from pallas_kernels.gated_linear import mosaic_gpu_parts, xla
from tests.kernels.linear_cases import Case, assert_close, assert_near, forward, make_case, packed, with_gradients

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
LENGTHS = [1, slow(15), 16, 17, slow(63), 64, 65, 130]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


class TestChunksAgainstTokens:
    """The chunk form equals the recurrence in float64, in the outputs, the state and every gradient."""

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("t", LENGTHS)
    def test_vector_decay_at_every_length(self, t):
        case = make_case(t)
        assert_close(with_gradients(case, "xla"), with_gradients(case, "reference"), 1e-10)

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize(
        "options",
        [
            {"kind": "none"},
            {"kind": "scalar"},
            {"kind": "vector", "normalise": True},
            {"kind": "none", "delta": True},
            {"kind": "scalar", "delta": True},
            {"kind": "vector", "delta": True},
        ],
        ids=str,
    )
    def test_kinds(self, options):
        segment_ids = jnp.asarray([[1] * 7 + [2] * 11 + [3] * 5, [4] * 20 + [0] * 3])
        case = make_case(23, **options, segment_ids=segment_ids)
        assert_close(with_gradients(case, "xla"), with_gradients(case, "reference"), 1e-10)


class GatedLinearChecks:
    """What every backend must do, whatever its precision. Subclasses name the backend and its limits."""

    implementation: str
    tolerance = 1e-4
    gradient_tolerance = 1e-4
    shape = (1, 2, 8, 5)
    length = 70

    def case(self, t=None, **options):
        return make_case(t or self.length, dtype=np.float32, shape=self.shape, **options)

    def check(self, case, anew=False):
        found, found_grads = with_gradients(case, self.implementation, anew=anew)
        expected, expected_grads = with_gradients(case, "reference")
        assert_close(found, expected, self.tolerance)
        assert_close(found_grads, expected_grads, self.gradient_tolerance)

    @pytest.mark.parametrize("mean", [-0.01, -1, -5, -50, -np.inf])
    def test_decay_stress(self, mean):
        self.check(self.case(mean=mean))

    def test_a_head_of_values_and_decays_serves_its_group(self):
        case = make_case(9, dtype=np.float32, shape=(1, 4, 8, 5), group=2)
        q, k, v, g, *rest = case.inputs
        every = case._replace(inputs=(q, k, np.repeat(v, 2, axis=2), np.repeat(g, 2, axis=2), *rest))
        (o, last), (dq, dk, dv, dg, *_) = with_gradients(case, self.implementation)
        expected, grads = with_gradients(every, self.implementation)
        assert_close((o, last, dq, dk), (*expected, *grads[:2]), self.tolerance)
        by_group = [x.reshape(1, 9, 2, 2, -1).sum(3) for x in grads[2:4]]
        assert_close((dv, dg), by_group, self.tolerance)

    def test_scalar_is_vector_broadcast(self):
        scalar = self.case(kind="scalar")
        q, k, v, g, beta, state = scalar.inputs
        vector = scalar._replace(inputs=(q, k, v, np.repeat(g[..., None], q.shape[-1], -1), beta, state))
        assert_close(forward(scalar, self.implementation), forward(vector, self.implementation), self.tolerance)

    def test_no_decay_is_causal_linear_attention(self):
        case = self.case(kind="none")
        q, k, v, _, _, state = case.inputs
        scores = np.tril(np.einsum("bihk,bjhk->bhij", q, k))
        o = np.einsum("bhij,bjhv->bihv", scores, v) + np.einsum("bihk,bhkv->bihv", q, state.s)
        assert_close(forward(case, self.implementation)[0], o * q.shape[-1] ** -0.5, self.tolerance)

    def test_infinite_decay_keeps_the_current_token_only(self):
        case = self.case(mean=-np.inf)
        q, k, v, *_ = case.inputs
        o = (q * k).sum(-1, keepdims=True) * v * q.shape[-1] ** -0.5
        assert_close(forward(case, self.implementation)[0], o, self.tolerance)

    def test_segments_equal_separate_runs_and_padding_may_hold_nan(self):
        lengths, t = (31, 3, 31, 3), self.length
        case = self.case(segment_ids=packed(lengths, t))
        used = sum(lengths)
        q, k, v, g, beta, state = case.inputs
        q, k, v, g = (np.where((np.arange(t) < used)[:, None, None], x, np.nan) for x in (q, k, v, g))
        o_bar, state_bar = case.cotangents
        case = case._replace(inputs=(q, k, v, g, beta, state))
        (o, last), grads = with_gradients(case, self.implementation)
        assert_close(o[:, used:], np.zeros_like(o[:, used:]), 0)
        start = 0
        for i, n in enumerate(lengths):
            cut = slice(start, start + n)
            begin = state if i == 0 else jax.tree.map(np.zeros_like, state)
            end_bar = state_bar if i == len(lengths) - 1 else jax.tree.map(np.zeros_like, state_bar)
            alone = case._replace(
                inputs=(q[:, cut], k[:, cut], v[:, cut], g[:, cut], beta, begin),
                cotangents=(o_bar[:, cut], end_bar),
                options={"segment_ids": None, "normalise": False},
            )
            (o_alone, last_alone), alone_grads = with_gradients(alone, "reference")
            assert_close(o[:, cut], o_alone, self.tolerance)
            assert_close([x[:, cut] for x in grads[:4]], alone_grads[:4], self.gradient_tolerance)
            start += n
        assert_close(last, last_alone, self.tolerance)

    def test_repeats_bitwise(self):
        case = self.case()
        first, second = (with_gradients(case, self.implementation) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, first, second)


class TestXla(GatedLinearChecks):
    implementation = "xla"

    @pytest.mark.parametrize(
        "options", [{"kind": "scalar", "delta": True}, {"kind": "vector", "normalise": True}], ids=str
    )
    def test_prefill_and_decode_equal_one_pass(self, options):
        case = make_case(70, dtype=np.float32, **options)
        normalise = case.options["normalise"]
        q, k, v, g, beta, state = case.inputs
        whole, last = forward(case, "xla")

        @jax.jit
        def step(q, k, v, g, beta, state):
            return recurrent_step(q, k, v, g, state, beta=beta, normalise=normalise)

        for cut in (65, 67):
            first = [None if x is None else x[:, :cut] for x in (q, k, v, g, beta)]
            o, carried = forward(case._replace(inputs=(*first, state)), "xla")
            assert_close(o, whole[:, :cut], 1e-5)
            for i in range(cut, 70):
                token = [None if x is None else x[:, i] for x in (q, k, v, g, beta)]
                o, carried = step(*token, carried)
                assert_close(o, whole[:, i], 1e-4)
            assert_close(carried, last, 1e-4)

    def test_bfloat16_inputs(self):
        case = make_case(70, dtype=jnp.bfloat16)
        found, grads = with_gradients(case, "xla")
        assert found[0].dtype == jnp.bfloat16
        assert found[1].s.dtype == jnp.float32
        assert_close(found[0], with_gradients(case, "reference")[0][0], 2e-2)
        assert all(x.dtype == jnp.bfloat16 for x in grads[:4])

    def test_backward_keeps_chunk_states_only(self):
        b, t, h, dk, dv = 1, 512, 2, 32, 32
        x = jnp.zeros((b, t, h, dk))

        def residuals(q):
            return jax.vjp(lambda q: gated_linear_attention(q, x, x, x)[0], q)[1]

        kept = jax.eval_shape(residuals, x)
        assert (
            sum(leaf.size for leaf in jax.tree.leaves(kept)) <= 4 * x.size + (t // xla.MAX_CHUNK) * b * h * dk * dv + 64
        )


class TestMosaicTpu:
    """The TPU kernels, interpreted: memory nobody wrote is NaN, and unordered accesses are an error."""

    @pytest.mark.parametrize(
        ("t", "options", "tolerance"),
        [
            slow(140, {"mean": -1.0, "dtype": np.float32}, 1e-4),
            (130, {"mean": -50.0, "dtype": np.float32, "normalise": True}, 1e-3),
            (65, {"kind": "scalar", "dtype": jnp.bfloat16}, 1e-1),
            (130, {"kind": "vector", "delta": True, "dtype": np.float32}, 1e-4),
            slow(140, {"kind": "none", "delta": True, "dtype": np.float32}, 1e-4),
            slow(130, {"mean": -50.0, "delta": True, "dtype": np.float32}, 1e-3),
            (65, {"kind": "scalar", "delta": True, "dtype": jnp.bfloat16}, 1e-1),
        ],
        ids=[
            *("plain", "strong decay, normalised", "bfloat16, packed"),
            *(f"delta rule{rest}" for rest in ("", ", no decay", ", strong decay", ", bfloat16, packed")),
        ],
    )
    def test_matches_the_reference(self, t, options, tolerance):
        segment_ids = packed((17, 33, 3), t) if t == 65 else None
        case = make_case(t, shape=(1, 2, 32, 16), segment_ids=segment_ids, **options)
        with testing.interpret_tpu(races=True):
            found = with_gradients(case, "mosaic_tpu")
        assert_close(found, with_gradients(case, "reference"), tolerance)

    @pytest.mark.usefixtures("optimized")
    @pytest.mark.parametrize(
        ("generation", "dim", "delta"),
        [
            *[slow("v5e", 64, False), ("v5p", 64, False), slow("v6e", 64, False), ("tpu7x", 64, False)],
            *[slow("v5e", 256, False), slow("v6e", 128, False)],
            *[slow("v5e", 64, True), slow("v5p", 64, True), ("v6e", 64, True), slow("tpu7x", 64, True)],
            *[slow("v5e", 256, True), slow("tpu7x", 128, True)],
        ],
    )
    def test_compiles(self, generation, dim, delta):
        pytest.importorskip("libtpu")
        shape = jax.ShapeDtypeStruct((1, 1024, 2, dim), jnp.bfloat16)
        beta = jax.ShapeDtypeStruct(shape.shape[:3], jnp.float32) if delta else None

        def loss(q, k, v, g, beta):
            o, state = gated_linear_attention(q, k, v, g, beta=beta, implementation="mosaic_tpu")
            return o.astype(jnp.float32).sum() + state.s.sum()

        compiled = aot.compile_for(generation, jax.grad(loss, range(5)), shape, shape, shape, shape, beta)
        assert compiled.memory_analysis().temp_size_in_bytes < dim << 20


class TestMosaicGpu:
    """The Hopper kernels as far as the interpreter reaches (products are plain ones there), and their CUDA lowering."""

    @pytest.fixture(autouse=True)
    def two_segments(self, monkeypatch):
        """Of two chunks and one."""
        split = mosaic_gpu_parts.choose_split
        units = lambda batch, heads, widths: 2 * batch * heads * widths[0] * widths[1] // 64**2
        limited = lambda batch, heads, tokens, widths, slots: split(
            batch, heads, tokens, widths, min(slots, units(batch, heads, widths))
        )
        monkeypatch.setattr(mosaic_gpu_parts, "choose_split", limited)

    @pytest.mark.parametrize("lengths", [slow(None), slow((40, 89))], ids=["mild decays", "packed, strong and mild"])
    def test_matches_the_reference(self, lengths):
        """A document that ends inside a chunk makes its decays strong: of three chunks the first and the last."""
        ids = None if lengths is None else packed(lengths, 130)
        case = make_case(130, mean=-1.0, shape=(1, 1, 32, 64), dtype=jnp.bfloat16, segment_ids=ids)
        with op.interpret(plgpu.InterpretGPUParams()):
            (found, found_grads) = with_gradients(case, "mosaic_gpu")
        expected, expected_grads = with_gradients(case, "reference")
        assert_close(found, expected, 5e-2)
        decay = 3  # its gradient is a running sum of bfloat16 products, and has stray errors
        assert_near(found_grads[decay], expected_grads[decay], 2.5e-2)
        rest = lambda grads: [grad for n, grad in enumerate(grads) if n != decay]
        assert_close(rest(found_grads), rest(expected_grads), 5e-2)

    @pytest.mark.parametrize("widths", [slow((64, 64)), slow((128, 72))])
    def test_sums_of_weights_beside_the_values(self, widths):
        """Where no gradient is asked for, the normaliser is no column of the values; strong and mild chunks."""
        case = make_case(
            130, mean=-1.0, shape=(1, 2, *widths), dtype=jnp.bfloat16, normalise=True, group=2,
            segment_ids=packed((40, 89), 130),
        )  # fmt: skip
        with op.interpret(plgpu.InterpretGPUParams()):
            found = forward(case, "mosaic_gpu")
        assert_near(found, forward(case, "reference"), 5e-3)

    @pytest.mark.parametrize(
        ("widths", "lengths"), [((32, 64), (40, 89)), slow((64, 72), None), slow((128, 64), (40, 89))]
    )
    def test_gradient_with_the_normaliser(self, widths, lengths):
        """Strong and mild chunks; several tiles of keys or values, of which one counts the weights."""
        ids = None if lengths is None else packed(lengths, 130)
        options = {"normalise": True, "group": 2, "segment_ids": ids}
        case = make_case(130, mean=-1.0, shape=(1, 2, *widths), dtype=jnp.bfloat16, **options)
        with op.interpret(plgpu.InterpretGPUParams()):
            found, found_grads = with_gradients(case, "mosaic_gpu")
        expected, expected_grads = with_gradients(case, "reference")
        assert_close(found, expected, 5e-2)
        assert_near(found_grads, expected_grads, 2.5e-2)

    @pytest.mark.parametrize(
        ("kind", "widths", "options"),
        [
            ("scalar", (32, 64), {"group": 2, "segment_ids": packed((40, 50), 100)}),
            slow("none", (64, 128), {}),
            slow("scalar", (128, 72), {}),
            slow("scalar", (64, 64), {"mean": -50.0}),
        ],
    )
    def test_delta_rule(self, kind, widths, options):
        case = make_case(100, kind, shape=(1, 2, *widths), dtype=jnp.bfloat16, delta=True, **options)
        with op.interpret(plgpu.InterpretGPUParams()):
            found, found_grads = with_gradients(case, "mosaic_gpu")
        expected, expected_grads = with_gradients(case, "reference")
        assert_near(found, expected, 1e-2)
        assert_gradients_near(case, found_grads, expected_grads)

    @pytest.mark.parametrize(
        ("dim", "kind"),
        [
            *[(64, "normalised"), slow(64, "plain"), slow(128, "normalised"), slow(256, "normalised")],
            *[slow(256, "plain"), (64, "delta"), slow(128, "delta")],
        ],
    )
    def test_lowers_for_cuda(self, dim, kind):
        """Forward and backward; the normaliser makes no wider copy of the values."""
        wide = jax.ShapeDtypeStruct((1, 4096, 4, dim), jnp.bfloat16)
        per_head = jax.ShapeDtypeStruct(wide.shape[:3], jnp.float32)
        inputs = (wide, wide, wide, *((per_head, per_head) if kind == "delta" else (wide, None)))

        def loss(q, k, v, g, beta):
            options = {"beta": beta, "normalise": kind == "normalised", "implementation": "mosaic_gpu"}
            o, state = gated_linear_attention(q, k, v, g, **options)
            return o.astype(jnp.float32).sum() + state.s.sum()

        with op.target_platform("gpu"):
            traced = jax.jit(jax.grad(loss, range(5))).trace(*inputs)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
        assert f"x4x{dim + 1}x" not in text
        assert f"x4x{dim + 64}x" not in text

    def test_delta_rule_refuses_a_decay_for_every_channel(self):
        case = make_case(20, delta=True, dtype=jnp.bfloat16)
        with op.interpret(plgpu.InterpretGPUParams()), pytest.raises(Unsupported, match="for decays per head, not per"):
            forward(case, "mosaic_gpu")

    def test_refuses_float32(self):
        case = make_case(20, dtype=np.float32)
        with op.interpret(plgpu.InterpretGPUParams()), pytest.raises(Unsupported, match="q is float32"):
            forward(case, "mosaic_gpu")


@pytest.mark.gpu
class TestOnHopper:
    """On the device: products, copies and barriers as they are."""

    @pytest.mark.parametrize("t", [1, 63, 64, 65, 129, 1000])
    def test_lengths(self, t):
        self.check(make_case(t, mean=-0.05, shape=(2, 3, 64, 64), dtype=jnp.bfloat16))

    @pytest.mark.parametrize("widths", [(32, 64), (64, 128), (128, 128), (256, 72)])
    @pytest.mark.parametrize("normalise", [False, True])
    def test_widths(self, widths, normalise):
        self.check(make_case(200, mean=-0.05, shape=(1, 3, *widths), dtype=jnp.bfloat16, normalise=normalise))

    @pytest.mark.parametrize("mean", [-0.01, -1, -5, -50])
    def test_decay_stress(self, mean):
        self.check(make_case(200, mean=mean, shape=(1, 2, 64, 64), dtype=jnp.bfloat16))

    @pytest.mark.parametrize("mean", [-5, -50, -np.inf])
    @pytest.mark.parametrize("normalise", [False, True])
    def test_outputs_where_little_is_kept(self, mean, normalise):
        """Some gradients vanish there."""
        case = make_case(200, mean=mean, shape=(1, 2, 64, 64), dtype=jnp.bfloat16, normalise=normalise)
        assert_near(forward(case, "mosaic_gpu"), forward(case, "reference"), 1.5e-2)

    def test_packed_rows(self):
        ids = packed((40, 1, 64, 89), 200)
        self.check(make_case(200, shape=(1, 2, 128, 64), dtype=jnp.bfloat16, segment_ids=ids, normalise=True))

    @pytest.mark.parametrize("normalise", [False, True])
    def test_fewer_heads_of_values_and_decays(self, normalise):
        self.check(make_case(200, shape=(2, 6, 64, 64), dtype=jnp.bfloat16, normalise=normalise, group=3))

    def test_repeats_bitwise(self):
        case = make_case(3000, mean=-0.05, shape=(1, 8, 64, 64), dtype=jnp.bfloat16, normalise=True)
        first, *others = (with_gradients(case, "mosaic_gpu") for _ in range(5))
        for other in others:
            jax.tree.map(np.testing.assert_array_equal, first, other)

    @pytest.mark.parametrize(("t", "widths"), [(63, (64, 64)), (1000, (128, 128)), (1000, (32, 72))])
    @pytest.mark.parametrize(("kind", "mean"), [("none", 0), ("scalar", -0.05), ("scalar", -5)])
    def test_delta_rule(self, t, widths, kind, mean):
        ids = packed((t // 3, t // 2), t)
        case = make_case(t, kind, mean=mean, shape=(1, 6, *widths), dtype=jnp.bfloat16, delta=True, segment_ids=ids)
        self.check(case)

    def check(self, case):
        """With and without a gradient, which the normaliser makes two programs."""
        expected, expected_grads = with_gradients(case, "reference")
        assert_near(forward(case, "mosaic_gpu"), expected, 1.5e-2)
        found, found_grads = with_gradients(case, "mosaic_gpu")
        assert_near(found, expected, 1.5e-2)
        assert_gradients_near(case, found_grads, expected_grads)


def assert_gradients_near(case, found, expected):
    q, k, v, decay, beta, state = found
    assert_near((q, k, v, beta, state), (*expected[:3], *expected[4:]), 2.5e-2)
    if decay is None:
        return
    # The gradient of a decay is a sum of q dq - k dk: where little is kept it cancels to less than their rounding.
    terms = np.square(np.asarray(case.inputs[0], np.float64) * np.asarray(expected[0], np.float64))
    a_decay = terms if decay.ndim == 4 else terms.sum(-1)
    assert_near(decay, expected[3], 5e-2, floor=2e-2 * np.sqrt(np.mean(a_decay)))


class TestRecurrentStep:
    @pytest.mark.parametrize("normalise", [False, True])
    def test_a_donated_state_is_updated_in_place(self, normalise):
        token, decay = jnp.ones((3, 2, 8)), jnp.zeros((3, 2))
        state = LinearState(jnp.ones((3, 2, 8, 8)), jnp.ones((3, 2, 8)) if normalise else None)

        def step(state, q, k, v, g):
            return recurrent_step(q, k, v, g, state, normalise=normalise)[::-1]

        compiled = jax.jit(step, donate_argnums=0).lower(state, token, token, token, decay).compile()
        held = sum(x.nbytes for x in jax.tree.leaves(state))
        assert compiled.memory_analysis().alias_size_in_bytes >= held

    def test_refuses_a_state_without_normaliser(self):
        token = jnp.ones((1, 1, 4))
        with pytest.raises(ValueError, match=r"normalise=True needs state\.z to be an array"):
            recurrent_step(token, token, token, None, LinearState(jnp.ones((1, 1, 4, 4)), None), normalise=True)


class TestDeltaRule:
    def test_zero_strength_writes_nothing(self):
        q, k, v, g, beta, _ = make_case(20, "scalar", delta=True, dtype=np.float32).inputs
        o, _ = jax.jit(gated_linear_attention)(q, k, v, g, beta=0 * beta)
        assert_close(o, np.zeros_like(o), 0)

    def test_a_repeated_key_overwrites(self):
        key = np.zeros((1, 2, 1, 4), np.float32)
        key[..., 1] = 1
        key, v = jnp.asarray(key), jnp.arange(6.0).reshape(1, 2, 1, 3)
        _, state = gated_linear_attention(key, key, v, beta=jnp.ones((1, 2, 1)))
        assert_close(state.s[0, 0, 1], v[0, 1, 0], 1e-6)

    def test_orthonormal_keys_add(self):
        key = np.eye(8, dtype=np.float32)[None, :, None]
        q, _, v, *_ = make_case(8, "none", shape=(1, 1, 8, 5), dtype=np.float32).inputs
        found = jax.jit(gated_linear_attention)(q, key, v, beta=jnp.ones((1, 8, 1)))
        assert_close(found, jax.jit(gated_linear_attention)(q, key, v), 1e-5)

    @pytest.mark.parametrize(
        ("implementation", "dtype", "tolerance"), [("xla", np.float32, 1e-5), ("mosaic_tpu", jnp.bfloat16, 5e-2)]
    )
    def test_identical_keys_stay_stable(self, implementation, dtype, tolerance):
        """All that is written cancels but the last value, and the roundings of 128 written ones do not."""
        q, k, v, _, beta, _ = make_case(128, "none", delta=True, dtype=dtype).inputs
        k = np.broadcast_to(k[:, :1], k.shape)
        options = {"segment_ids": None, "normalise": False}
        case = Case((q, k, v, None, np.ones_like(beta), None), (), options)
        with testing.interpret_tpu():
            found = forward(case, implementation)
        assert_near(found, forward(case, "reference"), tolerance)


class TestBadInput:
    def call(self, **changed):
        x = jnp.ones((2, 4, 2, 8))
        return gated_linear_attention(**{"q": x, "k": x, "v": x, **changed})

    def test_positive_log_decay(self):
        with pytest.raises(ValueError, match=r"log_decay has the value 0\.5"):
            self.call(log_decay=jnp.full((2, 4, 2), 0.5))

    def test_nan_log_decay(self):
        with pytest.raises(ValueError, match="log_decay has the value nan"):
            self.call(log_decay=jnp.full((2, 4, 2), jnp.nan))

    def test_state_of_the_wrong_shape(self):
        with pytest.raises(ValueError, match=r"initial_state\.s has shape \(2, 2, 8, 4\): .* needs \(2, 2, 8, 8\)"):
            self.call(initial_state=LinearState(jnp.ones((2, 2, 8, 4)), None))

    def test_state_without_normaliser(self):
        with pytest.raises(ValueError, match=r"initial_state\.z has shape None"):
            self.call(initial_state=LinearState(jnp.ones((2, 2, 8, 8)), None), normalise=True)

    def test_decreasing_segment_id(self):
        with pytest.raises(ValueError, match="segment_ids decreases to 1"):
            self.call(segment_ids=jnp.asarray([[1, 1, 2, 0], [1, 3, 1, 1]]))

    def test_normaliser_with_delta_rule(self):
        with pytest.raises(ValueError, match="normalise=True has no meaning with beta"):
            self.call(beta=jnp.ones((2, 4, 2)), normalise=True)

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("name", ["k", "v", "log_decay", "beta"])
    def test_shapes_that_do_not_fit(self, name):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            self.call(**{name: jnp.ones((2, 3, 2, 8))})

    def test_unknown_backend(self):
        with pytest.raises(ValueError, match="'cuda'"):
            self.call(implementation="cuda")


class TestPlantedBugs:
    """The checks above notice these mistakes."""

    def expect_caught(self, monkeypatch, name, broken):
        monkeypatch.setattr(xla, name, broken(getattr(xla, name)))
        with pytest.raises(AssertionError):
            TestXla().check(TestXla().case(), anew=True)

    def test_suffix_that_includes_its_own_row(self, monkeypatch):
        def broken(original):
            def decays(factor):
                d = original(factor)
                return d._replace(suffix=d.suffix * factor)

            return decays

        self.expect_caught(monkeypatch, "chunk_decays", broken)

    def test_state_scan_without_decay(self, monkeypatch):
        def broken(original):
            return lambda c, *args: original(
                c._replace(decays=c.decays._replace(prefix=jnp.ones_like(c.decays.prefix))), *args
            )

        self.expect_caught(monkeypatch, "_entry_states", broken)

    def test_state_cotangents_forgotten(self, monkeypatch):
        def broken(original):
            return lambda c, a, b, d_last, dot: original(c, a, b, jnp.zeros_like(d_last), dot)

        self.expect_caught(monkeypatch, "_leaving_cotangents", broken)
