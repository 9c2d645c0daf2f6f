"""The training job as a record: what `configs/run/*.gin` fills in."""

import math
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh

from lcjax.checkpoint.manifest import Sections, describe
from lcjax.data.spec import DataSpec
from lcjax.models.spec import ModelSpec
from lcjax.parallel.mesh import make_mesh
from lcjax.positions.sampling import Sampler
from lcjax.serve.sampling import Sampling
from lcjax.serve.source import Pretrained
from lcjax.train.losses import CrossEntropy
from lcjax.train.optimizers import Optimizer
from lcjax.train.step import StepOptions


@dataclass(frozen=True)
class MeshSpec:
    """Degrees of the mesh axes; -1 takes the devices that are left."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1

    def build(self) -> Mesh:
        return make_mesh(self.data, self.fsdp, self.context, self.tensor)


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
    """A metrics line every `every` steps; a device profile of `profile_steps` steps from step `profile_start` on."""

    every: int = 10
    tensorboard: bool = True
    profile_start: int = 0
    profile_steps: int = 0

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1 step")


@dataclass(frozen=True)
class Sample:
    """Text decoded from the trained model at the end of the run."""

    prompts: tuple[str, ...]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Train:
    """Next-token training of one decoder on one stream of batches.

    batch: rows of one update, over all processes and micro-batches. length: tokens of a row.
    abort_after: updates in a row that may be skipped for not being finite before the run stops.
    init: a model whose weights a new run starts from (None: random); its shapes must be those of `model`.
    positions: how rows get their rotary positions (None: tokens since the document's start).
    """

    model: ModelSpec
    data: DataSpec
    optimizer: Optimizer
    steps: int
    batch: int
    length: int
    tokenizer: str = "bytes"
    init: Pretrained | None = None
    positions: Sampler | None = None
    loss: CrossEntropy = field(default_factory=CrossEntropy)
    options: StepOptions = field(default_factory=StepOptions)
    mesh: MeshSpec = MeshSpec()
    checkpoints: Checkpoints = Checkpoints()
    reports: Reports = Reports()
    sample: Sample | None = None
    seed: int = 0
    abort_after: int = 5

    def __post_init__(self):
        for name in ("steps", "batch", "length", "abort_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.length > self.model.max_length:
            raise ValueError(
                f"length {self.length} is more than ModelSpec.max_length {self.model.max_length}; "
                "raise max_length to train longer"
            )
        if self.batch % self.options.accumulate:
            raise ValueError(
                f"batch {self.batch} does not divide into {self.options.accumulate} micro-batches "
                "(StepOptions.accumulate)"
            )

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
        if self.batch % jax.process_count():
            raise ValueError(f"batch {self.batch} does not divide over {jax.process_count()} processes")

    def sections(self, mesh: Mesh, tokenizer: str, stream: str) -> Sections:
        """What two runs must have in common to share checkpoints; `tokenizer` and `stream` are fingerprints."""
        data = {k: v for k, v in describe(self.data).items() if k not in ("data_dir", "prefetch")}
        return {
            "model": describe(self.model),
            "optimizer": {**describe(self.optimizer), "schedule_steps": self.steps},
            "loss": {"z_loss": self.loss.z_loss},
            "data": {**data, "batch": self.batch, "length": self.length, "stream": stream},
            "tokenizer": tokenizer,
            "about": {"tokenizer": self.tokenizer},
            "positions": describe(self.positions),
            "seed": self.seed,
            "mesh": ", ".join(f"{axis}={degree}" for axis, degree in mesh.shape.items()),
        }
