"""Distilling a model into linear attention on short rows, and how far it then finds a pass key.

The parts of `benchmarks.lawcat_passkey` that need arrays only: rows to train on, questions, stages, scores.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from lcjax.cache import init_caches
from lcjax.methods import Lora, Method, adapt_model
from lcjax.methods.linearize import STUDENT
from lcjax.methods.lora import merge
from lcjax.models.decoder import abstract
from lcjax.models.spec import Attention, ModelSpec
from lcjax.models.stack import fold
from lcjax.positions.sampling import Sampler
from lcjax.train.losses import CrossEntropy, Loss
from lcjax.train.optimizers import AdamW, Cosine
from lcjax.train.state import Start
from lcjax.train.step import StepOptions, make_step
from lcjax.train.transfer import AttentionTransfer

CHUNK = 2048  # tokens of a question read at a time
TOGETHER = 25  # questions read side by side


class Texts(NamedTuple):
    """Training rows, `{field: [N,T]}`, and questions `{length: [Q,n]}` that end in `answer` tokens of answer."""

    rows: dict[str, np.ndarray]
    questions: dict[int, np.ndarray]
    answer: int

    def save(self, path: Path) -> None:
        """To one compressed file."""
        arrays: dict[str, Any] = {f"rows_{name}": array for name, array in self.rows.items()}
        arrays |= {f"questions_{length}": array for length, array in self.questions.items()}
        np.savez_compressed(path, answer=np.asarray(self.answer), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Texts":
        """From the file that `save` wrote."""
        stored = np.load(path)
        rows = {name.removeprefix("rows_"): stored[name] for name in stored if name.startswith("rows_")}
        questions = {int(name.split("_")[1]): stored[name] for name in stored if name.startswith("questions_")}
        return cls(rows, dict(sorted(questions.items())), int(stored["answer"]))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows an update, updates of the two stages and their peak rates. full: finetune every weight, not adapters.

    sampler: of the positions of finetuning; None: those of the rows.
    """

    batch: int = 32
    transfer_steps: int = 400
    finetune_steps: int = 600
    transfer_peak: float = 1e-2
    finetune_peak: float = 1e-3
    rank: int = 16
    full: bool = False
    scan: bool = True
    sampler: Sampler | None = None

    @property
    def tuned(self) -> tuple[str, ...]:
        """Parameters of the second stage: adapters and what the linear layers added, or everything."""
        return () if self.full else (r"\.adapter\.", *STUDENT)


class Model(NamedTuple):
    """A spec and its parameters."""

    spec: ModelSpec
    params: nnx.State


def distil(
    teacher: Model, method: Method, rows: Mapping[str, np.ndarray], plan: Plan, tell: Callable[[str], None] = print
) -> tuple[Model, dict[str, Any]]:
    """Attention transfer, then finetuning; the merged model, and losses and seconds of both stages."""
    spec = adapt_model([method], teacher.spec)
    report: dict[str, Any] = {}
    optimizer = AdamW(Cosine(plan.transfer_peak, warmup=min(20, plan.transfer_steps // 4)), weight_decay=0.0)
    start = Start(spec, optimizer.build(plan.transfer_steps), 0, STUDENT, teacher.params)
    params, report["transfer"] = _stage("transfer", start, optimizer, AttentionTransfer(), rows, plan, tell)
    lora = Lora(plan.rank, 2.0 * plan.rank) if not plan.full else Lora(0)
    adapted = adapt_model([lora], spec)
    optimizer = AdamW(Cosine(plan.finetune_peak, warmup=min(50, plan.finetune_steps // 4)), weight_decay=0.0)
    start = Start(adapted, optimizer.build(plan.finetune_steps), 1, plan.tuned, params)
    params, report["finetune"] = _stage("finetune", start, optimizer, CrossEntropy(), rows, plan, tell)
    return Model(*merge(adapted, params)), report


def _stage(
    name: str,
    start: Start,
    optimizer: AdamW,
    loss: Loss,
    rows: Mapping[str, np.ndarray],
    plan: Plan,
    tell: Callable[[str], None],
) -> tuple[nnx.State, dict[str, Any]]:
    """Train from `start`; the parameters, and what the stage reports."""
    steps = plan.transfer_steps if name == "transfer" else plan.finetune_steps
    options = StepOptions(scan=plan.scan, remat="full" if name == "finetune" else "none")
    schedule = optimizer.schedule.build(steps)
    step = make_step(abstract(start.spec)[0], start.optimizer, schedule, loss, options, start.trainable)
    state, compiled = start.state(), jax.jit(step, donate_argnums=0)
    order = np.random.default_rng(start.seed)
    count = len(rows["inputs"])
    found, began = [], time.perf_counter()
    for i in range(steps):
        chosen = np.sort(order.choice(count, plan.batch, replace=False))
        batch = {field: array[chosen] for field, array in rows.items()}
        if name == "finetune" and plan.sampler is not None:
            batch["positions"] = plan.sampler.positions(batch["inputs"], batch["segment_ids"], start.seed, i, 0)
        state, metrics = compiled(state, jax.tree.map(jnp.asarray, batch))
        found.append(metrics["loss"])
        if i in (0, steps - 1) or (i + 1) % 50 == 0:
            tell(f"{name} {i + 1}/{steps}: loss {float(found[-1]):.4f}, {time.perf_counter() - began:.0f} s")
    losses = np.asarray(jax.device_get(found), np.float64)
    report = {
        "steps": steps,
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-20:].mean()),
        "seconds": round(time.perf_counter() - began, 1),
        "skipped": int(state.skipped),
    }
    layers = {key: float(value) for key, value in metrics.items() if key.startswith("mse_")}
    return state.params, report | ({"layers": layers} if layers else {})


def accuracy(model: Model, questions: Mapping[int, np.ndarray], answer: int) -> dict[str, float]:
    """Share of the questions of each length whose answer tokens would all be chosen, one after the other."""
    table = {}
    for length, rows in questions.items():
        table[str(length)] = float(np.mean(found(model, rows, answer)))
        print(f"{length:,} tokens: {table[str(length)]:.2f}", flush=True)
    return table


def found(model: Model, rows: np.ndarray, answer: int) -> np.ndarray:
    """Whether each of the `[Q,n]` questions is answered, bool `[Q]`.

    Greedy decoding gives the whole answer just when every answer token is the likeliest given those before it.
    """
    hits = []
    for begin in range(0, len(rows), TOGETHER):
        mine = rows[begin : begin + TOGETHER]
        padded = np.concatenate([mine, np.repeat(mine[-1:], TOGETHER - len(mine), axis=0)])
        hits.append(_read(model, padded, answer)[: len(mine)])
    return np.concatenate(hits)


def _read(model: Model, rows: np.ndarray, answer: int) -> np.ndarray:
    """Read all but the answer in chunks, then the answer's tokens in one."""
    graphdef, _ = abstract(model.spec)
    body = rows[:, : -answer - 1]
    capacity = -(-rows.shape[1] // CHUNK) * CHUNK + CHUNK
    caches = init_caches(model.spec, len(rows), capacity)
    # Lengths as device arrays from the start: the first chunk then runs the program of the others.
    caches = jax.tree.map(jnp.asarray, caches)
    for begin in range(0, body.shape[1], CHUNK):
        piece = body[:, begin : begin + CHUNK]
        valid = np.broadcast_to(np.arange(CHUNK) < piece.shape[1], (len(rows), CHUNK))
        chunk = np.pad(piece, ((0, 0), (0, CHUNK - piece.shape[1])))
        _, caches = _advance(graphdef)(model.params, jnp.asarray(chunk), caches, jnp.asarray(valid))
    last = rows[:, -answer - 1 : -1]
    hidden, _ = _advance(graphdef)(model.params, jnp.asarray(last), caches, jnp.ones(last.shape, bool))
    chosen = np.asarray(_choose(graphdef)(model.params, hidden))
    return (chosen == rows[:, -answer:]).all(axis=1)


@functools.lru_cache(maxsize=8)
def _advance(graphdef: Any) -> Any:
    """One chunk through all layers; layers of one kind share a program, so it compiles as fast as one of each."""

    def advance(params: nnx.State, tokens: Array, caches: tuple[Any, ...], valid: Array) -> tuple[Array, tuple]:
        decoder = nnx.merge(graphdef, params)
        start = caches[0].length[:, None]
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        context = decoder.context(positions, start, None, valid)

        def body(kind: Any, state: Any, x: Array) -> tuple[Array, Any]:
            return nnx.merge(kind, state[0])(x, context, state[1])

        parts = [nnx.split(block) for block in decoder.layers]
        states = [(state, cache) for (_, state), cache in zip(parts, caches, strict=True)]
        x, new = fold([kind for kind, _ in parts], states, body, decoder.embedded(tokens), scan=True)
        return decoder.norm(x), tuple(new)

    return jax.jit(advance, donate_argnums=2)


@functools.lru_cache(maxsize=8)
def _choose(graphdef: Any) -> Any:
    """The likeliest next token after each state."""
    return jax.jit(lambda params, x: jnp.argmax(nnx.merge(graphdef, params).logits(x), axis=-1))


def softmax_layers(spec: ModelSpec) -> int:
    """Layers whose cache grows with the text."""
    return sum(isinstance(mixer, Attention) and mixer.window is None for mixer in spec.layers)
