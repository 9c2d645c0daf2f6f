"""What does not fit is refused before anything is compiled, by name, with what to do."""

import dataclasses

import pytest

from lcjax import settings
from lcjax.parallel.mesh import MeshSpec
from lcjax.train import loop
from tests.faults.runs import TINY, TinyRun, write_corpus


@pytest.fixture
def job(tmp_path):
    write_corpus(tmp_path / "corpus")
    return settings.load("train", [TINY], TinyRun(tmp_path, "run").bindings)[0]


def refusal(job, tmp_path):
    with pytest.raises((ValueError, OSError)) as error:
        loop.prepare(job, tmp_path / "run", "")
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"
    return str(error.value)


def test_length_that_the_mesh_does_not_divide(job, tmp_path):
    said = refusal(dataclasses.replace(job, length=30, mesh=MeshSpec(fsdp=1, context=8)), tmp_path)
    assert said == "length 30 does not divide over the mesh axis context=8: use a multiple, such as 32"


def test_batch_that_the_mesh_does_not_divide(job, tmp_path):
    said = refusal(job, tmp_path)  # eight devices in tests, a batch of four
    assert "batch 4 does not divide over data=1 x fsdp=8 devices" in said
    assert "make it a multiple of 8" in said


def test_mesh_of_more_devices_than_there_are(job, tmp_path):
    assert "does not fit 8 devices" in refusal(dataclasses.replace(job, mesh=MeshSpec(fsdp=3)), tmp_path)


def test_vocabulary_that_does_not_fit_the_model(job, tmp_path):
    small = dataclasses.replace(job, batch=8, model=dataclasses.replace(job.model, vocab_size=256))
    assert "tokenizer has 259 ids" in refusal(small, tmp_path)


def test_corpus_that_is_not_there(job, tmp_path):
    data = dataclasses.replace(job.data, mixture=dataclasses.replace(job.data.mixture, paths=("nowhere/*.txt",)))
    assert "nowhere" in refusal(dataclasses.replace(job, batch=8, data=data), tmp_path)


def test_tokenizer_that_is_not_there(job, tmp_path):
    assert "no/tokenizer.json" in refusal(dataclasses.replace(job, batch=8, tokenizer="no/tokenizer.json"), tmp_path)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("train.length = 4096", "length 4096 is more than ModelSpec.max_length 2048"),
        ("train.steps = 0", "steps is 0; it must be at least 1"),
        ("train.options = @StepOptions()\nStepOptions.accumulate = 3", "batch 4 does not divide into 3 micro-batches"),
        ("Checkpoints.every = 0", "Checkpoints: every is 0"),
        ("ModelSpec.num_kv_heads = 3", "2 query heads don't divide into 3 KV heads"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_their_place(tmp_path, binding, message):
    with pytest.raises(settings.SettingsError) as error:
        settings.load("train", [TINY], [*TinyRun(tmp_path, "run").bindings, *binding.splitlines()])
    assert message in str(error.value)
    assert "tiny.gin:" in str(error.value) or "--gin_bindings=" in str(error.value)


def test_a_run_that_only_skips_stops_with_one_sentence(tmp_path):
    write_corpus(tmp_path / "corpus")
    run = TinyRun(tmp_path, "hot", "Cosine.peak = 1e38", "AdamW.clip_norm = None", "train.abort_after = 3")
    said = run.finish(status=2)
    assert "steps in a row" in said
    assert "Traceback" not in said
    assert run.metrics[-1]["skipped_in_row"] == 3
