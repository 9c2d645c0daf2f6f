"""Eight virtual CPU devices, shape annotations checked at run time, and one seed.

The environment is set before JAX loads. `LCJAX_TEST_PLATFORM=cuda` (or `tpu`) runs on real devices instead.
"""

import os

PLATFORM = os.environ.get("LCJAX_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM
if PLATFORM == "cpu":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}".strip()
    # Most of the tests' time is compilation, and code for small arrays need not be good.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jaxtyping  # noqa: E402

jaxtyping.install_import_hook(["lcjax", "pallas_kernels"], "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("ci")


# Files that take minutes, started first: the short ones that are left fill both cores to the end.
LONG = (
    "tests/pods/test_compile.py",
    "tests/faults/test_processes.py",
    "tests/zoo/test_zoo.py",
    "tests/cache/test_attention_caches.py",
    "tests/faults/test_resume.py",
    "tests/kernels/test_attention_tpu_compile.py",
    "tests/kernels/test_decode_tpu_compile.py",
    "tests/kernels/test_gated_linear.py",
    "tests/kernels/test_attention_xla.py",
    "tests/kernels/test_attention_tpu.py",
    "tests/kernels/test_decode_tpu.py",
    "tests/kernels/test_decode.py",
    "tests/parallel/test_context.py",
    "tests/models/test_hf_parity.py",
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # by which xdist would start the files with many tests first


def pytest_collection_modifyitems(items):
    place = {name: n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.split("::")[0], len(LONG)))
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
def optimized():
    """The compiler at its best, as users have it: for what is said about the programs of another platform."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
