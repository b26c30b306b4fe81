"""TPU slices by name: how many chips, how they are wired, and devices to compile for where there are none.

A slice is called as Google Cloud calls it, "v5e-8" or "v5p-16" (the number counts chips, on v4 and v5p TensorCores), or
by its topology, "v5e:2x4". The chips' figures are the published ones:
https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e.
"""

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice

MIB = 1 << 20
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # by chips
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}


class TopologyError(ValueError):
    """A slice that does not exist or cannot be compiled for here; the message says what would work."""


@dataclass(frozen=True)
class Generation:
    """One kind of TPU chip, which jax shows as one device.

    Attributes:
        name: as in slice names.
        device_kind: what jax calls it.
        accelerator: what slices are called in `TPU_ACCELERATOR_TYPE`.
        cores: TensorCores per chip; two of them work as one device ("megacore").
        counted: what the number in a slice's name counts per chip.
        shapes: topology by number of chips.
        hbm_bytes: what the compiler lets the programs of a device have, which is also the limit of the allocator.
        bandwidth: bytes per second of a chip's memory.
        flops: bfloat16 operations per second of a chip.
        ici_bandwidth: bytes per second that a chip can send to its neighbours.
    """

    name: str
    device_kind: str
    accelerator: str
    cores: int
    counted: int
    shapes: Mapping[int, str]
    hbm_bytes: int
    bandwidth: float
    flops: float
    ici_bandwidth: float

    @property
    def slices(self) -> list[str]:
        """The names of its slices."""
        return [f"{self.name}-{chips * self.counted}" for chips in self.shapes]


GENERATIONS: Mapping[str, Generation] = MappingProxyType(
    {
        one.name: one
        for one in (
            Generation("v4", "TPU v4", "v4", 2, 2, CUBES, 31_484 * MIB, 1228e9, 275e12, 300e9),
            Generation("v5e", "TPU v5 lite", "v5litepod", 1, 1, FLAT, 16_125 * MIB, 819e9, 197e12, 200e9),
            Generation("v5p", "TPU v5", "v5p", 2, 2, CUBES, 98_024 * MIB, 2765e9, 459e12, 600e9),
            Generation("v6e", "TPU v6 lite", "v6e", 1, 1, FLAT, 31_991 * MIB, 1638e9, 918e12, 400e9),
        )
    }
)


@dataclass(frozen=True)
class Slice:
    """Chips that are wired together, each of them a device.

    Attributes:
        topology: chips along each dimension, such as "2x4".
    """

    generation: Generation
    topology: str

    @classmethod
    def parse(cls, name: str) -> "Slice":
        """The slice of a name such as "v5e-8" or "v5e:2x4".

        Raises:
            TopologyError: an unknown generation or size; it lists those that there are.
        """
        match = re.fullmatch(r"(v\w+)(?:-(\d+)|:(\d+(?:x\d+)+))", name.strip().lower())
        known = next((one for one in GENERATIONS.values() if match and match[1] in (one.name, one.accelerator)), None)
        if match is None or known is None:
            raise TopologyError(
                f"{name!r} is no TPU slice that is known here: write GENERATION-SIZE such as v5e-8, or "
                f"GENERATION:SHAPE such as v5e:2x4; generations are {', '.join(GENERATIONS)}"
            )
        chips, rest = divmod(int(match[2] or 0), known.counted)
        topology = match[3] or known.shapes.get(0 if rest else chips, "")
        if topology not in known.shapes.values():
            what = "the number counts chips" if known.counted == 1 else "the number counts TensorCores, two a chip"
            raise TopologyError(
                f"there is no slice {name!r}; of {known.name} there are {', '.join(known.slices)} ({what})"
            )
        return cls(known, topology)

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.split("x")))

    @property
    def name(self) -> str:
        """As Google Cloud calls it."""
        return f"{self.generation.name}-{self.chips * self.generation.counted}"

    @property
    def host_bounds(self) -> tuple[int, int, int]:
        """Chips of one host along each dimension: one host has up to eight of a flat kind, four otherwise."""
        if self.generation.counted == 1 and self.chips in (1, 8):
            x, y = map(int, self.topology.split("x"))
            return x, y, 1
        return 2, 2, 1

    @property
    def hosts(self) -> int:
        return max(1, self.chips // math.prod(self.host_bounds))

    @property
    def abstract_device(self) -> AbstractDevice:
        """Stands for one of its devices where nothing is compiled."""
        return AbstractDevice(self.generation.device_kind, self.generation.cores, "tpu")

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables with which libtpu compiles for the slice and asks nobody about it.

        They must be set before the compiler is loaded. Several processes may compile at the same time.
        """
        count = self.chips * self.generation.counted
        return {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": f"{self.generation.accelerator}-{count}",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }

    def check_mesh(self, data: int, model: int) -> None:
        """Raise `TopologyError` unless a mesh of these sizes has a place for every chip, and a chip for every place."""
        if data * model != self.chips:
            choices = [n for n in range(1, self.chips + 1) if self.chips % n == 0]
            raise TopologyError(
                f"{self.name} has {self.chips} chips, but data={data} x model={model} are {data * model} devices; "
                f"tensor_parallel_size x data_parallel_size must be {self.chips}: choose tensor_parallel_size among "
                f"{', '.join(map(str, choices))} and data_parallel_size to match, or another slice"
            )

    def devices(self) -> list[Any]:
        """Devices that programs can be compiled for, though they do not exist.

        Raises:
            TopologyError: the TPU compiler is not installed, or it does not know the slice.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise TopologyError(
                f"compiling for {self.name} takes the TPU compiler: pip install 'jaxserve[tpu]' (x86-64 Linux; no TPU "
                "is needed)"
            )
        options: dict[str, Any] = {"chips_per_host_bounds": self.host_bounds}
        if self.generation.name == "v4":
            options["chip_config_name"] = "megacore"
        name = f"{self.generation.name}:{self.topology}"
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
        except jax.errors.JaxRuntimeError as error:
            raise TopologyError(f"the TPU compiler cannot compile for {name}: {error}") from error
        if len(found) != self.chips:
            raise TopologyError(f"the TPU compiler shows {name} as {len(found)} devices instead of {self.chips}")
        return list(found)


def generation_of(device_kind: str) -> Generation | None:
    """The generation of devices that jax calls so; None if it is not known here."""
    return next((one for one in GENERATIONS.values() if one.device_kind == device_kind), None)
