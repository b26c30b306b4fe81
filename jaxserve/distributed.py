"""Work by rank: each process takes its part of the prompts, and the results come together again.

    prompts = partition(all_prompts)                  # this rank's part
    outputs = gather(llm.generate(prompts))           # all outputs, in the order of all_prompts, on every rank

The rank comes from JAXSERVE_DP_RANK, _DP_SIZE, _DP_MASTER_IP and _DP_MASTER_PORT (or VLLM_DP_*), from torchrun's RANK
and WORLD_SIZE, or from the scheduler; `jaxserve launch` sets them. Without any there is one rank.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxserve.types import CompletionOutput, Logprob, PositionLogprobs, RequestOutput, RequestStateStats
from jaxserve.version import __version__
from sharding import channel, launch
from sharding.config import MeshConfig, Timeouts
from sharding.launch import DataParallelRank, LaunchError, Rank

GATHER_PORT_OFFSET = 1  # from the port of jax's coordinator, where ranks are known from it only
PACKAGES = ("jaxserve", "pallas_kernels", "sharding")


def current_rank(variables: Mapping[str, str] | None = None) -> DataParallelRank:
    """This process's rank among those that share the data; `variables` None is the process's own environment.

    Raises:
        LaunchError: variables that are incomplete or make no sense.
    """
    variables = launch.environment() if variables is None else variables
    found = launch.find_data_parallel_rank(variables)
    if found is not None:
        return found
    member = launch.find_rank(variables)
    if member is None or member.size == 1:
        return DataParallelRank(0, 1, "127.0.0.1", launch.DEFAULT_PORT)
    # The port of jax's coordinator may be in use by jax itself.
    token = variables.get("JAXSERVE_DP_TOKEN", "")
    host, port = launch.split_address(member.coordinator, launch.DEFAULT_PORT, member.source)
    return DataParallelRank(member.rank, member.size, host, port + GATHER_PORT_OFFSET, token)


def partition[T](items: Sequence[T], rank: int | None = None, size: int | None = None) -> list[T]:
    """This rank's part of the items: neighbours, in order, the first `len(items) % size` parts one longer.

    Args:
        items: the same on every rank.
        rank: 0 to `size` - 1; None is this process's own.
        size: number of parts; None is the number of ranks.

    Raises:
        ValueError: one of rank and size without the other, or a rank out of range.
        LaunchError: the environment makes no sense.
    """
    if (rank is None) != (size is None):
        raise ValueError(f"give both rank and size or neither, got {rank=} and {size=}")
    if rank is None or size is None:
        mine = current_rank()
        rank, size = mine.rank, mine.size
    if not 0 <= rank < size:
        raise ValueError(f"rank must be in 0 to size - 1, got {rank=} and {size=}")
    floor, rest = divmod(len(items), size)
    begin = rank * floor + min(rank, rest)
    return list(items[begin : begin + floor + (rank < rest)])


def gather(
    outputs: Sequence[Any], *, to_all: bool = True, timeout: float = 600.0, ranks: DataParallelRank | None = None
) -> list[Any]:
    """The outputs of all ranks one after another, so that parts of `partition` come back in order.

    Every rank calls this, as often as the others; parts may be empty and of different length.

    Args:
        outputs: this rank's: `RequestOutput`s, or plain objects (None, bool, int, float, str, bytes, list, dict, numpy
            arrays).
        to_all: whether every rank gets the whole; else rank 0 does and the others get an empty list.
        timeout: seconds to wait for the slowest rank.
        ranks: where the ranks meet; None is what the environment says.

    Raises:
        TimeoutError: a rank did not come; names it.
        ChannelError: a rank is gone or failed; names it.
        CodecError: an output of another type.
        LaunchError: the environment makes no sense.
    """
    mine = current_rank() if ranks is None else ranks
    part = [to_plain(output) for output in outputs]
    if mine.size == 1:
        return list(outputs)
    parts = _gather_first(part, mine, to_all, timeout) if mine.rank == 0 else _gather_other(part, mine, timeout)
    return [from_plain(output) for part in parts for output in part]


def _gather_first(part: list[Any], mine: DataParallelRank, to_all: bool, timeout: float) -> list[list[Any]]:
    deadline = time.monotonic() + timeout
    with channel.listener(mine.address, mine.port, mine.size) as server:
        connections = channel.accept_all(server, mine.size, mine.token.encode(), timeout)
    leader = channel.Leader(connections, timeout)
    try:
        parts = [part, *leader.collect(max(1.0, deadline - time.monotonic())).values()]
        # The others wait for this, so that none of them comes with its next part while this one is collected.
        leader.send(parts if to_all else [])
    except Exception as error:
        leader.fail(f"gather failed: {error}")
        raise
    finally:
        leader.close()
    return parts


def _gather_other(part: list[Any], mine: DataParallelRank, timeout: float) -> list[list[Any]]:
    deadline = time.monotonic() + timeout
    link = channel.connect_until(mine.address, mine.port, mine.rank, mine.token.encode(), timeout)
    follower = channel.Follower(link, timeout)
    try:
        follower.send(part)
        return follower.receive(max(1.0, deadline - time.monotonic()) + channel.ANSWER_SECONDS)
    finally:
        follower.close()


def to_plain(value: Any) -> dict[str, Any]:
    """A `RequestOutput`, or a plain object as it is, in a form that can travel."""
    if not isinstance(value, RequestOutput):
        return {"plain": value}
    outputs = [_fields(item) | {"logprobs": _map(item.logprobs, _logprobs_to_plain)} for item in value.outputs]
    changed = {
        "outputs": outputs,
        "prompt_logprobs": _map(value.prompt_logprobs, _logprobs_to_plain),
        "metrics": None if value.metrics is None else _fields(value.metrics),
    }
    return {"request": _fields(value) | changed}


def from_plain(value: Mapping[str, Any]) -> Any:
    """What `to_plain` was given."""
    if "plain" in value:
        return value["plain"]
    fields = value["request"]
    outputs = [
        CompletionOutput(**item | {"logprobs": _map(item["logprobs"], _logprobs_from_plain)})
        for item in fields["outputs"]
    ]
    changed = {
        "outputs": outputs,
        "prompt_logprobs": _map(fields["prompt_logprobs"], _logprobs_from_plain),
        "metrics": None if fields["metrics"] is None else RequestStateStats(**fields["metrics"]),
    }
    return RequestOutput(**fields | changed)


def _fields(item: Any) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}


def _map(positions: Sequence[Any] | None, change: Callable[[Any], Any]) -> list[Any] | None:
    return None if positions is None else [None if position is None else change(position) for position in positions]


def _logprobs_to_plain(position: PositionLogprobs) -> dict[int, list[Any]]:
    return {token: list(entry) for token, entry in position.items()}


def _logprobs_from_plain(position: Mapping[int, Sequence[Any]]) -> PositionLogprobs:
    return {token: Logprob(*entry) for token, entry in position.items()}


def initialize(config: MeshConfig | None = None) -> Rank | None:
    """Join the other processes of this program, as the environment says; before anything else uses jax.

    `jaxserve launch` has done it for what it runs. A script that srun, mpirun or torchrun starts calls this first.

    Args:
        config: the mesh that the processes form; None takes the devices as jax finds them.

    Returns:
        This process's rank, None where it is alone.

    Raises:
        LaunchError: the environment makes no sense, not all ranks came, or the devices are not what `config` says.
        Disagreement: ranks run different code or have different configs.
    """
    variables = launch.environment()
    rank = launch.find_rank(variables, config)
    if rank is None and config is not None and config.platform == "tpu" and config.processes > 1:
        rank = launch.ask_jax(config)
    return join(rank, config)


def join(rank: Rank | None, config: MeshConfig | None) -> Rank | None:
    """`initialize` for a rank that is known (None: this process is alone).

    Processes with an engine of their own (`independent`) get their devices and do not wait for each other.
    """
    if config is not None:
        if rank is not None and rank.size != config.processes:
            raise LaunchError(
                f"{rank.source} says that there are {rank.size} processes, but {config.source} says "
                f"{config.processes} (hosts={config.hosts} x processes_per_host={config.processes_per_host}); make "
                "them equal"
            )
        launch.set_up_devices(config, launch.environment(), rank.local_rank if rank else 0)
    timeouts = Timeouts() if config is None else config.timeouts
    independent = config is not None and config.independent
    if rank is not None and rank.size > 1 and not independent:
        facts = {"code version": code_version()}
        if config is not None:
            facts |= {f"mesh config, {name}": value for name, value in config.facts().items()}
        launch.start(rank, timeouts, facts)
    if config is not None:
        launch.check_devices(config)
    return rank


def engine_options(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The engine options of the mesh config that `jaxserve launch` runs a script with, for `LLM(**engine_options())`.

    Empty without the launcher; `variables` None is this process's own environment.
    """
    variables = launch.environment() if variables is None else variables
    names = ("tensor_parallel_size", "data_parallel_size")
    sizes = {name: int(text) for name in names if (text := variables.get(f"JAXSERVE_{name.upper()}"))}
    return sizes | json.loads(variables.get("JAXSERVE_ENGINE_ARGS") or "{}")


def code_version() -> str:
    """The versions of jaxserve and jax and a digest of our source files: equal where the code is."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"jaxserve {__version__} {digest.hexdigest()[:12]}, jax {version('jax')}, jaxlib {version('jaxlib')}"
