"""Which devices JAX looks for."""

import importlib.metadata
import importlib.util
from pathlib import Path

import jax


def skip_absent_chips() -> None:
    """Use the CPU at once where nothing else can be: no TPU device file, no accelerator plugin.

    libtpu may be installed only to compile for TPUs; JAX would start it, fail and print several lines. A platform
    chosen by `JAX_PLATFORMS` stands.
    """
    chips = any(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists()
    plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins")
    if not (jax.config.jax_platforms or chips or plugins):
        jax.config.update("jax_platforms", "cpu")
