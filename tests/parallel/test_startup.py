"""Who is in a run, what each process reads, and meshes over several slices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from lcjax.parallel import startup
from lcjax.parallel.mesh import AXES, make_mesh
from lcjax.parallel.reading import part_of_batch
from lcjax.parallel.startup import Cluster, check_agreement, detect

pytestmark = pytest.mark.usefixtures("unchecked")  # `Device` stands in for those of other machines


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, "tpu"),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "localhost"}, "tpu"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, "slurm"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "ompi"),
        ({"PMI_SIZE": "4"}, "mpi4py"),
    ],
)
def test_launchers_are_recognised(environment, launcher):
    assert detect(environment) == launcher


def test_joining(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    assert Cluster().join({}) is None
    assert Cluster("host:1", 4, 2).join({}) == "process 2 of 4, coordinator host:1"
    Cluster().join({"SLURM_NTASKS": "2"})
    Cluster().join({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert calls == [
        (("host:1", 4, 2), {}),
        ((), {"cluster_detection_method": "slurm"}),
        ((), {"cluster_detection_method": None}),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "host:1"}, "--coordinator alone is not enough"),
        ({"processes": 2, "process": 1}, "--processes, --process alone is not enough"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "--process=2 is not one of the --processes=2"),
    ],
)
def test_half_an_address_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Cluster(**given)


def test_different_configurations_are_named(monkeypatch):
    check_agreement("a = 1\nb = 2")
    monkeypatch.setattr(startup, "gather", lambda config: [config, config, "a = 1\nb = 3"])
    with pytest.raises(ValueError, match=r"processes 0 and 2 .*'b = 2' on process 0, 'b = 3' on process 2"):
        check_agreement("a = 1\nb = 2")


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of another machine."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"
    client: None = None

    @property
    def coords(self):
        return (self.id, 0, 0)


def devices(count, processes, slices=1):
    return [Device(n, n * processes // count, n * slices // count) for n in range(count)]


def parts(processes, **degrees):
    mesh = make_mesh(**degrees, devices=devices(8, processes))
    return [part_of_batch(mesh, 16, 64, process) for process in range(processes)]


def test_every_process_reads_its_own_rows():
    found = parts(4, data=2, fsdp=4)
    assert [(p.index, p.count, p.columns) for p in found] == [(n, 4, slice(0, 64)) for n in range(4)]


def test_processes_that_split_a_sequence_read_the_same_rows():
    found = parts(4, fsdp=2, context=4)
    assert [(p.index, p.count) for p in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [p.columns for p in found] == [slice(0, 32), slice(32, 64)] * 2


def test_processes_that_split_heads_read_the_same_part():
    assert [(p.index, p.count) for p in parts(4, fsdp=1, context=2, tensor=4)] == [(0, 1)] * 4


def test_uneven_rows_are_refused():
    grid = np.asarray([Device(n, 0 if n < 3 else 1) for n in range(4)], object).reshape(1, 4, 1, 1)
    with pytest.raises(ValueError, match=r"fsdp=4.*deals rows out to 2 processes unevenly"):
        part_of_batch(Mesh(grid, AXES), 8, 8, 0)


def test_slices_lie_along_the_axis_that_was_asked_for():
    mesh = make_mesh(data=2, fsdp=4, across_slices={"data": 2}, devices=devices(8, 8, slices=2))
    assert [{d.slice_index for d in half.flat} for half in mesh.devices] == [{0}, {1}]


@pytest.mark.parametrize(
    ("degrees", "across", "message"),
    [
        ({"fsdp": 8}, {"data": 2}, "dcn_data=2 does not divide the mesh axis data=1"),
        ({"data": 4, "fsdp": 2}, {"data": 4}, "dcn_data=4 does not fit 2 slices"),
    ],
)
def test_slices_that_do_not_fit(degrees, across, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**degrees, across_slices=across, devices=devices(8, 8, slices=2))
