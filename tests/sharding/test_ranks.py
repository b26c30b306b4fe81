"""Ranks out of the environment of each scheduler, and the devices of a process."""

import pytest

from sharding.config import MeshConfig, parse
from sharding.launch import (
    DataParallelRank,
    LaunchError,
    Rank,
    find_data_parallel_rank,
    find_rank,
    first_host,
    join_address,
    split_address,
    visible_devices,
)

SLURM = {
    "SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "h0", "MASTER_PORT": "29400"}
OWN = {"JAXSERVE_RANK": "1", "JAXSERVE_WORLD_SIZE": "2", "JAXSERVE_LOCAL_RANK": "1", "JAXSERVE_COORDINATOR": "h:77"}

TABLE = {
    "launcher": (OWN, Rank(1, 2, 1, "h", 77, "JAXSERVE_RANK")),
    "torchrun": (TORCHRUN, Rank(2, 4, 0, "h0", 29400, "RANK (torchrun)")),
    "torchrun's own store": (
        TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"},
        Rank(2, 4, 0, "h0", 29401, "RANK (torchrun)"),
    ),
    "slurm": (SLURM, Rank(3, 4, 1, "gpu07", 61445, "SLURM_PROCID")),
    "slurm batch script": ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),
    "open mpi 4": (
        OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"},
        Rank(1, 2, 0, "10.96.0.1", 61440 + (1531576320 >> 12) % 4095, "OMPI_COMM_WORLD_RANK"),
    ),
    "open mpi 4, v6": (
        OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9b,2620::2]:43370"},
        Rank(1, 2, 0, "fe80::b9b", 61441, "OMPI_COMM_WORLD_RANK"),
    ),
    "open mpi 5": (OPEN_MPI, Rank(1, 2, 0, None, 29501, "OMPI_COMM_WORLD_RANK")),
    "leader worker set": (
        {"LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "l-0.l.default"},
        Rank(1, 2, 0, "l-0.l.default", 29501, "LWS_WORKER_INDEX"),
    ),
    "job set": (
        {"JOB_COMPLETION_INDEX": "1", "JAXSERVE_WORLD_SIZE": "2", "JAXSERVE_COORDINATOR": "s-w-0-0.s"},
        Rank(1, 2, 0, "s-w-0-0.s", 29501, "JOB_COMPLETION_INDEX"),
    ),
    "an indexed job without a mesh": ({"JOB_COMPLETION_INDEX": "5"}, None),
    "tpu pod": (TPU, Rank(1, 2, 0, "t-0.svc", 8482, "TPU_WORKER_ID")),
    "tpu slices": (
        TPU | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s0:81"},
        Rank(3, 4, 0, "s0", 8482, "TPU_WORKER_ID"),
    ),
    "no tpu, but its library": ({"TPU_WORKER_ID": "WARNING: could not", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    "one tpu host": ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    "tpu pods in a job set": (TPU | {"JOB_COMPLETION_INDEX": "1"}, Rank(1, 2, 0, "t-0.svc", 8482, "TPU_WORKER_ID")),
    "torchrun under slurm": (SLURM | TORCHRUN, Rank(2, 4, 0, "h0", 29400, "RANK (torchrun)")),
    "nothing": ({"PATH": "/bin"}, None),
}


@pytest.mark.parametrize(("environ", "rank"), TABLE.values(), ids=list(TABLE))
def test_rank_of_a_scheduler(environ: dict[str, str], rank: Rank | None):
    assert find_rank(environ) == rank


def mesh(**values: object) -> MeshConfig:
    return parse({"axes": {"model": 8}, **values})


def test_the_config_names_the_coordinator_and_the_environment_has_the_last_word():
    config = mesh(hosts=2, coordinator={"address": "node-a", "port": 5})
    found = find_rank(OPEN_MPI, config)
    assert found is not None
    assert found.coordinator == "node-a:5"
    found = find_rank(OPEN_MPI | {"JAXSERVE_COORDINATOR": "[::2]:9"}, config)
    assert found is not None
    assert found.coordinator == "[::2]:9"
    found = find_rank({"JOB_COMPLETION_INDEX": "1"}, config)
    assert found == Rank(1, 2, 0, "node-a", 5, "JOB_COMPLETION_INDEX")


def test_a_missing_coordinator_is_an_error_with_a_remedy():
    found = find_rank(OPEN_MPI)
    assert found is not None
    with pytest.raises(LaunchError, match="OMPI_COMM_WORLD_RANK does not say where rank 0 runs; write coordinator"):
        _ = found.coordinator


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (OWN | {"JAXSERVE_RANK": "2"}, "JAXSERVE_RANK gives rank 2 of 2; ranks are 0 to 1"),
        ({"JAXSERVE_RANK": "0"}, "JAXSERVE_WORLD_SIZE is not set"),
        (OWN | {"JAXSERVE_WORLD_SIZE": "two"}, "JAXSERVE_WORLD_SIZE='two' is not a whole number"),
        (OWN | {"JAXSERVE_COORDINATOR": "a:b"}, "JAXSERVE_COORDINATOR='a:b' is not HOST or HOST:PORT"),
        (OWN | {"JAXSERVE_COORDINATOR": "a:99999"}, "is not HOST or HOST:PORT"),
        (SLURM | {"SLURM_PROCID": "-1"}, "SLURM_PROCID='-1' is not a whole number"),
        ({"LWS_WORKER_INDEX": "0"}, "LWS_GROUP_SIZE is not set"),
    ],
)
def test_broken_environments_are_named(environ: dict[str, str], words: str):
    with pytest.raises(LaunchError, match=words):
        find_rank(environ)


@pytest.mark.parametrize("prefix", ["JAXSERVE_DP_", "VLLM_DP_"])
def test_data_parallel_rank(prefix: str):
    names = {"RANK": "1", "SIZE": "3", "MASTER_IP": "10.0.0.9", "MASTER_PORT": "1234", "RANK_LOCAL": "0"}
    environ = {prefix + name: value for name, value in names.items()}
    assert find_data_parallel_rank(environ) == DataParallelRank(1, 3, "10.0.0.9", 1234)
    own_too = environ | {"JAXSERVE_DP_RANK": "0", "JAXSERVE_DP_SIZE": "1"}
    found = find_data_parallel_rank(own_too)
    assert found is not None
    assert (found.rank, found.size) == (0, 1)
    assert find_data_parallel_rank({}) is None
    with pytest.raises(LaunchError, match=f"{prefix}MASTER_PORT is not set"):
        find_data_parallel_rank({k: v for k, v in environ.items() if not k.endswith("PORT")})
    with pytest.raises(LaunchError, match=f"{prefix}RANK=3 is not in 0 to 2"):
        find_data_parallel_rank(environ | {prefix + "RANK": "3"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"), ("node001,host2", "node001"), ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"), ("n[7]", "n7"),
    ],
)  # fmt: skip
def test_first_host_of_a_node_list(nodes: str, first: str):
    assert first_host(nodes) == first


def test_addresses():
    for text, parts in {"h": ("h", 5), "h:6": ("h", 6), "[::1]": ("::1", 5), "[::1]:6": ("::1", 6)}.items():
        assert split_address(text, 5, "x") == parts
        assert split_address(join_address(*parts), 1, "x") == parts


@pytest.mark.parametrize(
    ("shown", "local_rank", "mine"),
    [
        (None, 1, ("4", "5", "6", "7")),
        ("0,1,2,3,4,5,6,7", 1, ("4", "5", "6", "7")),
        ("GPU-a, GPU-b,GPU-c,GPU-d", 1, ("GPU-a", "GPU-b", "GPU-c", "GPU-d")),  # the scheduler gave this task its own
        ("8,9,10,11,12,13,14,15", 0, ("8", "9", "10", "11")),
    ],
)
def test_devices_of_a_process(shown: str | None, local_rank: int, mine: tuple[str, ...]):
    config = mesh(processes_per_host=2)
    environ = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert visible_devices(environ, config, local_rank) == mine


def test_too_few_devices():
    with pytest.raises(LaunchError, match="shows 6 devices, but process 1 of this host needs the 4 after the first 4"):
        visible_devices({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}, mesh(processes_per_host=2), 1)
    assert visible_devices({}, mesh(platform="cpu"), 0) is None
