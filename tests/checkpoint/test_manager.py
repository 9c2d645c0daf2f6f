"""Checkpoints are whole or not there: damage is named and passed over, nothing is lost or removed."""

import json
import os
import random
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcjax.checkpoint.manager import CheckpointError, CheckpointManager
from lcjax.parallel.mesh import make_mesh

SECTIONS = {"model": {"width": 8, "layers": [1, 2]}, "tokenizer": "abc", "mesh": "data=1"}


def state(step):
    return {
        "params": {
            "layers": [jnp.full((64, 32), step, jnp.float32), jnp.arange(32.0)],
            "half": jnp.ones(3, jnp.bfloat16),
        },
        "key": jax.random.fold_in(jax.random.key(0), step),
        "step": jnp.int32(step),
    }


def shapes():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def same(a, b):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(raw(x)), np.asarray(raw(y))), a, b)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Steps 10, 20, 30, made once."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    manager = CheckpointManager(folder)
    for step in (10, 20, 30):
        manager.save(step, state(step), {"row": step}, SECTIONS)
    manager.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def restore(folder, **options):
    manager = CheckpointManager(folder)
    try:
        return manager.restore(shapes(), SECTIONS, **options)
    finally:
        manager.close()


def test_the_newest_step_comes_back_whole(folder):
    step, restored, data_state = restore(folder)
    assert (step, data_state) == (30, {"row": 30})
    same(restored, state(30))
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state(30))


def test_an_empty_folder_restores_nothing(tmp_path):
    assert restore(tmp_path / "none") is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[random.Random(len(data)).randrange(len(data))] ^= 1 << 3
    path.write_bytes(data)


FAULTS = {
    "flipped": flip,
    "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
    "missing": lambda p: p.unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("which", ["largest", "manifest.json", "data.json", "state/_METADATA"])
def test_a_damaged_newest_step_is_named_and_the_one_before_is_used(folder, which, fault, caplog):
    newest = folder / "00000030"
    files = [path for path in newest.rglob("*") if path.is_file()]
    path = max((f for f in files if f.name != "manifest.json"), key=lambda f: f.stat().st_size)
    path = path if which == "largest" else newest / which
    FAULTS[fault](path)
    before = snapshot(folder)
    step, restored, _ = restore(folder)
    assert step == 20
    same(restored, state(20))
    assert f"{newest} is damaged: {path.relative_to(newest)}" in caplog.text
    assert snapshot(folder) == before, "recovery must leave every file as it was"


def snapshot(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_when_every_step_is_damaged_the_run_is_refused(folder):
    for step in folder.iterdir():
        (step / "data.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .*step 30: data.json is missing"):
        restore(folder)


def test_an_unfinished_save_is_no_step(folder):
    shutil.copytree(folder / "00000030", folder / ".saving-00000040-123")
    assert restore(folder).step == 30


def test_a_damaged_step_in_the_way_is_renamed(folder):
    (folder / "00000030" / "data.json").write_text("{}")
    manager = CheckpointManager(folder)
    assert manager.restore(shapes(), SECTIONS).step == 20
    manager.save(30, state(31), {"row": 31}, SECTIONS)
    manager.wait()
    assert manager.restore(shapes(), SECTIONS).data_state == {"row": 31}
    manager.close()
    assert [(path / "data.json").read_text() for path in folder.glob("damaged-00000030-*")] == ["{}"]


def test_keep_removes_the_oldest_sound_steps_only(folder):
    (folder / "00000010" / "manifest.json").unlink()
    manager = CheckpointManager(folder, keep=2)
    manager.damaged[10] = "manifest.json is missing"
    manager.save(40, state(40), {}, SECTIONS)
    manager.close()
    assert manager.steps() == [10, 30, 40]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"width": 16, "layers": [1, 2]}}, r"model\.width: 8 -> 16"),
        ({"model": {"width": 8, "layers": [1, 3]}}, r"model\.layers\[1\]: 2 -> 3"),
        ({"tokenizer": "xyz"}, 'tokenizer: "abc" -> "xyz"'),
        ({"loss": 1}, "loss: null -> 1"),
    ],
)
def test_another_run_is_refused_with_what_differs(folder, changed, message):
    manager = CheckpointManager(folder)
    with pytest.raises(CheckpointError, match=message):
        manager.restore(shapes(), {**SECTIONS, **changed})
    assert manager.restore(shapes(), {**SECTIONS, **changed}, accept=tuple(changed)).step == 30
    manager.close()


def test_another_mesh_reshards(folder, caplog):
    mesh = make_mesh(fsdp=8)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state(0))
    wanted["params"]["layers"][0] = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
    manager = CheckpointManager(folder)
    restored = manager.restore(wanted, {**SECTIONS, "mesh": "fsdp=8"}).state
    manager.close()
    same(restored, state(30))
    assert restored["params"]["layers"][0].sharding == split
    assert "resharding to fsdp=8" in caplog.text


def save_and_wait(manager):
    manager.save(40, state(40), {}, SECTIONS)
    manager.wait()


def test_a_full_disk_is_reported_and_costs_no_earlier_step(folder):
    manager = CheckpointManager(folder)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file that may not grow: the same failed write as on a full disk, in Python and in orbax's C++ alike.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"saving step 40 .* failed .*; step 30 is intact"):
            save_and_wait(manager)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert manager.restore(shapes(), SECTIONS).step == 30
    manager.save(40, state(40), {"row": 40}, SECTIONS)
    manager.close()
    assert restore(folder).step == 40


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    manager = CheckpointManager(tmp_path)
    overwrite = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 0 - 1, x), donate_argnums=0)
    values = {"big": jnp.arange(2_000_000.0)}
    manager.save(1, values, {}, {"mesh": ""})
    values = overwrite(values)
    target = {"big": jax.ShapeDtypeStruct((2_000_000,), jnp.float32, sharding=values["big"].sharding)}
    manager.wait()
    restored = manager.restore(target, {"mesh": ""})
    np.testing.assert_array_equal(restored.state["big"], np.arange(2_000_000.0, dtype=np.float32))
    manager.close()


def test_manifest_lists_every_file(folder):
    manifest = json.loads((folder / "00000030" / "manifest.json").read_text())["manifest"]
    files = {str(p.relative_to(folder / "00000030")) for p in (folder / "00000030").rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert manifest["sections"] == SECTIONS
