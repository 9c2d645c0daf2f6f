"""Weights of the layers that one scan runs, as one array each.

While a model is trained its state lies like that: the step then has one update a kind of weight, not one a layer, and
takes a fraction of the time to compile. Checkpoints and decoding take weights layer by layer. Inside the step
`unstacked` is a view, for the compiler cancels it against the stacking that the scan does.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcjax.models.decoder import Decoder
from lcjax.models.spec import ModelSpec
from lcjax.models.stack import scanned

type Path = tuple[Any, ...]
type Stacks = tuple[tuple[Path, ...], ...]
"""Groups of paths of weights that become one array, stored at the path of the first."""

LAYERS = "layers"
"""Where a decoder's layers are, the logical axis over them, and the metadata that names those of a stacked weight."""

_join = jax.jit(lambda *layers: jnp.stack(layers))
_cut = jax.jit(lambda stack: [jax.lax.index_in_dim(stack, n, keepdims=False) for n in range(stack.shape[0])])


def stacks(spec: ModelSpec, *parts: nnx.State) -> Stacks:
    """What to stack of a model whose layers are scanned: weights that the same part of its parameters has."""
    model = nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0)))
    groups = scanned([nnx.split(block)[0] for block in model.layers])
    found: list[tuple[Path, ...]] = []
    for part in parts:
        paths = [path for path, _ in nnx.to_flat_state(part)]
        for group in groups:
            firsts = [path for path in paths if path[:2] == (LAYERS, group[0])]
            alike = [tuple((LAYERS, layer, *first[2:]) for layer in group) for first in firsts]
            found += [members for members in alike if set(members) <= set(paths)]
    return tuple(found)


def stacked[T](tree: T, groups: Stacks) -> T:
    """The tree with every `nnx.State` of parameters in it, such as an optimiser's moments, stacked."""

    def one(state: nnx.State) -> nnx.State:
        flat = dict(nnx.to_flat_state(state))
        for members in groups:
            if members[0] in flat:
                layers = [flat.pop(path) for path in members]
                metadata = {LAYERS: tuple(path[1] for path in members), "axes": (LAYERS, *layers[0].axes)}
                flat[members[0]] = layers[0].replace(_join(*(layer[...] for layer in layers)), **metadata)
        return nnx.from_flat_state(flat)

    return _on_states(one, tree)


def unstacked[T](tree: T) -> T:
    """The tree with every weight at the path of its own layer again."""

    def one(state: nnx.State) -> nnx.State:
        flat = dict(nnx.to_flat_state(state))
        for members in _held(state):
            stack = flat.pop(members[0])
            metadata = stack.get_metadata() | {"axes": stack.axes[1:]}
            del metadata[LAYERS]
            for path, layer in zip(members, _cut(stack[...]), strict=True):
                flat[path] = type(stack).from_metadata(layer, metadata)
        return nnx.from_flat_state(flat)

    return _on_states(one, tree)


def stacked_like[T](tree: T, like: nnx.State) -> T:
    """The tree with its `nnx.State`s stacked as the weights of `like` are."""
    return stacked(tree, _held(like))


def names(path: Any, weight: Any) -> list[str]:
    """`layers/3/mlp/gate/kernel` of every weight in a leaf of a tree of parameters."""
    first = jax.tree_util.keystr(path, simple=True, separator="/")
    if (layers := _layers(weight)) is None:
        return [first]
    _, _, tail = first.split("/", 2)
    return [f"{LAYERS}/{layer}/{tail}" for layer in layers]


def rank(weight: Any) -> int:
    """Dimensions of one layer's weight."""
    return weight.ndim - (_layers(weight) is not None)


def _held(state: nnx.State) -> Stacks:
    flat = [(path, _layers(weight)) for path, weight in nnx.to_flat_state(state)]
    return tuple(tuple((LAYERS, n, *path[2:]) for n in layers) for path, layers in flat if layers is not None)


def _layers(weight: Any) -> tuple[int, ...] | None:
    return weight.get_metadata(LAYERS, None) if isinstance(weight, nnx.Variable) else None


def _on_states(function: Callable[[nnx.State], nnx.State], tree: Any) -> Any:
    is_state = lambda node: isinstance(node, nnx.State)
    return jax.tree.map(lambda node: function(node) if is_state(node) else node, tree, is_leaf=is_state)
