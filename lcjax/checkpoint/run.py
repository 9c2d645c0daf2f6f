"""The model of a training run: its newest sound checkpoint, without the optimiser."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from lcjax.checkpoint.hf import Pretrained
from lcjax.checkpoint.manager import CheckpointManager
from lcjax.checkpoint.manifest import rebuild
from lcjax.models.decoder import abstract
from lcjax.models.native import RECORDS


def is_run(folder: Path) -> bool:
    """Whether `folder` is the output of a training run."""
    return (folder / "checkpoints").is_dir()


def load_run(folder: Path, *, dtype: str) -> Pretrained:
    """Spec, parameters in `dtype` and tokenizer of the run in `folder`.

    Raises FileNotFoundError when nothing has been saved yet, CheckpointError when every step is damaged or the newest
    does not hold the model that it describes.
    """
    manager = CheckpointManager(folder / "checkpoints", keep=None)
    try:
        found = manager.newest()
        if found is None:
            raise FileNotFoundError(f"{folder / 'checkpoints'} holds no finished checkpoint yet: train further")
        path, sections = found
        spec = rebuild(sections["model"], RECORDS)
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        params = manager.restore_part(path, {"params": jax.tree.map(shape, abstract(spec)[1])})["params"]
    finally:
        manager.close()
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    return Pretrained(replace(spec, dtype=dtype), params, sections["about"]["tokenizer"])
