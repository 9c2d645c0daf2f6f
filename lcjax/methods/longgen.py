"""LongGen: most layers become sparse while the context is extended (arXiv 2410.01485)."""

from dataclasses import dataclass, replace

from lcjax.methods.base import Method, check_unwritten
from lcjax.models.family import period
from lcjax.models.patterns import Pattern, Spans, Strided
from lcjax.models.spec import ModelSpec

LAYERS = ("sandwich", "interleaved")


@dataclass(frozen=True)
class LongGen(Method):
    """`full` layers keep full attention; the others read a window and sinks, or strided blocks. All is then trained.

    full: how many layers stay full; None: a third of them, rounded. layers: where they lie, 'sandwich', together in
    the middle (the paper's), 'interleaved', one at the end of each of `full` equal stretches, or the full layers
    themselves, counted from 0, with `full` unset. sink, window: what the other layers read. strided: what they read
    instead, with window None. Positions change as `Positions` says, in sparse layers too. With as many full layers as
    the model has, this is the identity.
    """

    full: int | None = None
    layers: str | tuple[int, ...] = "sandwich"
    sink: int = 64
    window: int | None = 960
    strided: Strided | None = None

    def __post_init__(self):
        if isinstance(self.layers, str) and self.layers not in LAYERS:
            raise ValueError(
                f"LongGen.layers is {self.layers!r}; choose one of {', '.join(map(repr, LAYERS))}, or name the full "
                "layers, such as (2, 3)"
            )
        if not isinstance(self.layers, str) and self.full is not None:
            raise ValueError(f"LongGen.full is {self.full} and LongGen.layers names the full layers: keep one of them")
        if (self.window is None) == (self.strided is None):
            raise ValueError(
                f"LongGen.window is {self.window} and LongGen.strided {self.strided}: give one of the two and set the "
                "other to None"
            )

    def model(self, spec: ModelSpec) -> ModelSpec:
        full, mixers = self.full_layers(spec.num_layers), list(spec.layers)
        for i in set(range(spec.num_layers)) - full:
            mixers[i] = replace(check_unwritten(self, i, mixers[i]), pattern=self._pattern(spec))
        return replace(spec, pattern=period(tuple(mixers)))

    def full_layers(self, num_layers: int) -> set[int]:
        """The layers that stay full."""
        if not isinstance(self.layers, str):
            if bad := [i for i in self.layers if not 0 <= i < num_layers]:
                raise ValueError(f"LongGen.layers has {bad[0]}, but the model has the layers 0 to {num_layers - 1}")
            return set(self.layers)
        full = round(num_layers / 3) if self.full is None else self.full
        if not 0 <= full <= num_layers:
            raise ValueError(f"LongGen.full is {full}; the model has {num_layers} layers")
        if self.layers == "interleaved":
            return {(n + 1) * num_layers // full - 1 for n in range(full)}
        first = (num_layers - full) // 2
        return set(range(first, first + full))

    def _pattern(self, spec: ModelSpec) -> Pattern:
        if self.strided is not None:
            return self.strided
        return Spans((self.sink,) * spec.num_kv_heads, (self.window,) * spec.num_kv_heads)
