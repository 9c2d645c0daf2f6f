"""Choosing a backend: an ordered table of candidates, each of which runs or says why it cannot."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

_target = jax.make_user_context(default_value=None)
_interpreter = jax.make_user_context(default_value=None)
_preferred = jax.make_user_context(default_value=None)
PREFERABLE = ("cudnn", "mosaic_gpu", "mosaic_tpu", "xla")


class Unsupported(Exception):
    """A backend declines a call. The message is the reason, one sentence."""


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': where the code being traced will run (see `target_platform`)."""
    return _target.value or jax.default_backend()


def target_platform(name: str) -> contextlib.AbstractContextManager[None]:
    """Trace for `name` ('cpu', 'gpu', 'tpu') instead of this process's devices, for ahead-of-time compilation."""
    if name not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"target_platform: {name!r} is not one of 'cpu', 'gpu', 'tpu'")
    return _target(name)


def interpreter() -> Any:
    """The parameters under which kernels of other machines are interpreted here, or None (see `testing`)."""
    return _interpreter.value


def interpret(parameters: Any) -> contextlib.AbstractContextManager[None]:
    """Interpret kernels with these Pallas `InterpretParams` inside the context."""
    return _interpreter(parameters)


def prefer(backend: str) -> contextlib.AbstractContextManager[None]:
    """Inside the context, ops that have `backend` among their platform's try it first, the others after it.

    For timing a whole model on one library; a call's own `implementation` forces a backend. A context is its thread's.
    """
    if backend not in PREFERABLE:
        raise ValueError(f"prefer: {backend!r} is not one of {', '.join(map(repr, PREFERABLE))}")
    return _preferred(backend)


def require_hopper() -> None:
    """Declines what would run on anything but a Hopper GPU; interpreted kernels and lowering for one pass.

    Raises:
      Unsupported: another platform, or a GPU of another generation.
    """
    if interpreter() is not None:
        return
    if platform() != "gpu":
        raise Unsupported(f"needs a Hopper GPU, this is {platform()}")
    if jax.default_backend() == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "unknown")
        if capability != "9.0":
            raise Unsupported(f"needs a Hopper GPU (compute capability 9.0), this one has {capability}")


def lazy(module: str, name: str) -> Callable:
    """A backend `name` in `module` whose import is put off until it is called."""

    def call(*args, **kwargs):
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


def dispatch[**A, R](
    op: str, backends: Mapping[str, Callable[A, R]], order: tuple[str, ...], implementation: str | None
) -> Callable[A, R]:
    """The function that tries `order` in turn (see `prefer`), or only `implementation` when one is named.

    Raises:
      ValueError: `implementation` is not in `backends`.
      Unsupported: the named backend declined, or all did; the message lists every reason.
    """
    if implementation is not None and implementation not in backends:
        raise ValueError(f"{op}: implementation={implementation!r} is not one of {', '.join(map(repr, backends))}")
    preferred = _preferred.value
    names = sorted(order, key=lambda name: name != preferred) if implementation is None else (implementation,)

    def run(*args: A.args, **kwargs: A.kwargs) -> R:
        reasons = []
        for name in names:
            try:
                return backends[name](*args, **kwargs)
            except Unsupported as reason:
                reasons.append(f"{name}: {reason}")
        raise Unsupported(f"{op}: no backend can run this call on {platform()} ({'; '.join(reasons)})")

    return run
