"""Checkpoints that are whole or not there.

A step is written to a hidden folder by orbax in the background, hashed, and then renamed: the rename is the one
commit of parameters, optimiser, RNG and data state together. A step that does not verify is named and passed over;
nothing is deleted to recover.
"""

import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lcjax.checkpoint import manifest as manifests
from lcjax.checkpoint.manifest import Sections

log = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint that could not be written, or must not be used; the message says what to do."""


class Restored(NamedTuple):
    """A state as it was after `step` batches, and the data iterator's state from then."""

    step: int
    state: Any
    data_state: Any


class CheckpointManager:
    """The checkpoints of one run in one folder: `00000100/{state/, data.json, manifest.json}`.

    keep: how many finished steps stay; older ones are removed after a newer one is committed. Steps found damaged
      don't count and are never removed.
    """

    def __init__(self, folder: str | Path, *, keep: int | None = 3):
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}; keep at least 1 checkpoint, or None for all")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.damaged: dict[int, str] = {}
        self._orbax = ocp.StandardCheckpointer()
        self._commit: threading.Thread | None = None
        self._error: Exception | None = None
        # All processes must agree on the hidden folder; no other run may have used it.
        self._token = _agree(time.time_ns() % 10**9)
        self._attempts = 0

    # Saving

    def save(self, step: int, state: Any, data_state: Any, sections: Sections) -> None:
        """Start writing a step; returns when `state` may be donated. Raises what an earlier save failed with."""
        self.wait()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._attempts += 1
        hidden = self.folder / f".saving-{step:08d}-{self._token}-{self._attempts}"
        try:
            if jax.process_index() == 0:
                hidden.mkdir(exist_ok=True)
                (hidden / "data.json").write_text(json.dumps(data_state))
            self._orbax.save(hidden / "state", _flat(_detached(state)))
        except (OSError, ValueError) as error:
            raise self._failure(step, error) from error
        self._commit = threading.Thread(target=self._finish, args=(step, hidden, sections), name=f"commit-{step}")
        self._commit.start()

    def _finish(self, step: int, hidden: Path, sections: Sections) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                manifests.write(hidden, step, sections)
                self._set_aside(step)
                hidden.rename(self._path(step))
                _flush(self.folder)
                self._retire()
        # Whatever stopped the background save has to reach the training loop, which raises it from wait().
        except BaseException as error:
            self._error = self._failure(step, error)

    def wait(self) -> None:
        """Until the save under way is committed; raises CheckpointError if it failed."""
        if self._commit is not None:
            self._commit.join()
            self._commit = None
        self.check()

    def check(self) -> None:
        """Raise the failure of a background save, if there is one; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        intact = self.steps()
        rest = f"step {intact[-1]} is intact and the run resumes from it" if intact else "no earlier step exists"
        return CheckpointError(
            f"saving step {step} to {self.folder} failed ({_root_cause(error)}): make room or mend the disk and start "
            f"the same command again; {rest}"
        )

    def _set_aside(self, step: int) -> None:
        """A damaged step in the way of its successor is renamed, not removed."""
        path = self._path(step)
        if path.exists():
            path.rename(self.folder / f"damaged-{step:08d}-{self._token}")
            self.damaged.pop(step, None)

    def _retire(self) -> None:
        if self.keep is not None:
            sound = [step for step in self.steps() if step not in self.damaged]
            for step in sound[: -self.keep]:
                # Renamed first, so that a kill in between leaves no half-removed step under a valid name.
                retired = self._path(step).rename(self.folder / f".retired-{step:08d}-{self._token}")
                shutil.rmtree(retired)

    # Restoring

    def steps(self) -> list[int]:
        """The committed steps, ascending, verified or not."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir())

    def restore(self, abstract: Any, sections: Sections, *, accept: tuple[str, ...] = ()) -> Restored | None:
        """The newest step that verifies, loaded into the shapes and shardings of `abstract`; None if there is no step.

        sections: what this run is; the checkpoint's must be equal, but for the section names in `accept`, the mesh
          (another mesh loads and reshards) and "about", which only informs. Raises CheckpointError when they differ, or
          when every step is damaged.
        """
        found = self.newest()
        if found is None:
            return None
        path, saved = found
        self._check_sections(path, saved, sections, accept)
        flat = self._orbax.restore(path / "state", _flat(abstract))
        data_state = json.loads((path / "data.json").read_text())
        return Restored(int(path.name), _unflat(abstract, flat), data_state)

    def restore_part(self, path: Path, part: dict[str, Any]) -> dict[str, Any]:
        """Some fields of the state at `path`, by name, in the dtypes and shardings of the abstract values in `part`.

        Raises CheckpointError, naming the first, when a field was saved with other members or of another shape.
        """
        wanted = _flat(part)
        arguments = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            held = reader.metadata(path / "state").item_metadata.tree
            held = {name: leaf for name, leaf in held.items() if name.split("/")[0] in part}
            for name in (*wanted, *held):
                here, there = (tuple(side[name].shape) if name in side else "missing" for side in (wanted, held))
                if here != there:
                    raise CheckpointError(f"{name} is {there} in {path} and {here} in what is to be restored")
            return _unflat(part, reader.restore(path / "state", args=arguments))

    def newest(self) -> tuple[Path, Sections] | None:
        """The newest step that verifies and what its manifest says of its run; None if there is no step.

        Raises CheckpointError when every step is damaged.
        """
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                manifest = manifests.read(path)
                problem = manifests.damage(path, manifest)
            except ValueError as error:
                problem = str(error)
            if not problem:
                return path, manifest["sections"]
            self.damaged[step] = problem
            log.warning("checkpoint %s is damaged: %s; trying an older step", path, problem)
        if self.damaged:
            told = "; ".join(f"step {step}: {problem}" for step, problem in self.damaged.items())
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged ({told}): restore the folder from a copy, or choose "
                "another --output to start anew"
            )
        return None

    @staticmethod
    def _check_sections(path: Path, saved: Sections, wanted: Sections, accept: tuple[str, ...]) -> None:
        if saved.get("mesh") != wanted.get("mesh"):
            log.warning(
                "checkpoint %s was written on mesh %s; resharding to %s", path, saved.get("mesh"), wanted["mesh"]
            )
        ignored = {"mesh", "about", *accept}
        saved, wanted = ({k: v for k, v in s.items() if k not in ignored} for s in (saved, wanted))
        if lines := manifests.differences(saved, wanted):
            more = f" and {len(lines) - 6} more" if len(lines) > 6 else ""
            raise CheckpointError(
                f"checkpoint {path} was written by another run: {'; '.join(lines[:6])}{more}: restore these settings, "
                "choose another --output, or list the sections that may differ in Checkpoints.accept"
            )

    def close(self) -> None:
        """Finish the save under way and release orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"


def _detached(state: Any) -> Any:
    """On a CPU device orbax reads the arrays' own memory while training donates it; elsewhere it copies first."""
    return jax.tree.map(jnp.copy, state) if jax.default_backend() == "cpu" else state


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by path: a checkpoint does not depend on the classes of a state, only on its names. Keys as raw bits."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _raw(leaf) for path, leaf in leaves}


def _unflat(tree: Any, flat: dict[str, Any]) -> Any:
    def one(path: Any, leaf: Any) -> Any:
        value = flat[jax.tree_util.keystr(path, simple=True, separator="/")]
        return jax.random.wrap_key_data(value) if _is_key(leaf) else value

    return jax.tree_util.tree_map_with_path(one, tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        bits = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=leaf.sharding)
    return jax.random.key_data(leaf)


def _agree(token: int) -> int:
    if jax.process_count() == 1:
        return token
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(jnp.int32(token)))


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
