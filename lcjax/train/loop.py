"""The training loop: prepare, compile once, step, report, save, and leave in good order."""

import collections
import contextlib
import signal
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lcjax.checkpoint.manager import CheckpointManager
from lcjax.checkpoint.manifest import Sections
from lcjax.data.pipeline import Pipeline, build_pipeline, merge_states
from lcjax.data.tokenizers import Tokenizer, load_tokenizer
from lcjax.models.decoder import abstract
from lcjax.models.flops import CONVENTION, flops_per_token
from lcjax.models.stacked import stacked, unstacked
from lcjax.observe.hardware import peak_flops, peak_memory_bytes
from lcjax.observe.metrics import MetricsLog, plot_loss
from lcjax.parallel.reading import Part, part_of_batch
from lcjax.parallel.rules import batch_sharding, batch_ways
from lcjax.parallel.startup import check_agreement, gather
from lcjax.serve import engine as serving
from lcjax.train import state as states
from lcjax.train.handover import continued
from lcjax.train.job import Train
from lcjax.train.preempt import Preemption
from lcjax.train.program import dtypes, flags_sharding, state_stacks, step_program
from lcjax.train.progress import Progress
from lcjax.train.state import TrainState
from lcjax.train.step import Batch
from lcjax.train.watchdog import Watchdog

IN_FLIGHT = 2
"""Steps that the host may run ahead of the device, so that a signal waits for no more than these."""


class TrainingStopped(RuntimeError):
    """The run cannot go on: too many steps in a row were not finite, or the data has ended."""


@dataclass
class Run:
    """A prepared run: its parts, and the training state after `step` batches. `job` is resolved (`Train.resolve`)."""

    job: Train
    output: Path
    config: str
    mesh: jax.sharding.Mesh
    part: Part
    tokenizer: Tokenizer
    batches: Pipeline
    manager: CheckpointManager
    sections: Sections
    state: TrainState
    step: int
    resumed_at: int = field(init=False)

    def __post_init__(self):
        self.resumed_at = self.step


def prepare(job: Train, output: Path, config: str) -> Run:
    """The parts of a run, new or restored from `output`; nothing is compiled but the initialisation.

    Raises ValueError or OSError with one sentence about what does not fit.
    """
    check_agreement(config)
    mesh = job.mesh.build()
    job.check_mesh(mesh)
    part = part_of_batch(mesh, job.batch, job.length)
    job, weights = job.resolve()
    assert job.tokenizer is not None
    tokenizer = load_tokenizer(job.tokenizer)
    batches = build_pipeline(
        job.data,
        tokenizer,
        batch=job.batch,
        length=job.length,
        process_index=part.index,
        process_count=part.count,
        vocab_size=job.spec.vocab_size,
    )
    sections = job.sections(mesh, tokenizer.fingerprint, batches.fingerprint)
    manager = CheckpointManager(output / "checkpoints", keep=job.checkpoints.keep)
    start = states.Start(job.spec, job.optimizer.build(job.steps), job.seed, job.trainable, weights)
    shapes = states.abstract_state(start, mesh)  # layer by layer, as checkpoints are
    restored = manager.restore(shapes, sections, accept=job.checkpoints.accept)
    if restored is None:
        state, step = states.create(start, shapes), 0
        if job.moments is not None:
            state = continued(state, shapes, Path(job.moments))
    else:
        state, step = restored.state, restored.step
        batches.set_state(restored.data_state)
    if stacks := state_stacks(job):
        lie = states.shardings(states.abstract_state(start, mesh, stacks))
        state = jax.device_put(stacked(state, stacks), lie)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.gin").write_text(config)
    return Run(job, output, config, mesh, part, tokenizer, batches, manager, sections, state, step)


def compile_step(run: Run) -> Any:
    """The one executable of the run. Being compiled ahead of time, it refuses other shapes instead of recompiling."""
    program = step_program(run.job, states.shapes_of(run.state), run.mesh)
    with jax.set_mesh(run.mesh):
        return program.jitted.lower(*program.shapes).compile()


def train(run: Run, stop: Preemption) -> int:
    """Run to the end, or to a signal; returns the exit status (128 + signal number after a signal, as shells have it).

    Raises CheckpointError when a save fails and TrainingStopped when going on makes no sense; what was saved stays.
    """
    job = run.job
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack, Progress(job.steps, run.step, visible=first) as progress:
        stack.callback(run.manager.close)
        stack.callback(run.batches.close)
        describe(run, progress)
        if run.step < job.steps:
            progress.say("compiling the step")
            started = time.perf_counter()
            compiled = stop.interruptible("compilation", lambda: compile_step(run))
            progress.say(f"compiled the step in {time.perf_counter() - started:.1f} s")
            steps(run, compiled, stop, progress)
        if run.step < job.steps:  # the signal may have reached another process than this one
            progress.say(f"stopped at step {run.step}; the same command goes on from there")
            return 128 + (stop.signum or signal.SIGTERM)
        if first:
            plot_loss(run.output / "metrics.jsonl", run.output / "loss.png")
        if job.sample is not None:
            stop.interruptible("decoding", lambda: sample(run, progress))
        progress.say(f"done: {run.step} steps in {run.output}")
    return 0


def steps(run: Run, compiled: Any, stop: Preemption, progress: Progress) -> None:
    """Step until the end or a signal; leaves a checkpoint of the last step either way."""
    job, every, saved_at = run.job, run.job.checkpoints.every, run.step
    reports = Reporter(run, progress)
    in_flight: collections.deque[Any] = collections.deque()
    watchdog = Watchdog(run.output / "processes", jax.process_index(), job.reports.hang_seconds)
    alone, asked = jax.process_count() == 1, False
    with contextlib.closing(reports), profile(run) as profiler, watchdog, jax.transfer_guard("disallow"):
        while run.step < job.steps and not (asked or (alone and stop.requested)):
            with reports.waiting_for_data():
                batch = place(run, next_rows(run))
            run.state, metrics = compiled(run.state, batch, raised(run, stop.requested))
            run.step += 1
            in_flight.append(metrics.pop("asked_to_stop"))
            if len(in_flight) > IN_FLIGHT:
                asked = bool(jax.device_get(in_flight.popleft()))
                watchdog.beat(run.step)
            progress.advance()
            reports.step(metrics)
            profiler.step(run.step)
            if run.step % every == 0:
                save(run)
                saved_at = run.step
            run.manager.check()
        if saved_at != run.step:
            save(run)
        run.manager.wait()


def next_rows(run: Run) -> dict[str, np.ndarray]:
    """This process's rows of the next batch, with the positions that the job samples."""
    sampler = run.job.positions
    try:
        rows = next(run.batches)
        if sampler is None:
            return rows
        first = run.part.index * len(rows["inputs"])
        found = sampler.positions(rows["inputs"], rows["segment_ids"], run.job.seed, run.step, first)
        return rows | {"positions": found}
    except StopIteration:
        raise TrainingStopped(
            f"the data ended after {run.step} batches: lower train.steps or let the data repeat"
        ) from None


def place(run: Run, rows: dict[str, np.ndarray]) -> Batch:
    """This process's rows as its part of the global arrays `[B,T]`."""
    sharding, shape = batch_sharding(run.mesh), (run.job.batch, run.job.length)
    own = {name: np.asarray(rows[name], dtype)[:, run.part.columns] for name, dtype in dtypes(run.job).items()}
    with jax.transfer_guard("allow"):  # reading is a transfer that is meant
        return {name: jax.make_array_from_process_local_data(sharding, x, shape) for name, x in own.items()}


def raised(run: Run, flag: bool) -> jax.Array:
    """This process's flag as its part of an array over all devices.

    A preemption notice may reach one process only. The flags go through the step, so that every process learns of
    it from the same step, and all save the same one.
    """
    sharding = flags_sharding(run.mesh)
    local = np.full(len(sharding.addressable_devices), flag, np.int32)
    with jax.transfer_guard("allow"):
        return jax.make_array_from_process_local_data(sharding, local, (run.mesh.size,))


def save(run: Run) -> None:
    """Start a checkpoint of everything that the next step depends on."""
    with jax.transfer_guard("allow"):  # saving is a transfer that is meant
        states_by_part = dict(gather((run.part.index, run.batches.get_state())))
        data_state = merge_states([states_by_part[index] for index in range(run.part.count)])
        run.manager.save(run.step, unstacked(run.state), data_state, run.sections)


class Reporter:
    """Metrics every so many steps: to the progress bar, to `metrics.jsonl` and to TensorBoard. Stops a hopeless run."""

    def __init__(self, run: Run, progress: Progress):
        self._run, self._progress = run, progress
        job = run.job
        self._log = None
        if jax.process_index() == 0:
            self._log = MetricsLog(run.output, resumed_at=run.step, tensorboard=job.reports.tensorboard)
        peak = peak_flops(jax.devices()[0])
        flops = flops_per_token(job.step_spec, job.length, training=True)
        self._utilisation_per_rate = flops / (peak * jax.device_count()) if peak else None
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0
        self._losses: list[jax.Array] = []  # of the steps since the last report, whose mean it tells

    @contextlib.contextmanager
    def waiting_for_data(self) -> Generator[None]:
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def step(self, metrics: dict[str, jax.Array]) -> None:
        """Count a step; on a report step (the first and the last included), fetch its metrics and write them."""
        run = self._run
        self._steps += 1
        self._losses.append(metrics["loss"])
        first = run.step == run.resumed_at + 1 == 1
        if not (first or run.step % run.job.reports.every == 0 or run.step == run.job.steps):
            return
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values["loss"] = float(np.mean(jax.device_get(self._losses)))
        seconds = time.perf_counter() - self._since
        rate = run.job.batch * run.job.length * self._steps / seconds
        values |= {"tokens_per_second": rate, "step_seconds": seconds / self._steps}
        values |= {
            "data_share": self._waited / seconds,
            "memory_gib": peak_memory_bytes(jax.local_devices()[0]) / 2**30,
        }
        utilisation = self._utilisation_per_rate and rate * self._utilisation_per_rate
        if utilisation is not None:
            values["mfu"] = utilisation
        if self._log is not None:
            self._log.write(run.step, values)
        self._progress.report(run.step, values["loss"], rate, utilisation)
        self._since, self._steps, self._waited, self._losses = time.perf_counter(), 0, 0.0, []
        if values["skipped_in_row"] >= run.job.abort_after:
            raise TrainingStopped(
                f"{values['skipped_in_row']:.0f} steps in a row up to step {run.step} were not finite and were "
                "skipped: lower the learning rate or look at the data; parameters are those of the last finite step"
            )

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


class Profiler:
    """Traces the steps that `Reports` asks for into `profile/`, to be read with xprof."""

    def __init__(self, run: Run):
        reports = run.job.reports
        self._folder = run.output / "profile"
        self._window = range(reports.profile_start, reports.profile_start + reports.profile_steps)
        self._on = False

    def step(self, step: int) -> None:
        """Called after each step: switch so that the next one is traced if it is in the window."""
        wanted = step + 1 in self._window
        if wanted != self._on:
            with jax.transfer_guard("allow"):
                jax.profiler.start_trace(self._folder) if wanted else jax.profiler.stop_trace()
            self._on = wanted

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False


def profile(run: Run) -> contextlib.closing[Profiler]:
    return contextlib.closing(Profiler(run))


def describe(run: Run, progress: Progress) -> None:
    """What is about to run, in a few lines."""
    job = run.job
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    flops = flops_per_token(job.step_spec, job.length, training=True)
    devices = jax.devices()
    axes = " ".join(f"{axis}={degree}" for axis, degree in run.mesh.shape.items() if degree > 1)
    progress.say(
        f"{job.spec.name}: {parameters / 1e6:.1f}M parameters, state {states.bytes_of(run.state) / 2**30:.2f} GiB, "
        f"{len(devices)} x {devices[0].device_kind}{' with ' + axes if axes else ''}"
    )
    progress.say(f"{flops / 1e6:,.1f} MFLOP per token ({CONVENTION})")
    if warning := job.options.adjoint.warning:
        progress.say(f"warning: {warning}")
    if run.resumed_at:
        what = "already finished" if run.resumed_at >= job.steps else "resumed"
        progress.say(f"{what} at step {run.resumed_at} of {job.steps}, from {run.manager.folder}")


def sample(run: Run, progress: Progress) -> None:
    """Decode the job's prompts with the trained parameters, where they lie: every process takes part."""
    wanted = run.job.sample
    assert wanted is not None
    graphdef, _ = abstract(run.job.spec)
    ways = batch_ways(run.mesh)
    engine = serving.Engine(batch=-(-len(wanted.prompts) // ways) * ways)
    params = unstacked(run.state.params)
    generator = serving.Generator(graphdef, params, run.job.spec, run.tokenizer, engine, mesh=run.mesh)
    requests = [serving.Request(prompt, wanted.max_new_tokens, sampling=wanted.sampling) for prompt in wanted.prompts]
    for request, answer in zip(requests, generator.generate(requests), strict=True):
        progress.say(f"--- {request.prompt}{answer.text}")
