"""The training job as a record: what `configs/run/*.gin` fills in."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from lcjax.checkpoint.manifest import Sections, describe
from lcjax.data.ranking import RankingData
from lcjax.data.spec import DataSpec
from lcjax.methods.base import Method, adapt_job, adapt_model, adapt_pretrained
from lcjax.models.spec import ModelSpec
from lcjax.parallel.mesh import MeshSpec
from lcjax.positions.sampling import Sampler
from lcjax.serve.sampling import Sampling
from lcjax.serve.source import Pretrained
from lcjax.train.losses import CrossEntropy, Loss
from lcjax.train.optimizers import Optimizer
from lcjax.train.step import StepOptions


@dataclass(frozen=True)
class Checkpoints:
    """A checkpoint every `every` steps, at the end, and when a signal asks for it.

    keep: finished steps that stay (None: all). accept: manifest sections that may differ from the checkpoint's.
    """

    every: int = 1000
    keep: int | None = 3
    accept: tuple[str, ...] = ()

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1 step")


@dataclass(frozen=True)
class Reports:
    """A metrics line every `every` steps; a device profile of `profile_steps` steps from step `profile_start` on.

    hang_seconds: the run ends, naming the line that each process is at, when no step was finished for so long.
    """

    every: int = 10
    tensorboard: bool = True
    profile_start: int = 0
    profile_steps: int = 0
    hang_seconds: float | None = 1800.0

    def __post_init__(self):
        if self.hang_seconds is not None and self.hang_seconds <= 0:
            raise ValueError(f"hang_seconds is {self.hang_seconds}; it must be positive, or None to wait forever")
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1 step")


@dataclass(frozen=True)
class Sample:
    """Text decoded from the trained model at the end of the run."""

    prompts: tuple[str, ...]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Stage:
    """One stage of a job, written to the folder `name`: what is given replaces the job's own setting, None keeps it.

    The first stage starts from the job's model, each later one from the result of the stage before; with `keep_moments`
    from its optimiser's moments too (`Train.moments`).
    """

    name: str
    methods: tuple[Method, ...] = ()
    steps: int | None = None
    optimizer: Optimizer | None = None
    loss: Loss | None = None
    data: DataSpec | RankingData | None = None
    batch: int | None = None
    length: int | None = None
    positions: Sampler | None = None
    trainable: tuple[str, ...] | None = None
    keep_moments: bool = False


@dataclass(frozen=True)
class Train:
    """Training of one decoder on one stream of batches.

    model: a spec, trained from scratch, or a pretrained model to start from. methods: what is changed about it; new
    parameters are drawn at random. trainable: regular expressions on dotted parameter paths; the others are frozen
    (none: all are trained, or what the methods say).
    batch: rows of one update, over all processes and micro-batches. length: tokens of a row.
    tokenizer: by default the pretrained model's, or bytes. stages: runs one after the other instead of a single one.
    abort_after: updates in a row that may be skipped for not being finite before the run stops.
    moments: the folder of a run; this one starts with its parameters and optimiser moments, to the bit, instead of
    those of `model` and zeros. Both train the same parameters. The schedule begins anew.
    positions: how rows get their rotary positions (None: tokens since the document's start).
    step_methods: what else is changed about the model in training steps only; they may add no parameters. Saved,
    sampled and evaluated is the model without them.
    """

    model: ModelSpec | Pretrained
    data: DataSpec | RankingData
    optimizer: Optimizer
    steps: int
    batch: int
    length: int
    methods: tuple[Method, ...] = ()
    stages: tuple[Stage, ...] = ()
    trainable: tuple[str, ...] = ()
    tokenizer: str | None = None
    positions: Sampler | None = None
    step_methods: tuple[Method, ...] = ()
    moments: str | None = None
    loss: Loss = field(default_factory=CrossEntropy)
    options: StepOptions = field(default_factory=StepOptions)
    mesh: MeshSpec = field(default_factory=MeshSpec)
    checkpoints: Checkpoints = Checkpoints()
    reports: Reports = Reports()
    sample: Sample | None = None
    seed: int = 0
    abort_after: int = 5

    def __post_init__(self):
        for name in ("steps", "batch", "length", "abort_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        names = [stage.name for stage in self.stages]
        if len({*names}) < len(names):
            raise ValueError(f"stages are named {names}: give each its own name")
        if self.stages and self.stages[0].keep_moments:
            raise ValueError(f"stage {names[0]!r} keeps moments, and none comes before it: set it on a later stage")
        if isinstance(self.model, ModelSpec) and self.length > self.model.max_length:
            raise ValueError(
                f"length {self.length} is more than ModelSpec.max_length {self.model.max_length}; "
                "raise max_length to train longer"
            )
        if self.batch % self.options.accumulate:
            raise ValueError(
                f"batch {self.batch} does not divide into {self.options.accumulate} micro-batches "
                "(StepOptions.accumulate)"
            )

    @property
    def spec(self) -> ModelSpec:
        """The model's spec, of a resolved job."""
        if not isinstance(self.model, ModelSpec):
            raise ValueError("the job's model is not read yet: call Train.resolve first")
        return self.model

    @property
    def step_spec(self) -> ModelSpec:
        """The spec that training steps run, of a resolved job."""
        return adapt_model(self.step_methods, self.spec)

    def runs(self, output: Path) -> Iterator[tuple["Train", Path]]:
        """The job and folder of every stage, in order; of a job without stages, itself."""
        if not self.stages:
            yield self, output
        before: dict[str, Any] = {}  # what the stage before leaves
        for stage in self.stages:
            changed = {f.name: getattr(stage, f.name) for f in fields(stage) if f.name not in ("name", "keep_moments")}
            given = {name: value for name, value in changed.items() if value is not None}
            if before:
                before["moments"] = before["model"].source if stage.keep_moments else None
            yield replace(self, stages=(), **given, **before), output / stage.name
            before["model"] = Pretrained(str(output / stage.name), self.model.dtype)

    def resolve(self) -> tuple["Train", nnx.State | None]:
        """The job with its model's spec under all methods, and the weights to start from (None: from scratch)."""
        if isinstance(self.model, ModelSpec):
            spec, weights, tokenizer = self.model, None, "bytes"
        else:
            read = self.model.read()
            spec, weights, tokenizer = read.spec, read.params, read.tokenizer_source
        # First, since a method may lengthen the context.
        spec = adapt_model(self.methods, spec) if weights is None else adapt_pretrained(self.methods, spec, weights)
        job = replace(self, model=spec, tokenizer=self.tokenizer or tokenizer, methods=(), trainable=())
        job = adapt_job(self.methods, job)
        return replace(job, trainable=self.trainable or job.trainable), weights

    def check_mesh(self, mesh: Mesh) -> None:
        """Raise ValueError when rows or tokens don't divide over the mesh."""
        data, fsdp, context = (mesh.shape[axis] for axis in ("data", "fsdp", "context"))
        parts = data * fsdp * self.options.accumulate
        if self.batch % parts:
            raise ValueError(
                f"batch {self.batch} does not divide over data={data} x fsdp={fsdp} devices "
                f"and {self.options.accumulate} micro-batches: make it a multiple of {parts}"
            )
        if self.length % context:
            raise ValueError(
                f"length {self.length} does not divide over the mesh axis context={context}: use a multiple, "
                f"such as {math.ceil(self.length / context) * context}"
            )

    def sections(self, mesh: Mesh, tokenizer: str, stream: str) -> Sections:
        """What two runs must have in common to share checkpoints; `tokenizer` and `stream` are fingerprints."""
        data = {k: v for k, v in describe(self.data).items() if k not in ("data_dir", "prefetch")}
        trained: dict[str, Any] = {"trainable": list(self.trainable)} if self.trainable else {}
        trained |= {"moments": "kept"} if self.moments is not None else {}
        return {
            "model": describe(self.model),
            "optimizer": {**describe(self.optimizer), "schedule_steps": self.steps, **trained},
            "loss": self.loss.describe(),
            "step_methods": describe(self.step_methods),
            "data": {**data, "batch": self.batch, "length": self.length, "stream": stream},
            "tokenizer": tokenizer,
            "about": {"tokenizer": self.tokenizer},
            "positions": describe(self.positions),
            "seed": self.seed,
            "mesh": ", ".join(f"{axis}={degree}" for axis, degree in mesh.shape.items()),
        }
