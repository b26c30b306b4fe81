"""Steps as portable programs: traced and lowered once, kept on disk, and if need be made in another process.

Lowering a step with its GPU kernels takes Python seconds, and threads can only take turns at it. Lowered programs are
therefore exported (`jax.export`): what has been on this machine before is read back in milliseconds, and the rest can
come from helper processes, which need no accelerator.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxserve.batch import Bucket, Level, Limits, State, packed_size
from jaxserve.engine.step import ScoreMode, step
from jaxserve.kv_cache import KVCache
from jaxserve.models import ModelConfig
from jaxserve.sums import PLAIN, Sums
from jaxserve.weights import ModelPlan, plan_model
from pallas_kernels.all_reduce.mailbox import TABLE_WORDS
from pallas_kernels.dispatch import announce, preferring, recorded
from sharding.mesh import AXES, abstract_mesh, platform_of

PACKAGES = ("jaxserve", "pallas_kernels", "sharding")
KEPT_SECONDS = 30 * 86_400  # programs that nobody asked for in this time are removed
STEPS = "steps"  # folder of programs within one of compiled programs
UNFINISHED, UNFINISHED_SECONDS = "unfinished-", 3600  # files that a process was writing, unless it was killed
EXPORT_PLATFORM = {"gpu": "cuda"}  # what `jax.export` calls a platform, where the device says otherwise
# What kernels are written in. jax adds to the keys of its caches when it imports them: within the first program that
# happened between two layers, which were then traced twice.
KERNEL_LANGUAGES = ("jax.experimental.pallas.mosaic_gpu", "jax.experimental.pallas.tpu")
KERNEL_RUNTIME = "jax.experimental.mosaic.gpu.core"  # importing it tells XLA where the library is that kernels call
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")


@dataclass(frozen=True)
class Recipe:
    """All that decides what an engine's steps are, in plain values that can be written down.

    Attributes:
        hf_config: of the model, in Hugging Face's keys.
        max_model_len: that the model was planned for.
        dtype: of parameters and cache.
        device: kind, number of cores and platform of the devices that the steps are for.
        mesh: sizes of the axes "data" and "model".
        kernels: pairs of an op and its implementation, where that was chosen.
        mailboxes: whether the devices that share a copy of the model have given one another memory for their sums.
    """

    hf_config: Mapping[str, Any]
    max_model_len: int | None
    dtype: str
    limits: Limits
    mode: ScoreMode
    device: tuple[str, int | None, str]
    mesh: tuple[int, int] = (1, 1)
    kernels: tuple[tuple[str, str], ...] = ()
    mailboxes: bool = False

    @classmethod
    def of(cls, model: ModelPlan, limits: Limits, mode: ScoreMode, device: Any) -> "Recipe":
        """For this model on the devices of its mesh, of which one is `device` (or stands for them)."""
        place = device_facts(device)
        sizes = (model.mesh.shape["data"], model.mesh.shape["model"])
        return cls(model.hf_config, model.max_model_len, str(model.dtype), limits, mode, place, sizes)

    def dumps(self) -> str:
        """As JSON; raises `TypeError` if the config holds what JSON has no word for."""
        return json.dumps(asdict(self) | {"mode": tuple(self.mode)}, sort_keys=True)

    @property
    def portable(self) -> bool:
        """Whether it can be written down at all."""
        try:
            return bool(self.dumps())
        except TypeError:
            return False

    @classmethod
    def loads(cls, text: str) -> "Recipe":
        """The recipe that `dumps` wrote."""
        values = json.loads(text)
        values |= {"limits": Limits(**values["limits"]), "mode": ScoreMode(*values["mode"])}
        values["kernels"] = tuple((op, name) for op, name in values["kernels"])
        return cls(**values | {name: tuple(values[name]) for name in ("device", "mesh")})

    def plan(self, mesh: Mesh | None = None) -> ModelPlan:
        """The model again, from its config alone; without a mesh for devices that need not exist here."""
        return plan_model(
            ".",
            hf_config=self.hf_config,
            dtype=self.dtype,
            load_format="dummy",
            mesh=self.abstract_mesh if mesh is None else mesh,
            max_model_len=self.max_model_len,
        )

    @property
    def abstract_mesh(self) -> jax.sharding.AbstractMesh:
        """Stands for the devices, which need not exist here."""
        kind, cores, platform = self.device
        return abstract_mesh(*self.mesh, AbstractDevice(kind, cores, platform))

    def digest(self, bucket: Bucket) -> str:
        """Names the program of a bucket; changes with our code, the libraries and jax's settings, too."""
        settings = {name: str(getattr(jax.config, name)) for name in SETTINGS}
        versions = (jax.__version__, flax.__version__, np.__version__)
        facts = [self.dumps(), write_bucket(bucket), settings, versions, code_digest()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def device_facts(device: Any) -> tuple[str, int | None, str]:
    """Kind, number of cores (SMs of a GPU, TensorCores of a TPU) and platform of a device, which may be abstract."""
    if device.platform == "gpu" and not isinstance(device, AbstractDevice):
        return device.device_kind, device.core_count, "gpu"
    return device.device_kind, None if device.platform == "cpu" else device.num_cores, device.platform


def write_bucket(bucket: Bucket) -> list[int]:
    """A bucket as plain numbers."""
    return [bucket.tokens, bucket.seqs, int(bucket.level), bucket.edits, bucket.steps]


def read_bucket(numbers: list[int]) -> Bucket:
    """The bucket that `write_bucket` wrote."""
    tokens, seqs, level, edits, steps = numbers
    return Bucket(tokens, seqs, Level(level), edits, steps)


@cache
def code_digest() -> str:
    """Of the source files of all our packages, and of the sizes that kernels read from files."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(path for kind in ("*.py", "*.json") for path in (root / package).rglob(kind)):
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def state_shapes(
    model: ModelConfig, limits: Limits, dtype: np.dtype, mesh: Mesh | AbstractMesh, *, mailboxes: bool = False
) -> State:
    """What lives on the devices between steps, as shapes: the pools of all shards of "data" one after the other.

    With `mailboxes` the tables of all devices follow, and the number of sums.
    """
    pools = mesh.shape["data"]
    cache_shape = KVCache.shape(
        model.num_layers,
        limits.num_pages * pools,
        model.num_kv_heads,
        limits.page_size,
        model.head_dim,
        platform=platform_of(mesh),
    )

    def array(shape: tuple[int, ...], spec: P, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    tables = (mesh.size * TABLE_WORDS,)
    return State(
        KVCache(array(cache_shape, P(None, "data", None, "model"), dtype)),
        tokens=array((limits.num_pages * pools, limits.page_size), P("data")),
        last_token=array((limits.max_num_seqs * pools,), P("data")),
        sums=Sums(array(tables, P(AXES)), array((1,), P())) if mailboxes else PLAIN,
    )


class Tracer:
    """Exports the steps of a recipe, in this process."""

    def __init__(self, recipe: Recipe, model: ModelPlan | None = None):
        """`model` spares planning it again."""
        self._recipe = recipe
        self._model = recipe.plan() if model is None else model

    def __call__(self, bucket: Bucket) -> bytes:
        """The serialized program `(leaves, leaves of the state, buffer) -> (leaves of the new state, results)`.

        A line of JSON goes before it: which implementation serves each op. Each device runs the same step on its part
        of the weights and of the state; those that share a copy of the model add up their parts where layers say so.
        Kernels learn of the device from the abstract mesh, so that any process makes the same program.
        """
        recipe, model, mesh = self._recipe, self._model, self._recipe.abstract_mesh
        platform = recipe.device[2]
        for name in KERNEL_LANGUAGES if platform != "cpu" else ():
            import_module(name)
        state = state_shapes(model.model_config, recipe.limits, model.dtype, mesh, mailboxes=recipe.mailboxes)
        shapes, tree = jax.tree.flatten(state)
        kept_specs = [shape.sharding.spec for shape in shapes]

        def program(leaves: tuple[Array, ...], kept: list[Array], buffer: Array) -> tuple[list[Array], Array]:
            old = jax.tree.unflatten(tree, kept)
            new, packed = step(model.merge(leaves), old, buffer, bucket, recipe.limits, recipe.mode)
            if recipe.mesh[0] > 1:  # so that one process sees the results of all copies
                packed = jax.lax.all_gather(packed, "data", tiled=True)
            return jax.tree.leaves(new), packed

        leaves = tuple(model.parameters.values())
        arguments = leaves, shapes, buffer_shape(bucket, recipe.limits, mesh)
        if mesh.size > 1:
            ins = tuple(leaf.sharding.spec for leaf in leaves), kept_specs, P("data")
            program = jax.shard_map(program, mesh=mesh, in_specs=ins, out_specs=(kept_specs, P()), check_vma=False)
        else:
            mesh = AbstractMesh((), (), abstract_device=mesh.abstract_device)
        given = jax.tree.map(partial(_on, mesh), arguments)
        platforms = [EXPORT_PLATFORM.get(platform, platform)]
        with recorded() as notes, preferring(dict(recipe.kernels)), jax.sharding.use_abstract_mesh(mesh):
            exported = jax.export.export(jax.jit(program, donate_argnums=1), platforms=platforms)(*given)
        return json.dumps(notes).encode() + b"\n" + exported.serialize()


def _on(mesh: AbstractMesh, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The array on that mesh; without one, on no device in particular."""
    sharding = NamedSharding(mesh, P()) if mesh.empty else NamedSharding(mesh, shape.sharding.spec)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def buffer_shape(bucket: Bucket, limits: Limits, mesh: Mesh | AbstractMesh) -> jax.ShapeDtypeStruct:
    """The packed inputs of a step, one buffer after the other for the shards of "data"."""
    words = packed_size(bucket, limits) * mesh.shape["data"]
    return jax.ShapeDtypeStruct((words,), jnp.int32, sharding=NamedSharding(mesh, P("data")))


def load_program(blob: bytes, state: State) -> Any:
    """The function `(leaves, state, buffer) -> (state, results)` that a tracer exported; jit it to use it.

    Logs which implementation serves each op in it.
    """
    notes, _, program = blob.partition(b"\n")
    announce(json.loads(notes))
    exported, tree = jax.export.deserialize(bytearray(program)), jax.tree.structure(state)
    if EXPORT_PLATFORM["gpu"] in exported.platforms:
        import_module(KERNEL_RUNTIME)

    def call(leaves: tuple[Array, ...], state: State, buffer: Array) -> tuple[State, Array]:
        kept, packed = exported.call(leaves, jax.tree.leaves(state), buffer)
        return jax.tree.unflatten(tree, kept), packed

    return call


class ProgramStore:
    """Exported programs as files, under the digests of what made them."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for pattern, seconds in (("*.zlib", KEPT_SECONDS), (f"{UNFINISHED}*", UNFINISHED_SECONDS)):
            for path in folder.glob(pattern):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    if time.time() - path.stat().st_mtime > seconds:
                        path.unlink()

    @classmethod
    def inside(cls, cache: Path) -> "ProgramStore":
        """The one in a folder of compiled programs."""
        return cls(cache / STEPS)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.zlib"

    def get(self, digest: str) -> bytes | None:
        """The program, if it is there and whole."""
        path = self._path(digest)
        try:
            blob = zlib.decompress(path.read_bytes())
            path.touch()
        except (OSError, zlib.error):
            return None
        return blob

    def put(self, digest: str, blob: bytes) -> None:
        """Keep a program; other processes see all of it or nothing."""
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=_unfinished(), delete=False) as file:
            file.write(zlib.compress(blob))
        Path(file.name).replace(self._path(digest))


def _unfinished() -> str:
    """How names of files begin that this process is writing."""
    return f"{UNFINISHED}{os.getpid()}-"


def remove_unfinished(cache: Path) -> None:
    """Remove the programs that this process, which is about to end, has not written to their end."""
    for path in (cache / STEPS).glob(f"{_unfinished()}*"):
        path.unlink(missing_ok=True)
