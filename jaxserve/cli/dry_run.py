"""`jaxserve launch --dry-run`: what would run where, and how each parameter is split, without the devices."""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.cli import flags
from jaxserve.cli.jobs import SIZES, Job, command_of
from jaxserve.config import EngineArgs, merge_overrides
from sharding.config import DEFAULT_PORT, MeshConfig
from sharding.launch import Rank

if TYPE_CHECKING:
    import jax

SHOWN = ("JAXSERVE_", "CUDA_VISIBLE_DEVICES")  # prefixes of the variables that a rank gets
SECRET = "JAXSERVE_DP_TOKEN"
LAYER = re.compile(r"\.(\d+)\.")


def describe(config: MeshConfig, job: Job, variables: Mapping[str, str]) -> Iterator[str]:
    """The lines of the plan."""
    yield from describe_mesh(config)
    for rank in all_ranks(config):
        yield from describe_rank(config, rank, job, variables)
    if job.args is None:
        yield "parameters: a script chooses its own model"
    else:
        yield from describe_model(config, job)


def describe_mesh(config: MeshConfig) -> Iterator[str]:
    axes, own, timeouts, where = config.axes, config.engine_axes, config.timeouts, config.coordinator
    yield f"{config.source}: data={axes.data} x model={axes.model} = {axes.size} {config.platform} devices"
    yield (
        f"processes: {config.processes} (hosts={config.hosts} x processes_per_host={config.processes_per_host}), "
        f"{config.devices_per_process} devices each"
    )
    if config.independent:
        yield f"engines: one in each process, data={own.data} x model={own.model}"
    if config.processes > 1:
        place = where.address or ("127.0.0.1" if config.hosts == 1 else "as the scheduler tells")
        port = where.port or ("a free port" if config.hosts == 1 else f"port {DEFAULT_PORT} or the scheduler's")
        yield f"coordinator: {place}, {port}"
        yield (
            f"limits: {timeouts.start} s to start, {timeouts.heartbeat} s without a sign of life, "
            f"{timeouts.shutdown} s to shut down, {timeouts.stop} s to stop"
        )


def all_ranks(config: MeshConfig) -> list[Rank]:
    """The ranks of all hosts, with a stand-in for an address that only the start finds out."""
    address = config.coordinator.address or ("127.0.0.1" if config.hosts == 1 else "FIRST-HOST")
    port = config.coordinator.port or DEFAULT_PORT
    each = config.processes_per_host
    return [Rank(i, config.processes, i % each, address, port, "dry run") for i in range(config.processes)]


def describe_rank(config: MeshConfig, rank: Rank, job: Job, variables: Mapping[str, str]) -> Iterator[str]:
    count = config.devices_per_process
    first = rank.rank * count
    devices = f"devices {first} to {first + count - 1}" if count > 1 else f"device {first}"
    yield f"rank {rank.rank}, host {rank.rank // config.processes_per_host}: {devices}"
    command = command_of(config, rank, "", job, {**variables, "JAXSERVE_DP_TOKEN": ""}, "...")
    own = {k: v for k, v in command.variables.items() if k.startswith(SHOWN) and (v or k != SECRET)}
    if config.hosts == 1 and config.coordinator.port is None:
        own = {k: v for k, v in own.items() if k not in ("JAXSERVE_COORDINATOR", "JAXSERVE_DP_MASTER_PORT")}
    yield "  " + " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(own.items()))
    yield "  " + shlex.join(["python" if job.args is None else "jaxserve", *job.full])


def describe_model(config: MeshConfig, job: Job) -> Iterator[str]:
    """A line for each kind of parameter, with its part and bytes on one device."""
    args = engine_args(job)
    hf_config = merge_overrides(read_config(args), args.hf_overrides)
    name, parameters = plan(config, args, hf_config)
    axes = config.engine_axes
    dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in parameters.values()}))
    yield (
        f"parameters of {args.model or 'the embedded model'} ({name}, {dtypes}), split over model={axes.model}, "
        f"whole copies over data={axes.data}:"
    )
    rows = [("parameter", "shape", "on a device", "split", "bytes on a device")]
    total = here = 0
    for label, leaf, count in grouped(parameters):
        sharding: Any = leaf.sharding
        part = sharding.shard_shape(leaf.shape)
        size = count * math.prod(part) * leaf.dtype.itemsize
        total, here = total + count * math.prod(leaf.shape) * leaf.dtype.itemsize, here + size
        split = "+".join(str(axis) for axis in sharding.spec if axis is not None) or "-"
        rows.append((label, _sizes(leaf.shape), _sizes(part), split, f"{size:,}"))
    yield from table(rows)
    yield f"  all parameters: {total:,} bytes ({total / 2**30:.2f} GiB)"
    yield f"  on each device: {here:,} bytes ({here / 2**30:.2f} GiB), before the cache and temporary arrays"


def engine_args(job: Job) -> EngineArgs:
    """The engine options of a command, without the sizes of the mesh."""
    values = {} if job.args is None else vars(job.args)
    given = {k.removeprefix(flags.ENGINE): v for k, v in values.items() if k.startswith(flags.ENGINE)}
    given = {name: value for name, value in given.items() if name not in SIZES}
    tag = values.get("model_tag")  # of serve
    return EngineArgs(**given | ({"model": tag} if tag else {}))


def read_config(args: EngineArgs) -> dict[str, Any]:
    """The model's config in Hugging Face's keys; of a model on the hub this one file is fetched.

    Raises:
        CheckpointError: there is none.
    """
    from jaxserve.checkpoints import find_model, read_hf_config
    from jaxserve.checkpoints.base import CheckpointError, read_json
    from jaxserve.checkpoints.hub import HUB_ID

    name = args.model
    if name is None or Path(name).expanduser().exists() or not HUB_ID.fullmatch(name):
        return read_hf_config(find_model(name))
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(
            name, "config.json", revision=args.revision, token=args.hf_token, cache_dir=args.download_dir
        )
    except Exception as error:  # the client lets errors of several HTTP libraries through
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"config.json of {name!r} could not be fetched from the hub: {text}; give a local folder"
        ) from error
    return read_json(Path(path))


def plan(
    config: MeshConfig, args: EngineArgs, hf_config: Mapping[str, Any]
) -> tuple[str, "dict[str, jax.ShapeDtypeStruct]"]:
    """The architecture, and the parameters with their shardings over a mesh of devices that need not exist.

    Raises:
        ValueError: an unsupported model, or a mesh that does not divide it.
    """
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    from jaxserve.config.model_facts import choose_dtype
    from jaxserve.weights import plan_model
    from sharding.mesh import AXES

    axes = config.engine_axes
    device = AbstractDevice(device_kind=config.platform, num_cores=None, platform=config.platform)
    types = (AxisType.Auto,) * len(AXES)
    mesh: Any = AbstractMesh((axes.data, axes.model), AXES, axis_types=types, abstract_device=device)
    model = plan_model(
        args.model or "",
        hf_config=hf_config,
        dtype=choose_dtype(args.dtype, hf_config, config.platform),
        load_format="dummy",  # so that nothing is looked for at the path
        mesh=mesh,
        max_model_len=args.max_model_len if isinstance(args.max_model_len, int) else None,
    )
    return hf_config["architectures"][0], model.parameters


def grouped(parameters: "Mapping[str, jax.ShapeDtypeStruct]") -> list[tuple[str, Any, int]]:
    """Parameters that differ in the number of their layer only, as one: label, one of them, how many they are."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, leaf in parameters.items():
        key = (LAYER.sub(".*.", name, count=1), leaf.shape, leaf.dtype, leaf.sharding)
        groups.setdefault(key, []).append(name)
    return [
        (f"{key[0]} x{len(names)}" if len(names) > 1 else names[0], parameters[names[0]], len(names))
        for key, names in groups.items()
    ]


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned columns, the last one to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  " + "  ".join([*cells[:-1], row[-1].rjust(widths[-1])])


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
