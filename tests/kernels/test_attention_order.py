"""Which backend a call of attention gets on which GPU, by default and by force."""

import types

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import op
from pallas_kernels.attention import api, mosaic_gpu
from pallas_kernels.masks import Causal, Full, Window

H100, A100 = ("NVIDIA H100 80GB HBM3", "9.0"), ("NVIDIA A100-SXM4-80GB", "8.0")
LENGTH = 1024  # from which on the H100's file in `tuned/` has causal rows of head dim 128 faster


@pytest.fixture
def gpu(monkeypatch):
    """gpu(kind, capability): what is traced from then on finds such a GPU; cuDNN and the kernel compute nothing."""

    def like_values(q, k, v, **_):
        return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)

    def attended(settings, q, k, v, tables):
        return like_values(q, k, v), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))

    def there(kind: str, capability: str) -> None:
        device = types.SimpleNamespace(device_kind=kind, compute_capability=capability, core_count=132)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])

    monkeypatch.setattr(jax.nn, "dot_product_attention", like_values)
    monkeypatch.setattr(mosaic_gpu, "_attend", attended)
    return there


@pytest.fixture
def takes(monkeypatch):
    """takes(mask, ...) -> the name of the backend that runs the call."""
    took = []

    def noted(name, attend):
        def run(call):
            found = attend(call)
            took.append(name)
            return found

        return run

    for name, attend in list(api.BACKENDS.items()):
        monkeypatch.setitem(api.BACKENDS, name, noted(name, attend))

    def run(mask=None, length=LENGTH, keys=None, dim=128, dtype=jnp.bfloat16, **options) -> str:
        q, k = (jax.ShapeDtypeStruct((1, n, 2, dim), dtype) for n in (length, keys or length))
        attend = lambda q, k: pk.block_sparse_attention(q, k, k, Causal() if mask is None else mask, **options)
        jax.eval_shape(attend, q, k)
        return took[-1]

    return run


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        ({}, "mosaic_gpu"),
        ({"length": 2 * LENGTH}, "mosaic_gpu"),
        ({"length": LENGTH - 2}, "cudnn"),
        ({"dim": 72}, "cudnn"),
        ({"dtype": jnp.float16}, "cudnn"),
        ({"mask": Full()}, "cudnn"),
        ({"mask": Full(), "keys": 2 * LENGTH}, "cudnn"),
        ({"implementation": "cudnn"}, "cudnn"),
        ({"mask": Full(), "implementation": "mosaic_gpu"}, "mosaic_gpu"),
        ({"keys": 2 * LENGTH, "q_offset": LENGTH}, "mosaic_gpu"),  # a chunk of a prompt
        ({"mask": Full(), "return_lse": True}, "mosaic_gpu"),
        ({"length": 128, "mask": Causal() & Window(64)}, "mosaic_gpu"),
        ({"length": 128, "dim": 16, "mask": Causal() & Window(64)}, "xla"),
        ({"length": 128, "dtype": jnp.float32}, "xla"),
    ],
)
def test_on_the_gpu_that_was_measured(gpu, takes, call, wanted):
    gpu(*H100)
    assert takes(**call) == wanted


def test_cudnn_is_first_on_a_gpu_that_was_not_measured(gpu, takes):
    gpu("NVIDIA H200", "9.0")
    assert takes() == "cudnn"
    assert takes(return_lse=True) == "mosaic_gpu"
    gpu(*A100)
    assert takes() == "cudnn"
    with pytest.raises(pk.Unsupported, match=r"\(compute capability 9.0\), this one has 8.0"):
        takes(implementation="mosaic_gpu")
    assert takes(length=128, return_lse=True) == "xla"


def test_what_the_kernel_declines_goes_to_cudnn(gpu, takes, monkeypatch):
    gpu(*H100)
    monkeypatch.setattr(mosaic_gpu, "_cuda_version", lambda: 12081)
    assert takes() == "cudnn"
    with pytest.raises(pk.Unsupported, match=r"CUDA 12.8 miscompiles .* 12.9.1"):
        takes(implementation="mosaic_gpu")


def test_a_preferred_backend_is_tried_first(gpu, takes):
    gpu(*H100)
    with op.prefer("cudnn"):
        assert takes() == "cudnn"
        assert takes(length=128, return_lse=True) == "mosaic_gpu"
        assert takes(implementation="mosaic_gpu") == "mosaic_gpu"
    with op.prefer("mosaic_gpu"):
        assert takes(Full()) == "mosaic_gpu"
    assert takes() == "mosaic_gpu"
    with pytest.raises(ValueError, match="prefer: 'cuda' is not one of 'cudnn'"):
        op.prefer("cuda")


def test_the_default_lowers_to_the_kernel_that_was_measured(monkeypatch):
    monkeypatch.setattr(pk.tuning, "_device_kind", lambda: H100[0])
    q = jax.ShapeDtypeStruct((1, LENGTH, 2, 128), jnp.bfloat16)
    with op.target_platform("gpu"):
        traced = jax.jit(lambda q: pk.block_sparse_attention(q, q, q, Causal())).trace(q)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
