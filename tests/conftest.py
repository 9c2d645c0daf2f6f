"""Eight virtual CPU devices, shape annotations checked at run time, and one seed.

The environment is set before JAX loads. `LCJAX_TEST_PLATFORM=cuda` (or `tpu`) runs on real devices instead.
"""

import os

PLATFORM = os.environ.get("LCJAX_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM
if PLATFORM == "cpu":
    # Most of the tests' time is compilation: machine code for small arrays need not be good.
    flags = "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()

import jaxtyping  # noqa: E402

jaxtyping.install_import_hook(["lcjax", "pallas_kernels"], "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    if PLATFORM == "cuda":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: run with LCJAX_TEST_PLATFORM=cuda")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def unchecked():
    """Annotation checks off, as users run: a bad argument must meet the function's own check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
