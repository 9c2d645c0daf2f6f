"""Patterns of single KV heads: what they show, against plain definitions, and what they refuse."""

import numpy as np
import pytest

from lcjax.models.flops import visible_keys
from lcjax.models.patterns import Spans, Strided
from lcjax.models.spec import Attention, ModelSpec
from lcjax.parallel.work import visible_pairs
from lcjax.positions.laws import DynamicNTK
from lcjax.positions.remap import DualChunk
from pallas_kernels.masks import Recent

SIZES = {"vocab_size": 61, "width": 24, "mlp_width": 48, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3}
T = 75
ROW, KEY = np.arange(T)[:, None], np.arange(T)[None]


def spec_of(*pattern):
    return ModelSpec(**SIZES, head_dim=8, pattern=pattern, dtype="float32")


def shown(pattern, heads=6, groups=3):
    """`[K,T,T]`; query heads of a group must agree."""
    mask = np.broadcast_to(pattern.mask(heads, groups).to_array(T, T), (heads, T, T))
    each = mask.reshape(groups, heads // groups, T, T)
    assert (each == each[:, :1]).all()
    return each[:, 0]


def strided(head, *, block, local, every, step, offset, sink_blocks=0):
    near = ROW // block - KEY // block < local
    stays = (KEY // block + head * step + offset) % every == 0
    return (KEY <= ROW) & (near | stays | (KEY // block < sink_blocks))


def test_spans_are_sink_and_window_of_each_head():
    found = shown(Spans((2, 0, 0), (9, None, 20)))
    wanted = [(KEY <= ROW) & ((s > KEY) | (w > ROW - KEY)) for s, w in ((2, 9), (0, T), (0, 20))]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("numbers", [(4, 2, 5, 1, 0, 0), (4, 1, 3, 2, 1, 1), (8, 3, 2, 0, 1, 0), (16, 2, 1, 1, 0, 0)])
def test_strided_blocks_are_those_of_the_formula(numbers):
    names = ("block", "local", "every", "step", "offset", "sink_blocks")
    fields = dict(zip(names, numbers, strict=True))
    np.testing.assert_array_equal(shown(Strided(**fields)), [strided(head, **fields) for head in range(3)])


def test_the_last_heads_may_be_dense_and_the_step_follows_the_heads():
    found = shown(Strided(4, 2, 18, dense_heads=1))
    np.testing.assert_array_equal(found[0], strided(0, block=4, local=2, every=18, step=3, offset=0))
    np.testing.assert_array_equal(found[1], strided(1, block=4, local=2, every=18, step=3, offset=0))
    np.testing.assert_array_equal(found[2], KEY <= ROW)


@pytest.mark.parametrize(
    "pattern", [Strided(8, 1, 1), Strided(8, 10, 50), Spans((0,) * 3, (T,) * 3), Spans((0,) * 3, (None,) * 3)]
)
def test_limits_are_full_attention(pattern):
    np.testing.assert_array_equal(shown(pattern), np.broadcast_to(KEY <= ROW, (3, T, T)))


def test_the_strides_of_all_heads_together_miss_nothing():
    found = shown(Strided(4, 1, 6, step=1), heads=6, groups=6)
    np.testing.assert_array_equal(found.any(0), KEY <= ROW)


def unused_stays_unused(mask, block):
    """Whether, once a key block is unused by a row of blocks, no later row uses it (outside the diagonal)."""
    n = T // block
    used = mask[: n * block, : n * block].reshape(n, block, n, block).any((1, 3))
    return all((np.diff(used[j:, j].astype(int)) <= 0).all() for j in range(n))


def test_only_absolute_strides_let_a_cache_forget():
    assert all(unused_stays_unused(np.asarray(head), 4) for head in shown(Strided(4, 2, 5)))
    relative = (KEY <= ROW) & ((ROW // 4 - KEY // 4 < 2) | ((ROW // 4 - KEY // 4) % 5 == 0))
    assert not unused_stays_unused(relative, 4)


@pytest.mark.parametrize("pattern", [Spans((2, 0, 0), (9, None, 20)), Strided(4, 2, 5, dense_heads=1, sink_blocks=1)])
def test_work_counts_what_the_pattern_shows(pattern):
    pairs = int(shown(pattern).sum())
    assert visible_pairs(pattern.mask(6, 3), 6, T) == 2 * pairs
    assert visible_keys(Attention(pattern=pattern), 3, T) == pytest.approx(pairs / (3 * T))


def test_a_law_for_the_positions_reaches_layers_with_a_pattern():
    law = DynamicNTK(factor=2.0, original_length=64)
    with pytest.raises(ValueError, match=r"Attention.pattern Spans keeps rotated keys, and those of DynamicNTK"):
        spec_of(Attention(pattern=Spans((0,) * 3, (9,) * 3))).with_positions(law)
    with pytest.raises(ValueError, match=r"Attention.remap DualChunk needs full attention .* pattern=Strided"):
        Attention(pattern=Strided(), remap=DualChunk())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spans((0, 0), (4,)), "2 sinks and 1 windows"),
        (lambda: Spans((0,), (0,)), "KV head 0 has sink 0 and window 0"),
        (lambda: Spans((3,), (None,)), "reads everything"),
        (lambda: Strided(block=0), "Strided.block is 0"),
        (lambda: Strided(sink_blocks=-1), "Strided.sink_blocks is -1"),
        (lambda: Attention(window=4, pattern=Strided()), "the window 4 and the pattern Strided"),
        (lambda: spec_of(Attention(pattern=Spans((0,), (4,)))), "made for 1 KV heads, the model has 3"),
        (lambda: spec_of(Attention(pattern=Strided(dense_heads=4))), "dense_heads is 4, the model has 3"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_row_beyond_every_key_does_not_wrap():
    assert (Recent(64, 2**31 - 1).rows(4096)[0] > 2**30).all()
