"""How gradients pass through linear recurrences: the exact adjoint, or a cheaper one that is not the true gradient."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import jax

Mode = Literal["exact", "truncated", "layer_local"]


@dataclass(frozen=True)
class Adjoint:
    """Adjoint sharding of recurrent layers (arXiv 2501.00692).

    exact: the true gradient. The adjoint of a linear recurrence is a recurrence of its own, run backwards over
      chunk-entry states and, where the sequence is split over the mesh, passed from shard to shard.
    truncated: **not the true gradient.** States older than one to two windows count as constants, so nothing is carried
      backwards over the sequence. The bias is about `exp(window * mean log-decay)`: large for gates near 1.
    layer_local: **not the true gradient** but of a layer by itself (the paper's stack of layers): what a recurrent
      layer reads counts as a constant, so earlier layers learn through the residual stream alone. On random stacks of
      three layers the first one's gradient had a cosine of -0.1 with the true one.

    window: tokens, a divisor of a shard's length; for 'truncated'.
    """

    mode: Mode = "exact"
    window: int | None = None

    def __post_init__(self):
        if (self.mode == "truncated") != (self.window is not None):
            need = "needs a window, in tokens" if self.mode == "truncated" else "takes no window"
            raise ValueError(f"adjoint mode {self.mode!r} with window={self.window}: this mode {need}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"adjoint window is {self.window}: it must be at least 1 token")

    @property
    def warning(self) -> str | None:
        """What a run has to say about its gradient; None for the true one."""
        if self.mode == "truncated":
            return (
                f"gradients through recurrent layers are truncated: they look back {self.window} to "
                f"{2 * (self.window or 0)} tokens and are not the true gradient (Adjoint.mode = 'truncated')"
            )
        if self.mode == "layer_local":
            return (
                "gradients stop at what each recurrent layer reads and are not the true gradient "
                "(Adjoint.mode = 'layer_local')"
            )
        return None


_adjoint = jax.make_user_context(default_value=Adjoint())


def adjoint() -> Adjoint:
    """The mode under which recurrences are being traced."""
    return _adjoint.value


def through_recurrences(mode: Adjoint) -> AbstractContextManager[None]:
    """Trace recurrent layers with this gradient."""
    return _adjoint(mode)
