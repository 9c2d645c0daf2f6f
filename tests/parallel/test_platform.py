"""Which devices JAX looks for, seen in fresh processes."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = "from lcjax.parallel.platform import skip_absent_chips; skip_absent_chips(); import jax; {}"


def run(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(code)], env=kept | environment, cwd=root, capture_output=True, text=True
    )
    return done.stdout + done.stderr


MAY_HAVE_CHIPS = any(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists() or find_spec("jax_plugins")


@pytest.mark.skipif(bool(MAY_HAVE_CHIPS), reason="this host may have an accelerator")
def test_no_word_about_a_tpu_that_is_not_there():
    assert run("print(jax.devices()[0].platform)") == "cpu\n"


def test_a_chosen_platform_stands():
    assert run("print(jax.config.jax_platforms)", JAX_PLATFORMS="cuda,cpu") == "cuda,cpu\n"
