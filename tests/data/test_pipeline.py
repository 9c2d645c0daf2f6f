"""The stream: same rows for every process count, resumable at every step, mixed by share, errors by name."""

import copy
import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lcjax.data import DataError, DataSpec, Mixture, load_tokenizer
from lcjax.data.pipeline import build_pipeline, merge_states


class MemoryCorpus:
    """Texts in a tuple; counts how often each is read."""

    def __init__(self, texts: tuple[str, ...]):
        self.texts = texts
        self.reads = [0] * len(texts)
        self.fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        self.reads[index] += 1
        return self.texts[index]

    def sizes(self) -> np.ndarray:
        return np.array([len(text.encode()) for text in self.texts], np.int64)


@dataclass(frozen=True)
class Memory:
    """A `Source` over given texts."""

    texts: tuple[str, ...]
    split: str = "train"

    def open(self, data_dir: str | Path) -> MemoryCorpus:
        del data_dir
        return MemoryCorpus(self.texts)


def texts(count: int, low: int, high: int, letter: str = "x", seed: int = 0) -> tuple[str, ...]:
    """Texts of random sizes, each beginning with its number."""
    rng = np.random.default_rng(seed)
    return tuple(f"{i:04d}" + letter * int(n) for i, n in enumerate(rng.integers(low, high, count)))


TOKENIZER = load_tokenizer("bytes")
SHORT = Memory(texts(37, 3, 60))
LONG = Memory(texts(5, 300, 900, "y", seed=1))


@pytest.fixture
def build():
    """Builds pipelines and closes them afterwards."""
    built = []

    def make(spec, **kwargs):
        arguments = {"batch": spec.shards, "length": 32} | kwargs
        built.append(build_pipeline(spec, TOKENIZER, **arguments))
        return built[-1]

    yield make
    for pipeline in built:
        pipeline.close()


def take(pipeline, count):
    return [next(pipeline) for _ in range(count)]


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def documents_in(batch):
    """The texts of the segments of a batch, from their inputs and last target."""
    found = []
    for inputs, targets, segments in zip(batch["inputs"], batch["targets"], batch["segment_ids"], strict=True):
        for number in range(1, segments.max() + 1):
            where = np.flatnonzero(segments == number)
            found.append([*inputs[where].tolist(), int(targets[where[-1]])])
    return found


@pytest.mark.parametrize("packing", ["split", "fit", "pad"])
def test_shapes_and_invariants(build, packing):
    pipeline = build(DataSpec(Mixture((SHORT, LONG)), shards=2, packing=packing), batch=4)
    for batch in take(pipeline, 20):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "inputs": ((4, 32), np.int32),
            "targets": ((4, 32), np.int32),
            "positions": ((4, 32), np.int32),
            "segment_ids": ((4, 32), np.int32),
            "loss_weights": ((4, 32), np.float32),
        }
        segments = batch["segment_ids"]
        np.testing.assert_array_equal(batch["loss_weights"], segments > 0)
        starts = np.diff(segments, axis=1, prepend=0) != 0
        assert (batch["positions"][starts] == 0).all()
        inner = ~starts[:, 1:] & (segments[:, 1:] > 0)
        assert (np.diff(batch["positions"], axis=1)[inner] == 1).all()
        # Within a document the next input is this target.
        np.testing.assert_array_equal(batch["targets"][:, :-1][inner], batch["inputs"][:, 1:][inner])
        if packing == "split":
            assert (segments > 0).all()


def test_no_packing_without_shuffle_gives_the_documents_in_order(build):
    corpus = Memory(("abc", "", "de", "f"))  # the empty one, only an end of text, makes no pair
    pipeline = build(DataSpec(corpus, packing="pad", shuffle=False), length=8)
    got = [documents_in(batch)[0] for batch in take(pipeline, 4)]
    assert got == [[*text, TOKENIZER.eos_id] for text in (b"abc", b"de", b"f", b"abc")]


def test_long_documents_follow_in_consecutive_pieces(build):
    text = "".join(map(chr, range(40, 110)))
    pipeline = build(DataSpec(Memory((text,)), packing="pad", shuffle=False, add_eos=False), length=32)
    rows = [documents_in(batch)[0] for batch in take(pipeline, 3)]
    # Pieces share the border id: a target of one is the first input of the next, so no pair is lost.
    assert [row[0] for row in rows[1:]] == [row[-1] for row in rows[:-1]]
    assert bytes(rows[0] + rows[1][1:] + rows[2][1:]).decode() == text


@pytest.mark.parametrize(("policy", "longest"), [("truncate", 32), ("skip", 31)])
def test_policies_for_long_documents(build, policy, longest):
    spec = DataSpec(Memory(("a" * 500, "b" * 31)), packing="pad", long_documents=policy, add_eos=False)
    batches = take(build(spec, length=longest), 12)
    letters = {document[0] for batch in batches for document in documents_in(batch)}
    assert letters == ({97, 98} if policy == "truncate" else {98})
    if policy == "truncate":
        assert all(len(d) <= longest + 1 for batch in batches for d in documents_in(batch))


def test_every_document_once_an_epoch(build):
    spec = DataSpec(SHORT, shards=1, packing="fit", window=4)
    seen = Counter()
    pipeline = build(spec, length=64)
    while sum(seen.values()) < 37:
        seen.update(bytes(d[:4]).decode() for d in documents_in(next(pipeline)))
    counts = Counter(seen.values())
    assert counts[1] >= 30  # the last window may reach into the next epoch
    assert len(seen) >= 34


def test_processes_share_the_same_global_batches(build):
    spec = DataSpec(Mixture((SHORT, LONG), weights=(1.0, 2.0)), shards=4, packing="fit", window=3)
    whole = take(build(spec, batch=8), 12)
    for count in (2, 4):
        parts = [take(build(spec, batch=8, process_index=i, process_count=count), 12) for i in range(count)]
        for step, batch in enumerate(whole):
            joined = {name: np.concatenate([part[step][name] for part in parts]) for name in batch}
            assert_equal(joined, batch)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_restart_on_another_process_count(build, before, after):
    spec = DataSpec(Mixture((SHORT, LONG)), shards=4, packing="split", window=3)
    unbroken = take(build(spec, batch=4), 20)
    first = [build(spec, batch=4, process_index=i, process_count=before) for i in range(before)]
    for pipeline in first:
        take(pipeline, 7)
    state = json.loads(json.dumps(merge_states([pipeline.get_state() for pipeline in first])))
    second = [build(spec, batch=4, process_index=i, process_count=after) for i in range(after)]
    for pipeline in second:
        pipeline.set_state(state)
    for step in range(7, 20):
        parts = [next(pipeline) for pipeline in second]
        assert_equal({name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, unbroken[step])


@pytest.mark.parametrize("packing", ["split", "fit", "pad"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_restoring_at_every_step_gives_the_same_remaining_stream(build, packing, prefetch):
    mixture = Mixture((SHORT, LONG), weights=(3.0, 1.0))
    spec = DataSpec(mixture, shards=2, packing=packing, window=5, prefetch=prefetch)
    steps = 36
    pipeline = build(spec, batch=4)
    states, batches = [pipeline.get_state()], []
    for _ in range(steps):
        batches.append(next(pipeline))
        states.append(copy.deepcopy(pipeline.get_state()))
    assert max(len(json.dumps(state)) for state in states) < 400
    shape = [len(entry["at"]) for entry in states[0]["shards"].values()]
    assert all([len(e["at"]) for e in state["shards"].values()] == shape for state in states)
    other = build(spec, batch=4)
    for step, state in enumerate(states):
        other.set_state(json.loads(json.dumps(state)))
        assert other.get_state() == state
        # The whole remaining stream for some steps, the next two batches for all.
        for later in range(step, steps if step % 9 == 0 else min(step + 2, steps)):
            assert_equal(next(other), batches[later])


def test_batch_size_may_change_at_a_restart(build):
    spec = DataSpec(SHORT, shards=2, window=3)
    rows = [{k: v[i] for k, v in b.items()} for b in take(build(spec, batch=2), 12) for i in range(2)]
    pipeline = build(spec, batch=2)
    take(pipeline, 4)
    larger = build(spec, batch=4)
    larger.set_state(pipeline.get_state())
    for step, batch in enumerate(take(larger, 4)):
        for index in range(4):  # shard-major: rows 0 and 1 from shard 0
            shard, draw = divmod(index, 2)
            row = rows[2 * (4 + 2 * step + draw) + shard]
            assert_equal({k: v[index] for k, v in batch.items()}, row)


def test_mixture_keeps_token_shares(build):
    sources = (Memory(texts(30, 20, 80, "a")), Memory(texts(4, 2000, 4000, "b")), Memory(texts(50, 20, 40, "c")))
    pipeline = build(DataSpec(Mixture(sources, weights=(5.0, 3.0, 2.0)), shards=2, window=4), batch=8, length=128)
    counts = Counter()
    for batch in take(pipeline, 40):
        counts.update(batch["inputs"].ravel().tolist())
    letters = np.array([counts[ord(letter)] for letter in "abc"], float)
    digits_and_eos = 40 * 8 * 128 - letters.sum()
    assert digits_and_eos < 0.2 * 40 * 8 * 128
    np.testing.assert_allclose(letters[0] / letters[1], 5 / 3, rtol=0.15)


def test_length_buckets(build):
    short, long = texts(40, 10, 20, "s"), texts(40, 200, 220, "l")
    mixture = Mixture((Memory(short + long),), bucket_edges=(100,), bucket_weights=(1.0, 3.0))
    counts = Counter()
    for batch in take(build(DataSpec(mixture, window=8), length=64), 200):
        counts.update(batch["inputs"].ravel().tolist())
    np.testing.assert_allclose(counts[ord("l")] / counts[ord("s")], 3.0 * (210 / 215) / (15 / 20), rtol=0.1)


def test_more_shards_than_documents(build):
    pipeline = build(DataSpec(Memory(("only one document",)), shards=8), batch=8, length=16)
    assert all((batch["segment_ids"] > 0).all() for batch in take(pipeline, 5))


def test_seeds_and_shards_differ(build):
    def first(**kwargs):
        return next(build(DataSpec(SHORT, window=4, **kwargs), batch=2))["inputs"]

    assert (first(seed=0, shards=2) == first(seed=0, shards=2)).all()
    assert (first(seed=0, shards=2) != first(seed=1, shards=2)).any()
    rows = first(seed=0, shards=2)
    assert (rows[0] != rows[1]).any()


def test_special_tokens_in_a_corpus_are_plain_text(build):
    batch = next(build(DataSpec(Memory(("<|endoftext|>",)), packing="pad"), length=20))
    assert documents_in(batch)[0][:-1] == list(b"<|endoftext|>")


@pytest.mark.parametrize("packing", ["split", "fit"])
def test_documents_joined_by_a_separator(build, packing):
    """Nothing marks a joint but the separator, on which the loss is kept; `fit` puts the end of f behind all of abc."""
    corpus = Memory(("abc" * 7, "de", "f" * 40, "ghij"))
    spec = DataSpec(corpus, packing=packing, shuffle=False, separator="|", window=4)
    rows = [{name: value[0] for name, value in batch.items()} for batch in take(build(spec), 4)]
    for row in rows:
        used = row["segment_ids"] > 0
        np.testing.assert_array_equal(row["segment_ids"], used)
        np.testing.assert_array_equal(row["loss_weights"], used)
        np.testing.assert_array_equal(row["positions"], np.arange(32) * used)
        np.testing.assert_array_equal(row["targets"][used][:-1], row["inputs"][used][1:])
    texts = [bytes(row["inputs"][row["segment_ids"] > 0].tolist()) for row in rows]
    if packing == "split":
        assert b"".join(texts).startswith(b"|" + b"abc" * 7 + b"|de|" + b"f" * 40 + b"|ghij|" + b"abc" * 7 + b"|")
    else:
        assert b"|" + b"abc" * 7 + b"|" + b"f" * 8 in texts


def test_a_separator_is_one_token_between_documents(build):
    with pytest.raises(DataError, match=r"DataSpec.separator '<sep>' is 5 tokens of this tokenizer: name a single one"):
        build(DataSpec(SHORT, separator="<sep>"))


def test_fingerprint_follows_what_decides_the_rows(build):
    base = build(DataSpec(SHORT)).fingerprint
    assert build(DataSpec(SHORT, prefetch=0, data_dir="elsewhere")).fingerprint == base
    for changed in ({"seed": 1}, {"packing": "fit"}, {"window": 9}, {"separator": "|"}):
        assert build(DataSpec(SHORT, **changed)).fingerprint != base
    assert build(DataSpec(LONG)).fingerprint != base
    assert build(DataSpec(SHORT), length=33).fingerprint != base


def test_states_that_do_not_fit_are_refused(build):
    spec = DataSpec(SHORT, shards=2)
    pipeline = build(spec, batch=2)
    state = build(spec, batch=2, process_index=0, process_count=2).get_state()
    with pytest.raises(DataError, match="lacks shard 1"):
        pipeline.set_state(state)
    other = build(DataSpec(SHORT, shards=2, seed=5), batch=2)
    with pytest.raises(DataError, match="is of stream"):
        other.set_state(pipeline.get_state())
    with pytest.raises(DataError, match="2 different streams"):
        merge_states([pipeline.get_state(), other.get_state()])
    pipeline.close()
    with pytest.raises(DataError, match="is closed"):
        next(pipeline)


def test_bad_numbers_are_named(build):
    spec = DataSpec(SHORT, shards=4)
    with pytest.raises(DataError, match="length is 0"):
        build(spec, length=0)
    with pytest.raises(DataError, match=r"batch 6 is not a positive multiple of DataSpec.shards=4"):
        build(spec, batch=6)
    with pytest.raises(DataError, match=r"3 processes cannot share DataSpec.shards=4"):
        build(spec, process_count=3)
    with pytest.raises(DataError, match="process_index 2 is not below process_count 2"):
        build(spec, process_index=2, process_count=2)
    with pytest.raises(DataError, match="tokenizer has 259 ids and the model's vocabulary 256"):
        build(spec, vocab_size=256)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataSpec(SHORT, shards=0), "DataSpec.shards is 0"),
        (lambda: DataSpec(SHORT, window=0), "DataSpec.window is 0"),
        (lambda: DataSpec(SHORT, packing="tight"), "DataSpec.packing is 'tight': choose one of split, fit, pad"),
        (lambda: DataSpec(SHORT, long_documents="drop"), "DataSpec.long_documents is 'drop'"),
        (lambda: DataSpec(SHORT, separator="|", packing="pad"), "separator is '|' with packing='pad', which joins no"),
        (lambda: DataSpec(SHORT, separator="|", add_bos=True), r"separator is '\|' with add_bos=True: leave one"),
        (lambda: Mixture(()), "Mixture has no sources"),
        (lambda: Mixture((SHORT, LONG), weights=(1.0, 0.0)), r"Mixture.weights\[1\] is 0.0"),
        (lambda: Mixture((SHORT, LONG), weights=(1.0,)), "Mixture.weights has 1 entries for 2 sources"),
        (lambda: Mixture((SHORT,), weights=(float("nan"),)), r"Mixture.weights\[0\] is nan"),
        (
            lambda: Mixture((SHORT,), bucket_edges=(5, 2), bucket_weights=(1.0, 1.0, 1.0)),
            "must be positive and ascending",
        ),
        (
            lambda: Mixture((SHORT,), bucket_edges=(5,), bucket_weights=(1.0,)),
            "bucket_weights has 1 entries",
        ),
    ],
)
def test_bad_records_are_named(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_corpora_without_usable_documents(build):
    with pytest.raises(DataError, match="bucket 1 holds no document"):
        build(DataSpec(Mixture((SHORT,), bucket_edges=(10_000,), bucket_weights=(1.0, 1.0))))
    with pytest.raises(DataError, match="has no document that makes a row of 32"):
        next(build(DataSpec(Memory(("", "")), add_eos=False)))
    with pytest.raises(DataError, match="long_documents='skip'"):
        next(build(DataSpec(LONG, long_documents="skip", packing="pad")))


def test_speed_for_bytes(build):
    corpus = Memory(tuple("some words of plain text, over and over. " * 200 for _ in range(40)))
    pipeline = build(DataSpec(corpus, prefetch=0, packing="fit"), batch=1, length=4096)
    next(pipeline)
    start = time.perf_counter()
    take(pipeline, 64)
    rate = 64 * 4096 / (time.perf_counter() - start)
    assert rate > 200_000, f"{rate:.0f} tokens/s"


def test_a_document_is_read_once_while_it_lasts(build, monkeypatch):
    corpus = LONG.open("")
    monkeypatch.setattr(Memory, "open", lambda self, data_dir: corpus)
    take(build(DataSpec(LONG, window=1, prefetch=0), length=8), 40)
    assert max(corpus.reads) == 1
