"""What a long-context method is, and how several of them combine."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from lcjax.models.spec import Attention, Mixer, ModelSpec

if TYPE_CHECKING:
    from lcjax.train.job import Train

SAMPLED, ALIKE = 64, 0.9


class MethodConflict(ValueError):
    """Two methods write one field."""


@dataclass(frozen=True)
class Method:
    """Base of the methods: a frozen dataclass that overrides one or both hooks.

    Both return a changed copy (`dataclasses.replace`). Some setting of every method, named in its docstring, is the
    identity: there both hooks return what they were given. Parameters that the changed model adds start from their own
    initial values; those that keep their path keep their weights (`lcjax.methods.weights`).
    """

    def model(self, spec: ModelSpec) -> ModelSpec:
        """The model under this method."""
        return spec

    def recipe(self, job: "Train") -> "Train":
        """The training job under this method: which weights are trained, the loss, the data."""
        return job

    def check(self, params: nnx.State) -> None:
        """Raises ValueError where the method was made for other weights than `params`, a pretrained model's."""


def adapt_model(methods: Sequence[Method], spec: ModelSpec) -> ModelSpec:
    """`spec` under all methods, in order. Raises MethodConflict when two of them write one field."""
    return _fold(methods, spec, lambda method: method.model)


def adapt_pretrained(methods: Sequence[Method], spec: ModelSpec, params: nnx.State) -> ModelSpec:
    """As `adapt_model`, for a model with weights. Raises ValueError when a method was made for others."""
    adapted = adapt_model(methods, spec)
    for method in methods:
        method.check(params)
    return adapted


def adapt_job(methods: Sequence[Method], job: "Train") -> "Train":
    """`job` under all methods' recipes, in order. Raises MethodConflict when two of them write one field."""
    return _fold(methods, job, lambda method: method.recipe)


def _fold(methods: Sequence[Method], value: Any, hook: Callable[[Method], Callable[[Any], Any]]) -> Any:
    writer: dict[str, Method] = {}
    for method in methods:
        new = hook(method)(value)
        for name in changes(value, new):
            for earlier, other in writer.items():
                if _overlap(name, earlier):
                    raise MethodConflict(
                        f"{type(other).__name__} and {type(method).__name__} both write {max(name, earlier, key=len)}: "
                        "keep one of them, or let them act on different layers"
                    )
        writer |= dict.fromkeys(changes(value, new), method)
        value = new
    return value


def changes(before: Any, after: Any, name: str = "") -> list[str]:
    """Dotted names of the fields that differ, as deep as both sides have the same type and size.

    A model's mixers are named by layer (`layers.3.window`), whatever its pattern's period is.
    """
    if type(before) is type(after) and is_dataclass(before):
        pairs = [(key, getattr(before, key), getattr(after, key)) for key in _names(before)]
    elif isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        pairs = [(str(i), *both) for i, both in enumerate(zip(before, after, strict=True))]
    else:
        return [] if before == after else [name]
    return [found for key, old, new in pairs for found in changes(old, new, f"{name}.{key}".lstrip("."))]


def check_unwritten(method: Method, layer: int, mixer: Mixer) -> Attention:
    """The layer, if it is full attention that a method may give a pattern. Raises ValueError, or where it has a pattern
    already MethodConflict."""
    name = type(method).__name__
    if not isinstance(mixer, Attention) or mixer.window is not None:
        raise ValueError(f"{name} gives layer {layer} a pattern, which is {mixer} and not full attention")
    if mixer.pattern is not None:
        raise MethodConflict(
            f"{name} and a method before it, or the model, both write layers.{layer}.pattern, which is "
            f"{mixer.pattern}: keep one of them, or let them act on different layers"
        )
    return mixer


def identity_of(spec: ModelSpec, params: nnx.State) -> dict[str, Any]:
    """What a plan for a model's heads belongs to, as JSON: the sizes, and some numbers of its embedding table."""
    return {**_sizes(spec), "embedding": _sample(params)}


def check_made_for(setting: str, plan: Any, spec: ModelSpec) -> None:
    """Raise ValueError for a plan of other sizes; it holds its model's identity as `model`, and its name as `source`.

    setting: the plan as a configuration names it.
    """
    for name, wanted in _sizes(spec).items():
        if plan.model.get(name) != wanted:
            raise ValueError(
                f"{setting} was made for {plan.source!r} with {name}={plan.model.get(name)}, and {spec.name!r} has "
                f"{name}={wanted}: make a plan for this model"
            )


def check_weights(setting: str, plan: Any, params: nnx.State) -> None:
    """Raise ValueError for a plan of another model of the same sizes.

    Rounding, to 4 bits too, and further training keep the numbers of the embedding table alike; those of two models
    that were trained apart are not correlated.
    """
    held, found = (np.array(numbers, np.float64) for numbers in (plan.model.get("embedding", ()), _sample(params)))
    if held.shape != found.shape or held @ found < ALIKE * np.linalg.norm(held) * np.linalg.norm(found):
        raise ValueError(
            f"{setting} was made for {plan.source!r}, and this model has the same sizes but other weights: make a plan "
            "for this model"
        )


def _sizes(spec: ModelSpec) -> dict[str, int]:
    names = ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    return {name: getattr(spec, name) for name in names}


def _sample(params: nnx.State) -> list[float]:
    """Numbers from even distances in the embedding table."""
    table: Any = params["embed"]["table"][...]
    places = np.unravel_index(np.linspace(0, table.size - 1, SAMPLED, dtype=np.int64), table.shape)
    return np.asarray(table[places], np.float64).tolist()


def _names(record: Any) -> Iterable[str]:
    names = [field.name for field in fields(record)]
    return [("layers" if name == "pattern" else name) for name in names] if isinstance(record, ModelSpec) else names


def _overlap(one: str, other: str) -> bool:
    short, long = sorted((one.split("."), other.split(".")), key=len)
    return long[: len(short)] == short
