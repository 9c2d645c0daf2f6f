"""Checks of values: at once where they are known, and under `jit` where `debug_checks` asks for them.

with debug_checks():
    error, o = checkify.checkify(jax.jit(f))(q, k, v)
error.throw()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

type Array = jax.Array | np.ndarray
_debug = jax.make_user_context(default_value=False)


def debug_checks() -> contextlib.AbstractContextManager[None]:
    """Check traced values too. Functions traced inside must be run through `jax.experimental.checkify.checkify`."""
    return _debug(True)


def check_values(ok: Callable[..., Array], message: str, x: Array, *others: Array) -> None:
    """Raise unless `ok(x, *others)`, a boolean array of x's shape made with operators only, is true everywhere.

    `message` is the sentence; `{found}` in it becomes the first value of x that is not ok.

    Raises:
      ValueError: all arrays are known, and a value is not ok.
      checkify.JaxRuntimeError: from the `throw` of a checkified function that was traced inside `debug_checks`.
    """
    arrays = (x, *others)
    if 0 in x.shape:
        return
    if not any(isinstance(a, jax.core.Tracer) for a in arrays):
        known = [np.asarray(a) for a in arrays]
        fine = ok(*known)
        if not fine.all():
            raise ValueError(message.format(found=known[0][~fine][0]))
    elif _debug.value:
        fine = ok(*arrays)
        checkify.check(jnp.all(fine), message, found=x.reshape(-1)[jnp.argmin(fine.reshape(-1))])
