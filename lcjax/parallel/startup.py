"""Joining the processes of one run: Cloud TPU and GKE, Slurm, MPI, or explicit addresses."""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

LAUNCHERS = {
    # launcher of `jax.distributed`: the variables that say how many processes there are
    "slurm": ("SLURM_NTASKS",),
    "ompi": ("OMPI_COMM_WORLD_SIZE",),
    "mpi4py": ("PMI_SIZE", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class Cluster:
    """Where a process belongs, given by hand: all three, or none to find out from the launcher."""

    coordinator: str | None = None  # host:port of process 0, reachable by all
    processes: int | None = None
    process: int | None = None

    def __post_init__(self):
        given = [name for name in ("coordinator", "processes", "process") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise ValueError(f"--{', --'.join(given)} alone is not enough: give --coordinator, --processes, --process")
        if self.processes is not None and not 0 <= (self.process or 0) < self.processes:
            raise ValueError(f"--process={self.process} is not one of the --processes={self.processes}: 0 is the first")

    @classmethod
    def of(cls, flags: argparse.Namespace) -> "Cluster":
        """What was given by `add_flags`."""
        return cls(flags.coordinator, flags.processes, flags.process)

    def join(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """Connect to the other processes before any device is used; returns how, or None for a lone process.

        A TPU host finds the others of its slice (and, under GKE, of its slices) from the platform, a Slurm step or an
        MPI rank from the launcher's variables.
        """
        if self.processes is not None:
            jax.distributed.initialize(self.coordinator, self.processes, self.process)
            return f"process {self.process} of {self.processes}, coordinator {self.coordinator}"
        launcher = detect(environment)
        if launcher is None:
            return None
        jax.distributed.initialize(cluster_detection_method=None if launcher == "tpu" else launcher)
        return f"process {jax.process_index()} of {jax.process_count()}, found by {launcher}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a `Cluster` that is given by hand."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where no launcher tells")
    parser.add_argument("--processes", type=int, metavar="N", help="of the run, with --coordinator")
    parser.add_argument("--process", type=int, metavar="I", help="this one, from 0, with --coordinator")


def detect(environment: Mapping[str, str]) -> str | None:
    """The launcher that started several processes: 'tpu', 'slurm', 'ompi', 'mpi4py'; None for a lone process."""
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "tpu"
    for launcher, counts in LAUNCHERS.items():
        if any(int(environment.get(name) or 1) > 1 for name in counts):
            return launcher
    return None


def gather(value: Any) -> list[Any]:
    """A JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def check_agreement(config: str) -> None:
    """Raise ValueError, on every process, when they were started with different configurations."""
    first, *others = gather(config)
    for process, other in enumerate(others, start=1):
        ours, theirs = set(first.splitlines()), set(other.splitlines())
        if ours != theirs:
            lines = [f"{min(found, default='nothing')!r}" for found in (ours - theirs, theirs - ours)]
            raise ValueError(
                f"processes 0 and {process} have different configurations: {lines[0]} on process 0, {lines[1]} on "
                f"process {process}; start all with the same files and bindings"
            )
