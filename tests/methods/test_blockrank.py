"""BlockRank: document blocks against their mask, order and isolation of documents, shares, loss, rows and ranking."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels as pk
from lcjax import settings
from lcjax.cache import init_caches
from lcjax.data.pipeline import build_pipeline
from lcjax.data.ranking import DOCUMENT, RELEVANT, SIGNAL, Candidates, RankingData, RankingLines, RankingPrompt
from lcjax.data.sources import DataError
from lcjax.eval.matching_notes import MatchingNotes
from lcjax.eval.ranking import RankDocuments
from lcjax.methods import BlockRank
from lcjax.methods.blockrank.shares import contrastive_loss, read_documents
from lcjax.models.decoder import Decoder, abstract
from lcjax.models.documents import DocumentBlocks
from lcjax.models.spec import Attention, ModelSpec
from lcjax.models.weights import dotted
from lcjax.parallel.mesh import make_mesh
from lcjax.parallel.work import visible_pairs
from lcjax.serve.rank import Ranker
from lcjax.serve.rank_writing import Writer
from lcjax.serve.source import random_model
from lcjax.train.ranking import RankingLoss
from lcjax.train.step import StepOptions
from tests.serve.toy import TOKENIZER

SIZE = 256
PROMPT = RankingPrompt(size=SIZE, offset=1000)
SPEC = ModelSpec(
    vocab_size=TOKENIZER.vocab_size, width=24, mlp_width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6,
    dtype="float32", max_length=2048,
)  # fmt: skip
QUERY, NOTES = (
    "Who keeps the red key?",
    ["Ann has a hat.", "Bo keeps the red key.", "A long, long note on nothing much."],
)


def stacked(*rows):
    return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}


def explicit(documents, size):
    """Which block reads which, then causality within a block."""
    block = np.repeat(np.arange(documents + 2), size)
    i, j = block[:, None], block[None]
    return (np.tri(len(block), dtype=bool) & (i == j)) | ((j == 0) & (i > 0)) | ((i == documents + 1) & (j < i))


def test_blocks_are_the_explicit_mask():
    for documents in (0, 1, 3):
        blocks = DocumentBlocks(4, documents)
        np.testing.assert_array_equal(blocks.mask(4, 2).to_array(blocks.length, blocks.length), explicit(documents, 4))
    np.testing.assert_array_equal(explicit(0, 4), np.tri(8, dtype=bool))
    pairs = lambda documents: visible_pairs(DocumentBlocks(8, documents).mask(1, 1), 1, 8 * (documents + 2))
    assert [pairs(n) for n in (0, 3, 6)] == [(n + 2) * 36 + (2 * n + 1) * 64 for n in (0, 3, 6)]  # linear


@pytest.mark.parametrize("documents", [2, 3], ids=["last block reads parts", "whole"])
def test_the_op_on_blocks_is_masked_attention_with_its_gradients(documents):
    """Two rows of other documents, each block padded on its left."""
    size = 6
    blocks = DocumentBlocks(size, documents)
    keys = jax.random.split(jax.random.key(0), 4)
    q, do = (jax.random.normal(key, (2, blocks.length, 4, 6)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, blocks.length, 2, 6)) for key in keys[2:])
    pads = jnp.array([[2, 0, 5, 1, 3], [0, 6, 1, 4, 0]])[:, -documents - 2 :]  # one block of the second row is empty
    segments = (jnp.arange(size) >= pads[:, :, None]).reshape(2, -1).astype(jnp.int32)
    seen = jnp.asarray(explicit(documents, size)) & (segments[:, None, None] > 0)
    real = (segments > 0)[..., None, None]

    def plain(q, k, v):
        scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, 2)) * 6**-0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
        return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 2, 2))

    @jax.jit
    def both(*qkv):
        pull = lambda f: jax.vjp(lambda *x: jnp.where(real, f(*x), 0), *qkv)
        masked = lambda *x: pk.block_sparse_attention(*x, blocks.mask(4, 2), segment_ids=segments)
        by_block = lambda *x: blocks.attend(*x, segment_ids=segments)
        return [(o, back(do)) for o, back in map(pull, (plain, masked, by_block))]

    want, *found = both(q, k, v)
    for got in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


# Rows


def test_a_row_holds_its_blocks():
    row = PROMPT.row(TOKENIZER, QUERY, NOTES, [1], blocks=4)
    cells = {name: values.reshape(6, SIZE) for name, values in row.items()}
    real = cells["segment_ids"] > 0
    text = [TOKENIZER.decode(ids[kept]) for ids, kept in zip(cells["inputs"], real, strict=True)]
    assert QUERY in text[0]
    assert text[2] == "\nNote 2: Bo keeps the red key.\nEnd of note 2."
    assert text[4] == ""
    assert text[5].endswith(f"{QUERY}\nNumbers of the notes that answer it: [2")
    assert (np.diff(real.astype(int), axis=1) >= 0).all()  # padding on the left
    first = real[0].sum()
    for document in (1, 2, 3):
        np.testing.assert_array_equal(
            cells["positions"][document][real[document]], np.arange(real[document].sum()) + first
        )
    assert cells["positions"][5][real[5]][0] == 1000
    assert [set(roles[kept]) for roles, kept in zip(cells["roles"][1:4], real[1:4], strict=True)] == [
        {DOCUMENT}, {RELEVANT}, {DOCUMENT}
    ]  # fmt: skip
    at = np.flatnonzero(row["roles"] == SIGNAL)
    assert TOKENIZER.decode(row["inputs"][at]) == " ["
    weighted = row["loss_weights"] > 0
    assert TOKENIZER.decode(row["targets"][weighted]) == "2]"
    assert np.flatnonzero(weighted)[0] == at[1]
    asked = PROMPT.row(TOKENIZER, QUERY, NOTES)
    np.testing.assert_array_equal(np.flatnonzero(asked["roles"] == SIGNAL), 5 * SIZE - np.array([2, 1]))
    assert not asked["loss_weights"].any()


def test_what_does_not_fit_is_refused_by_name():
    small = dataclasses.replace(PROMPT, size=150)
    with pytest.raises(DataError, match=r"document 2 of the query 'Who .*' takes 3\d\d tokens and a block holds 150"):
        small.row(TOKENIZER, QUERY, ["a", "b" * 300])
    with pytest.raises(DataError, match=r"the question 'W+' with its instruction takes \d+ tokens"):
        small.row(TOKENIZER, "W" * 100, ["a"])
    with pytest.raises(DataError, match="3 documents for a row of 2"):
        PROMPT.row(TOKENIZER, QUERY, NOTES, blocks=2)
    with pytest.raises(DataError, match="0 documents"):
        PROMPT.row(TOKENIZER, QUERY, [])
    with pytest.raises(DataError, match="size 1 must be at least 2"):
        RankingPrompt(size=1)
    with pytest.raises(DataError, match=r"rows of 1000 tokens are no three or more blocks of RankingPrompt\.size=256"):
        RankingData(MatchingNotes(), PROMPT).blocks(1000)


def test_the_pipeline_of_ranking_rows(tmp_path):
    source = MatchingNotes(count=7, documents=5, filler=1)
    spec = RankingData(source, PROMPT, shards=2)
    make = lambda **options: build_pipeline(spec, TOKENIZER, batch=4, length=6 * SIZE, **options)
    whole = make()
    first, state, second = next(whole), whole.get_state(), next(whole)
    assert set(first) == {"inputs", "targets", "positions", "segment_ids", "roles", "loss_weights"}
    halves = [next(make(process_index=n, process_count=2)) for n in (0, 1)]
    for name, rows in first.items():
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), rows)
    other = make()
    other.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, next(other), second)
    relevant = (first["roles"] == RELEVANT).reshape(4, 6, SIZE).any(2)
    assert (relevant.sum(1) == 1).all()
    for pipeline in (whole, other):
        pipeline.close()
    long = dataclasses.replace(spec, prompt=dataclasses.replace(PROMPT, size=100))
    with pytest.raises(DataError, match=r"MatchingNotes.* row 0 of shard 0: ranking: .* a block holds 100"):
        next(build_pipeline(long, TOKENIZER, batch=2, length=300))

    lines = [Candidates(f"q{i}", ("yes",), ("no", "nay")).text() for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    files = RankingLines((str(tmp_path / "a.jsonl"),))
    corpus = files.open(tmp_path / "data")
    assert [Candidates.read(corpus[i]).query for i in range(3)] == ["q0", "q1", "q2"]
    (tmp_path / "a.jsonl").write_text('{"query": "q", "relevant": [], "others": []}\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 1 is not a ranking example: query must be text"):
        files.open(tmp_path / "data")


def test_one_note_has_both_the_thing_and_the_owner():
    corpus = MatchingNotes(count=20, documents=6).open("")
    for i in range(20):
        query, (answer,), others = Candidates.read(corpus[i])
        words = query.removesuffix(" kept?").removeprefix("Where is the ")
        assert words in answer
        assert len(others) == 5
        assert not any(words in note for note in others)
    assert corpus[3] != MatchingNotes(count=20, documents=6, split="test").open("")[3]
    assert json.loads(corpus[0]).keys() == {"query", "relevant", "others"}


# Models


@functools.cache
def toy():
    model = random_model(SPEC, TOKENIZER, seed=1)
    return model._replace(params=jax.tree.map(lambda x: 2 * x, model.params))


@functools.partial(jax.jit, static_argnums=(0, 3))
def shares_and_states(graphdef, params, batch, layer):
    return read_documents(nnx.merge(graphdef, params), batch, layer, SIZE)[:2]


def run(*rows, layer=2):
    graphdef = abstract(BlockRank(SIZE, len(rows[0]["inputs"]) // SIZE - 2).model(SPEC))[0]
    return [np.asarray(x) for x in shares_and_states(graphdef, toy().params, stacked(*rows), layer)]


def test_documents_are_read_alone_and_in_any_order():
    """Shares move with their documents, and the last block's states stay, while a document's change nothing else."""
    order = [2, 0, 1]
    texts = [NOTES, [NOTES[i] for i in order], [NOTES[0], "Quite another note.", NOTES[2]]]
    numberless = [PROMPT.row(TOKENIZER, QUERY, notes) for notes in texts]
    for row in numberless:  # the printed numbers differ with the order: make them one
        row["inputs"] = np.where(
            np.isin(row["inputs"], TOKENIZER.encode("123")), TOKENIZER.encode("0")[0], row["inputs"]
        )
    shares, states = run(*numberless)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(shares[1], shares[0][order], rtol=1e-4)
    blocks = states.reshape(3, 5, SIZE, -1)
    real = numberless[0]["segment_ids"].reshape(5, SIZE) > 0
    np.testing.assert_allclose(blocks[1, 4][real[4]], blocks[0, 4][real[4]], atol=1e-4)
    for block in (0, 1, 3):
        np.testing.assert_array_equal(blocks[2, block][real[block]], blocks[0, block][real[block]])
    assert np.abs(blocks[2, 4][real[4]] - blocks[0, 4][real[4]]).max() > 1e-4
    with jax.set_mesh(make_mesh(fsdp=1, context=2, devices=jax.devices()[:2])):  # the second document lies on both
        split, states_of_shards = run(*numberless)
    np.testing.assert_allclose(split, shares, rtol=1e-4)
    np.testing.assert_allclose(states_of_shards.reshape(blocks.shape)[0][real], blocks[0][real], atol=1e-4)


def test_shares_are_the_softmax_of_one_layer_over_documents():
    row = PROMPT.row(TOKENIZER, QUERY, NOTES, [0], blocks=4)
    (shares,), states = run(row)
    model = nnx.merge(abstract(BlockRank(SIZE, 4).model(SPEC))[0], toy().params)
    context = model.context(jnp.asarray(row["positions"])[None], 0, None, None)
    layer = model.layers[2]
    q, k, _ = layer.mixer.rotated(layer.mixer_norm(jnp.asarray(states)), context)
    q, k = np.asarray(q)[0], np.repeat(np.asarray(k)[0], 2, axis=1)
    of_documents = np.isin(row["roles"], (DOCUMENT, RELEVANT))
    total = np.zeros(len(of_documents))
    for at in np.flatnonzero(row["roles"] == SIGNAL):
        scores = np.where(of_documents, np.einsum("hd,shd->hs", q[at], k) * 6**-0.5, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        total += (weights / weights.sum(1, keepdims=True)).mean(0) / 2
    np.testing.assert_allclose(shares, total.reshape(6, SIZE)[1:-1].sum(1), rtol=1e-4, atol=1e-7)
    assert shares[3] == 0  # a block without a document


def test_the_contrast_by_hand():
    shares = jnp.array([[0.5, 0.3, 0.2]])
    relevant = jnp.array([[True, False, True]])
    e = np.exp(np.array([5.0, 3.0, 2.0]))
    everything = jnp.ones((1, 3), bool)
    found = contrastive_loss(shares, relevant, everything, 0.1)
    np.testing.assert_allclose(found, -np.log((e[0] + e[2]) / e.sum()), rtol=1e-5)
    np.testing.assert_array_equal(contrastive_loss(shares, everything, everything, 0.1), 0)
    present = jnp.array([[True, True, False]])
    found = contrastive_loss(shares, relevant & present, present, 0.1)
    np.testing.assert_allclose(found, -np.log(e[0] / (e[0] + e[1])), rtol=1e-5)


def test_the_loss_is_cross_entropy_and_contrast_which_reaches_the_layers_before():
    size, loss = 192, RankingLoss(layer=1, weight=0.5)
    prompt = RankingPrompt(size=size, offset=1000)
    rows = stacked(*(prompt.row(TOKENIZER, QUERY, NOTES[:2], [n]) for n in (0, 1)))
    graphdef = abstract(BlockRank(size, 2).model(SPEC))[0]
    params = toy().params

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(loss, rows):
        return loss.gradients(graphdef, params, nnx.State({}), rows, StepOptions())

    both, sums = gradients(loss, rows)
    alone, _ = gradients(loss, rows | {"loss_weights": jnp.zeros_like(rows["loss_weights"])})
    everything = jnp.where(rows["roles"] == DOCUMENT, RELEVANT, rows["roles"])
    plain, unopposed = gradients(loss, rows | {"roles": everything})
    assert float(unopposed.parts["contrast"]) == 0
    assert float(sums.weight) == 4
    assert float(sums.parts["contrast"]) > 0
    changed = set()
    for (path, a), (_, b) in zip(nnx.to_flat_state(both), nnx.to_flat_state(plain), strict=True):
        if np.abs(a.get_value() - b.get_value()).max() > 1e-6:
            changed.add(dotted(path))
    last = {f"layers.1.{name}" for name in ("mixer.query.kernel", "mixer.key.kernel", "mixer_norm.weight")}
    assert {name for name in changed if name.startswith("layers.1.")} == last
    assert {name.split(".")[1] for name in changed if name.startswith("layers.")} == {"0", "1"}
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(alone))  # rows without an answer have no contrast
    with pytest.raises(ValueError, match="layer is 3, the model's layers are 0 to 2"):
        gradients(RankingLoss(layer=3), rows)
    with pytest.raises(ValueError, match=r"of 768 tokens, which are .* got 760"):
        gradients(loss, {name: x[:, :760] for name, x in rows.items()})
    with pytest.raises(ValueError, match="layer -1 and weight"):
        RankingLoss(layer=-1)


def test_ranking_from_text_to_tables(tmp_path):
    ranker = Ranker(toy(), PROMPT, layer=2)
    scores = ranker.scores(QUERY, NOTES)
    assert scores.shape == (3,)
    assert scores.sum() == pytest.approx(1, abs=1e-5)
    assert ranker.rank(QUERY, NOTES) == np.argsort(-scores).tolist()
    task = RankDocuments(MatchingNotes(count=4, documents=3, split="test"), 2, PROMPT, documents=(2, 3), count=3)
    tables = task.run(toy(), tmp_path)
    names = {"ranking_ndcg10", "ranking_top1"}
    assert {*tables} == {f"{name}{end}" for name in names for end in ("", "_low", "_high")}
    assert all(0 <= value <= 1 for table in tables.values() for value in table.values())
    assert len((tmp_path / "ranking.jsonl").read_text().splitlines()) == 6
    with pytest.raises(ValueError, match="has 3 candidates and 4 are asked for"):
        dataclasses.replace(task, documents=(4,)).run(toy(), tmp_path)
    with pytest.raises(ValueError, match="layer 3 is none of random's 0 to 2"):
        Ranker(toy(), PROMPT, layer=3)
    with pytest.raises(ValueError, match="reach position 2256, and random was trained to 2048"):
        Ranker(toy(), dataclasses.replace(PROMPT, offset=2000), layer=2)


def test_writing_reads_what_the_document_blocks_show():
    """Behind the prompt and behind a first number, as the padded row under its mask has it."""
    writer = Writer(toy(), PROMPT, tokens=3)
    graphdef = abstract(BlockRank(SIZE, 3).model(SPEC))[0]
    answered = PROMPT.row(TOKENIZER, QUERY, NOTES, [1])
    (number,) = answered["inputs"][-1:].tolist()  # "2"; the closing bracket follows

    @jax.jit
    def under_the_mask(params, row):
        model = nnx.merge(graphdef, params)
        x, _ = model.hidden(row["inputs"], positions=row["positions"], segment_ids=row["segment_ids"])
        return model.logits(x[0, -2:])

    wanted = under_the_mask(toy().params, stacked(answered))
    found = list(writer.logits(QUERY, NOTES, [number]))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    text = writer.answer(QUERY, NOTES)
    assert 1 <= len(text) <= 3
    for text, order in ("3, 1, 3, 7", [2, 0]), ("none", []):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "answer", lambda *_, text=text: text)
            assert writer.rank(QUERY, NOTES) == order
    window = dataclasses.replace(SPEC, pattern=(Attention(window=5),))
    with pytest.raises(ValueError, match=r"Writer: layer 0 is Attention\(window=5"):
        Writer(toy()._replace(spec=window), PROMPT)


def test_settings():
    job, _ = settings.load("evaluate", ["configs/eval/blockrank.gin"])
    assert job.tasks[0].prompt == RankingPrompt(size=128, offset=4096)
    job, _ = settings.load("train", ["configs/run/blockrank_smollm2.gin"])
    assert job.data.blocks(job.length) == job.step_methods[0].documents == 8
    assert BlockRank().model(SPEC) == SPEC
    spec = BlockRank(16, 4).model(SPEC)
    assert spec.layers == (Attention(pattern=DocumentBlocks(16, 4)),) * 3
    with pytest.raises(ValueError, match=r"gives layer 1 a pattern, which is Attention\(window=5"):
        BlockRank(16).model(dataclasses.replace(SPEC, pattern=(Attention(), Attention(window=5))))
    with pytest.raises(ValueError, match="ranks documents in one pass and decodes nothing"):
        init_caches(spec, 1, 64)
    model = nnx.eval_shape(lambda: Decoder(SPEC, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="RankingLoss needs document blocks"):
        RankingLoss(layer=1).block_size(model, {})
