"""Which rank this process is, and joining the others: the only reader of cluster environment variables.

Every `find` function is pure: it takes the environment as a mapping. `start` joins through `jax.distributed`.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sharding.agreement import meet
from sharding.config import DEFAULT_PORT, MeshConfig, Timeouts

TPU_PORT = 8482  # jax's own on TPU pods
DATA_PARALLEL_PREFIXES = ("JAXSERVE_DP_", "VLLM_DP_")

Environment = Mapping[str, str]


class LaunchError(ValueError):
    """The processes of a mesh cannot be found or joined; the message says which variable or setting to change."""


@dataclass(frozen=True)
class Rank:
    """One process among those that run one program.

    Attributes:
        rank: 0 to `size` - 1; rank 0 leads.
        size: processes on all hosts.
        local_rank: among the processes of this host.
        address: host name or address of rank 0, None when the scheduler does not tell.
        port: where rank 0's coordinator listens.
        source: who said so, for messages.
    """

    rank: int
    size: int
    local_rank: int
    address: str | None
    port: int
    source: str

    @property
    def coordinator(self) -> str:
        """`address:port` for `jax.distributed`.

        Raises:
            LaunchError: nobody said where rank 0 is.
        """
        if self.address is None:
            raise LaunchError(
                f"{self.source} does not say where rank 0 runs; write coordinator: {{address: HOST}} into the mesh "
                "config or set JAXSERVE_COORDINATOR=HOST:PORT"
            )
        return join_address(self.address, self.port)


@dataclass(frozen=True)
class DataParallelRank:
    """One process among those that each run an engine of their own over a part of the data.

    `token` is shared by all ranks and keeps strangers out of `gather`; "" where the launcher gave none.
    """

    rank: int
    size: int
    address: str
    port: int
    token: str = ""


def environment() -> dict[str, str]:
    """A copy of this process's environment."""
    return dict(os.environ)


def set_environment(variables: Environment) -> None:
    """Set variables of this process, for what it runs or starts later."""
    os.environ.update(variables)


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str, default_port: int, name: str) -> tuple[str, int]:
    """The host and port of `host`, `host:port`, `[v6]` or `[v6]:port`; `name` is what messages call it.

    Raises:
        LaunchError: it is none of them.
    """
    match = re.fullmatch(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]\s]+))(?::(?P<port>\d{1,5}))?", text)
    if match is None or int(match["port"] or 1) not in range(1, 65536):
        raise LaunchError(f"{name}={text!r} is not HOST or HOST:PORT")
    return match["v6"] or match["host"], int(match["port"] or default_port)


def find_rank(environ: Environment, config: MeshConfig | None = None) -> Rank | None:
    """The rank that the launcher or scheduler gave this process, None where there is none (or only one process).

    The coordinator of the mesh config counts more than what a scheduler says, and JAXSERVE_COORDINATOR most.

    Raises:
        LaunchError: variables of one kind that are incomplete or make no sense.
    """
    for find in FINDERS.values():
        found = find(environ, config)
        if found is None:
            continue
        if not 0 <= found.rank < found.size or found.local_rank < 0:
            raise LaunchError(
                f"{found.source} gives rank {found.rank} of {found.size}; ranks are 0 to {found.size - 1}"
            )
        found = _with_coordinator(found, environ, config)
        return found if found.size > 1 or found.source == "JAXSERVE_RANK" else None
    return None


def find_data_parallel_rank(environ: Environment) -> DataParallelRank | None:
    """The rank in JAXSERVE_DP_RANK, _SIZE, _MASTER_IP and _MASTER_PORT, or the same after VLLM_DP_.

    Raises:
        LaunchError: some of them are missing or make no sense.
    """
    prefix = next((p for p in DATA_PARALLEL_PREFIXES if p + "RANK" in environ), None)
    if prefix is None:
        return None
    rank, size = _whole(environ, prefix + "RANK"), _whole(environ, prefix + "SIZE")
    if not 0 <= rank < size:
        raise LaunchError(f"{prefix}RANK={rank} is not in 0 to {size - 1} ({prefix}SIZE={size})")
    address = environ.get(prefix + "MASTER_IP") or "127.0.0.1"
    port = _whole(environ, prefix + "MASTER_PORT") if size > 1 or prefix + "MASTER_PORT" in environ else DEFAULT_PORT
    return DataParallelRank(rank, size, address, port, environ.get("JAXSERVE_DP_TOKEN", ""))


def _whole(environ: Environment, name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise LaunchError(f"{name} is not set; set it, or unset the variables that go with it")
    if not re.fullmatch(r"\d{1,9}", text.strip()):
        raise LaunchError(f"{name}={text!r} is not a whole number")
    return int(text)


def _with_coordinator(found: Rank, environ: Environment, config: MeshConfig | None) -> Rank:
    if text := environ.get("JAXSERVE_COORDINATOR"):
        address, port = split_address(text, DEFAULT_PORT, "JAXSERVE_COORDINATOR")
        return replace(found, address=address, port=port)
    if config is None or found.source == "JAXSERVE_RANK":
        return found
    wanted = config.coordinator
    return replace(found, address=wanted.address or found.address, port=wanted.port or found.port)


def _find_own(environ: Environment, config: MeshConfig | None) -> Rank | None:
    if "JAXSERVE_RANK" not in environ:
        return None
    rank, size = _whole(environ, "JAXSERVE_RANK"), _whole(environ, "JAXSERVE_WORLD_SIZE")
    wanted = config.coordinator if config else None
    address, port = (wanted.address, wanted.port) if wanted else (None, None)
    return Rank(rank, size, _whole(environ, "JAXSERVE_LOCAL_RANK", 0), address, port or DEFAULT_PORT, "JAXSERVE_RANK")


def _find_torchrun(environ: Environment, config: MeshConfig | None) -> Rank | None:
    if not {"RANK", "WORLD_SIZE"} <= environ.keys():
        return None
    rank, size = _whole(environ, "RANK"), _whole(environ, "WORLD_SIZE")
    port = _whole(environ, "MASTER_PORT", DEFAULT_PORT)
    # torchrun itself listens on MASTER_PORT of the first host until the job ends.
    taken = "TORCHELASTIC_RUN_ID" in environ
    return Rank(
        rank, size, _whole(environ, "LOCAL_RANK", 0), environ.get("MASTER_ADDR"), port + taken, "RANK (torchrun)"
    )


def _find_slurm(environ: Environment, config: MeshConfig | None) -> Rank | None:
    """A task that srun started. In the batch script itself there is no step, and so no rank."""
    if "SLURM_STEP_NODELIST" not in environ or "SLURM_PROCID" not in environ:
        return None
    size = _whole(environ, "SLURM_STEP_NUM_TASKS", _whole(environ, "SLURM_NTASKS", 1))
    job = _whole(environ, "SLURM_JOB_ID", 0)
    local = _whole(environ, "SLURM_LOCALID", 0)
    first = first_host(environ["SLURM_STEP_NODELIST"])
    return Rank(_whole(environ, "SLURM_PROCID"), size, local, first, _port_of(job), "SLURM_PROCID")


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `n[007-010,12],m1` begins with `n007`."""
    name, bracket, rest = nodes.partition(",")[0].partition("[")
    return name + re.split(r"[,\-\]]", rest)[0] if bracket else name


def _find_open_mpi(environ: Environment, config: MeshConfig | None) -> Rank | None:
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    # Up to version 4 the URI of mpirun tells its host, where rank 0 runs too. Later versions tell nothing.
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    host = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    job = re.match(r"\d+", uri)
    return Rank(
        _whole(environ, "OMPI_COMM_WORLD_RANK"),
        _whole(environ, "OMPI_COMM_WORLD_SIZE"),
        _whole(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
        (host[1] or host[2]) if host else None,
        _port_of(int(job[0]) >> 12) if job else DEFAULT_PORT,  # the job's number lies above the lower 12 bits
        "OMPI_COMM_WORLD_RANK",
    )


def _find_leader_worker_set(environ: Environment, config: MeshConfig | None) -> Rank | None:
    if "LWS_WORKER_INDEX" not in environ:
        return None
    rank, size = _whole(environ, "LWS_WORKER_INDEX"), _whole(environ, "LWS_GROUP_SIZE")
    return Rank(rank, size, 0, environ.get("LWS_LEADER_ADDRESS"), DEFAULT_PORT, "LWS_WORKER_INDEX")


def _find_tpu_pod(environ: Environment, config: MeshConfig | None) -> Rank | None:
    """A host of a TPU slice as Kubernetes describes it, or of several slices (MEGASCALE)."""
    workers = environ.get("TPU_WORKER_HOSTNAMES") or environ.get("TPU_PROCESS_ADDRESSES")
    own = environ.get("TPU_WORKER_ID", "")
    if not workers or not own or own.startswith("WARNING"):  # where no TPU is, libtpu writes a warning into its value
        return None
    hosts = [worker.strip().partition(":")[0] for worker in workers.split(",")]
    slices, index = _whole(environ, "MEGASCALE_NUM_SLICES", 1), _whole(environ, "MEGASCALE_SLICE_ID", 0)
    rank = _whole(environ, "TPU_WORKER_ID") + index * len(hosts)
    leader = environ.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0] or hosts[0]
    return Rank(rank, len(hosts) * slices, 0, leader, TPU_PORT, "TPU_WORKER_ID")


def _find_job_set(environ: Environment, config: MeshConfig | None) -> Rank | None:
    """A pod of an indexed Job. Kubernetes tells the index only: the size comes from the config or the manifest."""
    if "JOB_COMPLETION_INDEX" not in environ:
        return None
    size = _whole(environ, "JAXSERVE_WORLD_SIZE", config.hosts if config else 1)
    if size == 1:  # pods that have nothing to do with each other
        return None
    return Rank(_whole(environ, "JOB_COMPLETION_INDEX"), size, 0, None, DEFAULT_PORT, "JOB_COMPLETION_INDEX")


def _port_of(job: int) -> int:
    """A port that all tasks of a job work out alike and neighbouring jobs do not share; one more is free for others."""
    return 61440 + job % 4095


# In the order in which they are asked: what is set on purpose first, what a platform always sets last.
FINDERS: Mapping[str, Callable[[Environment, MeshConfig | None], Rank | None]] = {
    "jaxserve": _find_own,
    "torchrun": _find_torchrun,
    "slurm": _find_slurm,
    "open mpi": _find_open_mpi,
    "tpu pod": _find_tpu_pod,
    "leader worker set": _find_leader_worker_set,
    "job set": _find_job_set,
}


def ask_jax(config: MeshConfig) -> Rank | None:
    """The rank that jax's own detection finds, which on Google's TPU machines asks the metadata server.

    Raises:
        LaunchError: it found a cluster and failed.
    """
    from jax._src.clusters import ClusterEnv

    try:
        address, size, rank, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, config.timeouts.start
        )
    except Exception as error:
        raise LaunchError(f"jax could not tell this host's rank among the TPU hosts: {error}") from error
    if address is None or size is None or rank is None:
        return None
    host, port = split_address(address, TPU_PORT, "the coordinator that jax found")
    return Rank(rank, size, 0, host, port, "jax's cluster detection")


def visible_devices(environ: Environment, config: MeshConfig, local_rank: int) -> tuple[str, ...] | None:
    """What CUDA_VISIBLE_DEVICES should hold for a process: its share of those that this environment shows.

    A scheduler may already have given each task its own share; then that stays. None leaves everything as it is.

    Raises:
        LaunchError: there are too few.
    """
    if config.platform != "gpu":
        return None
    count = config.devices_per_process
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return tuple(str(local_rank * count + i) for i in range(count))
    names = tuple(name.strip() for name in shown.split(",") if name.strip())
    if len(names) == count:
        return names
    mine = names[local_rank * count : (local_rank + 1) * count]
    if len(mine) < count:
        raise LaunchError(
            f"CUDA_VISIBLE_DEVICES={shown!r} shows {len(names)} devices, but process {local_rank} of this host needs "
            f"the {count} after the first {local_rank * count}; show more, or change devices_per_process"
        )
    return mine


def set_up_devices(config: MeshConfig, environ: Environment, local_rank: int) -> None:
    """Choose the platform and this process's devices; must come before jax starts a backend."""
    import jax

    if config.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.devices_per_process)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    mine = visible_devices(environ, config, local_rank)
    if mine is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)


def start(rank: Rank, timeouts: Timeouts, facts: Mapping[str, str]) -> None:
    """Join the other processes; returns when all are there. One process alone has nothing to join.

    From then on jax ends this process within `timeouts.heartbeat` seconds or so of another one's death.

    Args:
        rank: of this process.
        timeouts: of the mesh config.
        facts: name -> value of what must be the same on all ranks.

    Raises:
        LaunchError: not all processes came within `timeouts.start` seconds, or the coordinator's port is taken.
        Disagreement: the facts differ.
    """
    import jax

    if rank.size == 1:
        return
    host, port = split_address(rank.coordinator, DEFAULT_PORT, rank.source)
    who = f"rank {rank.rank} of {rank.size} (from {rank.source}), coordinator {rank.coordinator}"
    try:
        # jax would end the process, with a stack trace, if not all came.
        meet(rank.rank, rank.size, host, port, facts, float(timeouts.start))
        jax.distributed.initialize(
            rank.coordinator,
            rank.size,
            rank.rank,
            cluster_detection_method="deactivate",  # it would take one device a process under SLURM
            initialization_timeout=timeouts.start,
            heartbeat_timeout_seconds=timeouts.heartbeat,
            shutdown_timeout_seconds=timeouts.shutdown,
        )
    except (RuntimeError, OSError) as error:
        raise LaunchError(
            f"{who}: {' '.join(str(error).split())[:500]}. Check that all ranks run, and that the coordinator is the "
            "host of rank 0, with a free port that the others can reach (coordinator and timeouts.start in the mesh "
            "config)"
        ) from error


def check_devices(config: MeshConfig) -> None:
    """Compare the devices that jax sees with the mesh config, before anything is loaded or compiled.

    Raises:
        LaunchError: another platform, or too few devices.
    """
    import jax

    platform, count = jax.default_backend(), jax.local_device_count()
    if platform != config.platform:
        raise LaunchError(
            f"{config.source} asks for platform {config.platform}, but jax found {platform}; install jax for "
            f"{config.platform} (the extra cuda or tpu), or set platform: {platform}"
        )
    if count < config.devices_per_process:
        raise LaunchError(
            f"{config.source} asks for {config.devices_per_process} devices in each process, but jax sees {count} "
            "here; change devices_per_process and axes, or show more devices (CUDA_VISIBLE_DEVICES)"
        )


def key_value_client() -> Any:
    """The client of jax's coordination service.

    Raises:
        LaunchError: `start` was not called, or there is one process only.
    """
    from jax._src.distributed import global_state

    if global_state.client is None:
        raise LaunchError("jax.distributed is not running; call sharding.launch.start first")
    return global_state.client
