"""Copy recall by teacher forcing: how well a model predicts a passage that it has read once, far back."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcjax.cache import init_caches
from lcjax.eval.measure import Table
from lcjax.eval.metrics.statistics import bootstrap_interval
from lcjax.eval.tasks.copy_recall import SCORED, plants
from lcjax.models.decoder import abstract
from lcjax.models.spec import Attention, ModelSpec
from lcjax.serve.source import Loaded


@dataclass(frozen=True)
class CopyRecallProbe:
    """Mean loss (nats) and top-1 share over the 48 copied tokens, `count` plants a length.

    filler, passages: texts as in `read_text`; give two different ones. lost: also score the same plants with every full
    layer cut to `lost_sink` sinks and a window of `lost_window`: the loss of a model that cannot see the passage.
    """

    filler: str
    passages: str = "python"
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    count: int = 20
    depth: float = 0.25
    seed: int = 0
    batch: int = 4
    chunk: int = 512
    lost: bool = True
    lost_sink: int = 16
    lost_window: int = 512
    name: str = "copy_recall"

    def __post_init__(self):
        if self.count < 1 or self.batch < 1 or self.chunk < 1 or not self.lengths:
            raise ValueError(f"{self.name}: count, batch and chunk must be positive, lengths must name something")

    def run(self, model: Loaded, output: Path) -> dict[str, Table]:
        """{name_nll, name_top1} by length, and the same of the model that cannot see far under name_lost_*.

        {name}.jsonl has every plant, and the means with their 95 % bootstrap intervals.
        """
        forms = {"": model}
        if self.lost:
            forms["_lost"] = cut_off(model, self.lost_sink, self.lost_window)
        tables: dict[str, dict[str, float]] = {}
        with (output / f"{self.name}.jsonl").open("w", encoding="utf-8") as file:
            for length in self.lengths:
                rows = plants(
                    model.tokenizer,
                    length,
                    count=self.count,
                    filler=self.filler,
                    passages=self.passages,
                    depth=self.depth,
                    seed=self.seed,
                )
                for form, loaded in forms.items():
                    nll, hits = self._score(loaded, rows)
                    for kind, values in (("nll", nll), ("top1", hits)):
                        each = values.mean(axis=1).tolist()
                        mean, low, high, _ = found = bootstrap_interval(each)
                        table = f"{self.name}{form}_{kind}"
                        tables.setdefault(table, {})[str(length)] = mean
                        row = {"length": length, "kind": kind, "form": form, **found._asdict(), "plants": each}
                        file.write(json.dumps(row) + "\n")
                        print(f"{table} at {length:,}: {mean:.3f} [{low:.3f}, {high:.3f}]", flush=True)
        return dict(tables)

    def _score(self, model: Loaded, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss and hits [count, 48]; the last batch is filled up with repeats."""
        found = []
        for begin in range(0, len(rows), self.batch):
            mine = rows[begin : begin + self.batch]
            filled = np.concatenate([mine, np.repeat(mine[-1:], self.batch - len(mine), axis=0)])
            found.append(
                [values[: len(mine)] for values in score_tail(model, filled, SCORED, self.chunk, max(self.lengths))]
            )
        nll, hits = (np.concatenate(values) for values in zip(*found, strict=True))
        return nll, hits


def cut_off(model: Loaded, sink: int, window: int) -> Loaded:
    """The same weights with every full attention layer seeing `sink` first and `window` last tokens only."""

    def near(mixer: Any) -> Any:
        if isinstance(mixer, Attention) and mixer.window is None:
            return replace(mixer, window=window, sink=sink, pattern=None)
        return mixer

    spec: ModelSpec = replace(model.spec, pattern=tuple(map(near, model.spec.pattern)))
    return model._replace(graphdef=abstract(spec)[0], spec=spec)


def score_tail(model: Loaded, rows: np.ndarray, tail: int, chunk: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """rows [B, N] of tokens -> loss and top-1 hits [B, tail] of the last `tail` tokens, each given all before it.

    `longest` is the largest N of the run: one program reads rows of every length.
    """
    inputs = rows[:, :-1].astype(np.int32)
    batch, count = inputs.shape
    first = -count % chunk
    capacity = -(-longest // chunk) * chunk
    model = model.at(capacity)
    caches = init_caches(model.spec, batch, capacity)
    read, finish = _programs(model.graphdef, tail)
    # The first chunk is the short one, so that the last chunk is whole and holds the tail.
    pieces = [inputs[:, : chunk - first]] if first else []
    begin = chunk - first if first else 0
    pieces += [inputs[:, at : at + chunk] for at in range(begin, count, chunk)]
    hidden: list[Any] = []
    for piece in pieces:
        whole = np.pad(piece, ((0, 0), (0, chunk - piece.shape[1])))
        valid = np.broadcast_to(np.arange(chunk) < piece.shape[1], whole.shape)
        states, caches = read(model.params, caches, whole, valid)
        hidden = [*hidden, states[:, : piece.shape[1]]][-(1 + -(-tail // chunk)) :]
    nll, hits = finish(model.params, jnp.concatenate(hidden, axis=1)[:, -tail:], rows[:, -tail:].astype(np.int32))
    return np.asarray(nll, np.float64), np.asarray(hits, np.float64)


@functools.lru_cache(maxsize=8)
def _programs(graphdef: Any, tail: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def read(
        params: Any, caches: tuple[Any, ...], tokens: Int[Array, "B C"], valid: Bool[Array, "B C"]
    ) -> tuple[Float[Array, "B C width"], Any]:
        return nnx.merge(graphdef, params).hidden(tokens, caches=caches, valid=valid)

    def finish(params: Any, hidden: Float[Array, "B T width"], targets: Int[Array, "B T"]) -> tuple[Array, Array]:
        logits = nnx.merge(graphdef, params).logits(hidden)
        right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - right, jnp.argmax(logits, axis=-1) == targets

    return jax.jit(read, donate_argnums=1), jax.jit(finish)
