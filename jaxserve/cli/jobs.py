"""What `jaxserve launch` runs: the job, its ranks, and what each of them is told."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.checks import ParameterError
from jaxserve.cli import find_command, flags, parse
from sharding import launch, processes
from sharding.config import DEFAULT_PORT, MeshConfig, MeshConfigError
from sharding.launch import LaunchError, Rank

LAUNCHABLE = ("serve", "run-batch", "generate", "bench offline")  # what runs an engine and needs no terminal
SIZES = {"tensor_parallel_size": "model", "data_parallel_size": "data"}  # engine option -> mesh axis


@dataclass(frozen=True)
class Job:
    """What every rank runs.

    Attributes:
        words: as the user wrote them.
        full: with what the mesh config adds.
        args: of a jaxserve command, None for a script.
    """

    words: tuple[str, ...]
    full: tuple[str, ...]
    args: argparse.Namespace | None


def read_job(config: MeshConfig, words: Sequence[str]) -> Job:
    """Check the command and the engine options before anything starts.

    Raises:
        UsageError: there is no command, or one that cannot be launched.
        MeshConfigError: the file's engine options are no engine options.
    """
    if not words:
        raise flags.UsageError("say what to launch: -- serve MODEL, -- generate ..., or -- script.py. "
                               "See jaxserve launch --help.")  # fmt: skip
    _check_engine_options(config)
    if words[0].endswith(".py"):
        if not os.path.isfile(words[0]):
            raise flags.UsageError(f"there is no script {words[0]!r}")
        return Job(tuple(words), tuple(words), None)
    name, rest = find_command(words)
    if name not in LAUNCHABLE:
        raise flags.UsageError(f"{name!r} cannot be launched; use {', '.join(LAUNCHABLE)}, or a Python script")
    if config.independent:
        raise flags.UsageError(
            f"{config.source} has independent: true, which is for scripts that take their part of the work "
            f"(jaxserve.distributed.partition); leave it out for {name}, or see jaxserve serve --replicas"
        )
    _check_sizes(config, flags.given(parse(words), flags.ENGINE))
    full = (*name.split(), *engine_words(config), *rest)
    return Job(tuple(words), full, parse(full))


def _check_engine_options(config: MeshConfig) -> None:
    try:
        flags.EngineArgs(**config.engine)
    except (TypeError, ParameterError) as error:
        raise MeshConfigError(f"{config.source}: engine: {error}") from error


def _check_sizes(config: MeshConfig, given: Mapping[str, Any]) -> None:
    for option, axis in SIZES.items():
        size = {"model": config.axes.model, "data": config.axes.data}[axis]
        if option in given and given[option] != size:
            flag = "--" + option.replace("_", "-")
            raise flags.UsageError(f"{flag} {given[option]} differs from axes.{axis}={size} in {config.source}; "
                                   "leave the flag out")  # fmt: skip


def engine_words(config: MeshConfig) -> list[str]:
    """The mesh's sizes and the file's engine options as flags."""
    axes = config.engine_axes
    words = ["--tensor-parallel-size", str(axes.model), "--data-parallel-size", str(axes.data)]
    for name, value in config.engine.items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            words.append(f"--{flag}={json.dumps(text) if isinstance(text, dict) else text}")
    return words


def local_ranks(config: MeshConfig, variables: Mapping[str, str], node: int | None) -> list[Rank]:
    """The ranks that this process must be (one) or start (several).

    Raises:
        LaunchError: the scheduler's processes do not fit the config, or nobody says which host this is.
    """
    found = launch.find_rank(variables, config)
    if found is None and node is None and config.platform == "tpu" and config.processes > 1:
        found = launch.ask_jax(config)
    if found is not None and found.size == config.processes:
        return [found]
    if found is not None and found.size == config.hosts:
        return _ranks_of_host(config, found.rank, found.address, found.port)
    if found is not None:
        raise LaunchError(
            f"{found.source} says that there are {found.size} processes, but {config.source} has hosts={config.hosts} "
            f"x processes_per_host={config.processes_per_host}; start {config.processes} tasks, or {config.hosts} (one "
            "on each host)"
        )
    if node is None and config.hosts > 1:
        raise LaunchError(
            f"{config.source} has hosts={config.hosts}, but nothing tells which of them this is; give --node-rank, or "
            "start this under SLURM, Open MPI, Kubernetes or torchrun"
        )
    if node is not None and not 0 <= node < config.hosts:
        raise flags.UsageError(f"--node-rank {node} is not in 0 to {config.hosts - 1} (hosts in {config.source})")
    coordinator = config.coordinator
    if config.hosts == 1:
        address = coordinator.address or "127.0.0.1"
        port = coordinator.port or (processes.free_port() if config.processes > 1 else DEFAULT_PORT)
        return _ranks_of_host(config, 0, address, port)
    return _ranks_of_host(config, node or 0, coordinator.address, coordinator.port or DEFAULT_PORT)


def _ranks_of_host(config: MeshConfig, host: int, address: str | None, port: int) -> list[Rank]:
    first = Rank(host * config.processes_per_host, config.processes, 0, address, port, "--node-rank")
    return [replace(first, rank=first.rank + i, local_rank=i) for i in range(config.processes_per_host)]


def rank_variables(config: MeshConfig, rank: Rank, variables: Mapping[str, str], token: str) -> dict[str, str]:
    """What the environment of a rank says, for this program and for scripts."""
    axes = config.engine_axes
    found = {
        "JAXSERVE_RANK": str(rank.rank),
        "JAXSERVE_WORLD_SIZE": str(rank.size),
        "JAXSERVE_LOCAL_RANK": str(rank.local_rank),
        "JAXSERVE_TENSOR_PARALLEL_SIZE": str(axes.model),
        "JAXSERVE_DATA_PARALLEL_SIZE": str(axes.data),
        "JAXSERVE_ENGINE_ARGS": json.dumps(dict(config.engine)),
    }
    if rank.size > 1:
        found["JAXSERVE_COORDINATOR"] = rank.coordinator
    if config.independent:
        found |= {
            "JAXSERVE_DP_RANK": str(rank.rank),
            "JAXSERVE_DP_RANK_LOCAL": str(rank.local_rank),
            "JAXSERVE_DP_SIZE": str(rank.size),
            "JAXSERVE_DP_MASTER_IP": rank.address or "127.0.0.1",
            "JAXSERVE_DP_MASTER_PORT": str(rank.port),
            "JAXSERVE_DP_TOKEN": token,
        }
    if devices := launch.visible_devices(variables, config, rank.local_rank):
        found["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return found


def command_of(
    config: MeshConfig, rank: Rank, mesh: str, job: Job, variables: Mapping[str, str], token: str
) -> processes.Command:
    """How this machine starts a rank: this same command, which then finds its rank in the environment."""
    own = rank_variables(config, rank, variables, token) | {"PYTHONUNBUFFERED": "1"}
    argv = (sys.executable, "-m", "jaxserve", "launch", "--mesh", mesh, "--", *job.words)
    return processes.Command(rank.rank, argv, {**variables, **own})
