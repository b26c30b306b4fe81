"""Mesh config files: which devices and processes run one engine, written once for every host.

    platform: gpu
    axes: {data: 2, model: 4}
    hosts: 1
    processes_per_host: 1
    devices_per_process: 8
    coordinator: {address: 10.0.0.1, port: 29501}
    timeouts: {start: 120, heartbeat: 15, shutdown: 20, stop: 10}
    engine: {dtype: bfloat16, max_model_len: 8192}

Only `axes` is needed. A file that says something impossible, or something unknown, is refused with the file, the key,
the value and what to write instead.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

PLATFORMS = ("cpu", "gpu", "tpu")
MOST_DEVICES = 1 << 16
LONGEST_TIMEOUT = 24 * 3600  # seconds
DEFAULT_PORT = 29501
EMPTY: Mapping[str, Any] = MappingProxyType({})


class MeshConfigError(ValueError):
    """A mesh config file cannot be used; the message names the file, the key, the value and the remedy."""


@dataclass(frozen=True)
class Axes:
    """Sizes of the mesh: copies of the model, and devices that share each copy."""

    data: int = 1
    model: int = 1

    @property
    def size(self) -> int:
        return self.data * self.model


@dataclass(frozen=True)
class Coordinator:
    """Where the processes meet: the host of rank 0, None for this machine or what the scheduler says, and a port.

    Port None is the scheduler's own, a free one on this machine, or 29501.
    """

    address: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class Timeouts:
    """Seconds that something may take before it is an error.

    Attributes:
        start: until every process has joined.
        heartbeat: without a sign of life until a process counts as dead.
        shutdown: from the end of the first process that ended well to the end of the last.
        stop: from the request to stop to the kill.
    """

    start: int = 120
    heartbeat: int = 15
    shutdown: int = 20
    stop: int = 10


@dataclass(frozen=True)
class MeshConfig:
    """One mesh config file, checked.

    Attributes:
        axes: sizes of the whole mesh.
        platform: "cpu", "gpu" or "tpu".
        hosts: machines.
        processes_per_host: processes on each machine.
        devices_per_process: devices that each process drives.
        independent: each process runs an engine of its own over its own devices (data parallel by rank, for scripts)
            instead of all of them running one program.
        engine: engine options under their Python names; whoever builds the engine checks them.
        source: what messages call this config.
    """

    axes: Axes
    platform: str = "gpu"
    hosts: int = 1
    processes_per_host: int = 1
    devices_per_process: int = 1
    independent: bool = False
    coordinator: Coordinator = Coordinator()
    timeouts: Timeouts = Timeouts()
    engine: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    source: str = "mesh config"

    @property
    def processes(self) -> int:
        """Processes on all hosts."""
        return self.hosts * self.processes_per_host

    @property
    def engine_axes(self) -> Axes:
        """The mesh of one engine: all of it, or one process's part where each has an engine of its own."""
        return Axes(self.axes.data // self.processes, self.axes.model) if self.independent else self.axes

    def facts(self) -> dict[str, str]:
        """Every setting by its key, for comparison between ranks, wherever their files lie."""
        found = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if dataclasses.is_dataclass(value):
                value = vars(value)
            if isinstance(value, Mapping):
                found |= {f"{item.name}.{key}": json.dumps(part, sort_keys=True) for key, part in value.items()}
            elif item.name != "source":
                found[item.name] = json.dumps(value)
        return found


def load(path: str | Path) -> MeshConfig:
    """Read and check a mesh config file.

    Raises:
        MeshConfigError: it cannot be read, is not YAML, or says something unknown or impossible.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MeshConfigError(f"the mesh config {path} cannot be read: {error}") from error
    try:
        loader = _Loader(text)
        try:
            values = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise MeshConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise MeshConfigError(f"{path} is nested too deeply for a mesh config") from error
    return parse(values, str(path))


def parse(values: object, source: str = "mesh config") -> MeshConfig:
    """Check the content of a mesh config file; `source` names it in messages.

    Raises:
        MeshConfigError: something unknown, of the wrong type, or impossible.
    """
    if not isinstance(values, Mapping):
        raise MeshConfigError(f"{source} must hold keys and values such as 'axes: {{model: 4}}', got {_show(values)}")
    known = [item.name for item in dataclasses.fields(MeshConfig) if item.name != "source"]
    _refuse_unknown(values, known, source, "")
    if "axes" not in values:
        raise MeshConfigError(f"{source} has no axes; write for example 'axes: {{data: 1, model: 4}}'")
    axes = _section(Axes, values["axes"], source, "axes", 1, MOST_DEVICES)
    counts = {
        name: _whole(values[name], source, name, 1, MOST_DEVICES)
        for name in ("hosts", "processes_per_host", "devices_per_process")
        if name in values
    }
    config = MeshConfig(
        axes=axes,
        platform=_choice(values.get("platform", "gpu"), source, "platform", PLATFORMS),
        independent=_switch(values.get("independent", False), source, "independent"),
        coordinator=_coordinator(values.get("coordinator", {}), source),
        timeouts=_section(Timeouts, values.get("timeouts", {}), source, "timeouts", 1, LONGEST_TIMEOUT),
        engine=_engine(values.get("engine", {}), source),
        source=source,
        **counts,
    )
    if "devices_per_process" not in counts:
        config = dataclasses.replace(config, devices_per_process=max(1, axes.size // config.processes))
    _check_sizes(config)
    return config


def _check_sizes(config: MeshConfig) -> None:
    axes, processes, source = config.axes, config.processes, config.source
    have = processes * config.devices_per_process
    if axes.size != have:
        raise MeshConfigError(
            f"{source}: axes data={axes.data} x model={axes.model} need {axes.size} devices, but hosts={config.hosts} "
            f"x processes_per_host={config.processes_per_host} x devices_per_process={config.devices_per_process} are "
            f"{have}; change one of them so that both are equal"
        )
    if config.independent and axes.data % processes:
        raise MeshConfigError(
            f"{source}: independent: true gives each of the {processes} processes whole copies of the model, but "
            f"axes.data={axes.data} is not a multiple of {processes}; use such a multiple, or leave independent out"
        )
    if config.platform == "tpu" and config.processes_per_host != 1:
        raise MeshConfigError(
            f"{source}: processes_per_host={config.processes_per_host}, but on TPU one process drives all chips of a "
            "host; set processes_per_host: 1 and devices_per_process to the chips of a host"
        )
    if config.hosts > 1 and config.coordinator.address in ("localhost", "127.0.0.1", "::1"):
        raise MeshConfigError(
            f"{source}: coordinator.address={config.coordinator.address!r} cannot be reached from the other of the "
            f"{config.hosts} hosts; write the name or address of the first host, or leave it out under a scheduler"
        )
    timeouts = config.timeouts
    if timeouts.start < timeouts.heartbeat:
        raise MeshConfigError(
            f"{source}: timeouts.start={timeouts.start} is shorter than timeouts.heartbeat={timeouts.heartbeat}; "
            "a process must have the time to join before it can count as dead"
        )


def _coordinator(value: object, source: str) -> Coordinator:
    values = _mapping(value, source, "coordinator")
    _refuse_unknown(values, ["address", "port"], source, "coordinator.")
    address, port = values.get("address"), values.get("port")
    if address is not None:
        text = address if isinstance(address, str) else ""
        if not text or text.count(":") == 1 or any(letter.isspace() or letter == "/" for letter in text):
            raise _wrong(source, "coordinator.address", address, "a host name or an IP address without port")
    return Coordinator(address, None if port is None else _whole(port, source, "coordinator.port", 1, 65535))


def _engine(value: object, source: str) -> Mapping[str, Any]:
    values = {}
    for key, item in _mapping(value, source, "engine").items():
        if not isinstance(key, str):
            raise _wrong(source, "engine", key, "option names such as max_model_len")
        name = key.replace("-", "_")
        if name in ("tensor_parallel_size", "data_parallel_size"):
            axis = "model" if name.startswith("tensor") else "data"
            raise MeshConfigError(f"{source}: engine.{name}={_show(item)} is what axes.{axis} says; leave it out")
        if not _plain(item):
            raise _wrong(source, f"engine.{name}", item, "text, a number, true or false, or a list or mapping of them")
        values[name] = item
    return MappingProxyType(values)


def _plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return isinstance(value, str | int | float | bool | None)


def _section[T](kind: type[T], value: object, source: str, name: str, low: int, high: int) -> T:
    """A dataclass of whole numbers."""
    values = _mapping(value, source, name)
    known = [item.name for item in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    _refuse_unknown(values, known, source, f"{name}.")
    return kind(**{key: _whole(item, source, f"{name}.{key}", low, high) for key, item in values.items()})


def _mapping(value: object, source: str, name: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(source, name, value, "keys and values")
    return value


def _refuse_unknown(values: Mapping[Any, Any], known: list[str], source: str, prefix: str) -> None:
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(known)}"
            raise MeshConfigError(f"{source}: unknown key {prefix}{name} (value {_show(values[name])}); {hint}")


def _whole(value: object, source: str, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(source, name, value, f"a whole number from {low} to {high}")
    return value


def _switch(value: object, source: str, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(source, name, value, "true or false")
    return value


def _choice(value: object, source: str, name: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _wrong(source, name, value, f"one of {', '.join(choices)}")
    return value


def _wrong(source: str, name: str, value: object, rule: str) -> MeshConfigError:
    return MeshConfigError(f"{source}: {name} must be {rule}, got {_show(value)}")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


class _Loader(yaml.SafeLoader):
    """The safe loader, which in addition refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
