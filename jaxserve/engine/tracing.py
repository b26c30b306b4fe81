"""Steps as portable programs: traced and lowered once, kept on disk, and if need be made in another process.

Lowering a step with its GPU kernels takes Python seconds, and threads can only take turns at it. Lowered programs are
therefore exported (`jax.export`): what has been on this machine before is read back in milliseconds, and the rest can
come from helper processes, which need no accelerator.
"""

import hashlib
import json
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxserve.batch import Bucket, Level, Limits, State, packed_size
from jaxserve.engine.step import ScoreMode, step
from jaxserve.kv_cache import KVCache
from jaxserve.models import ModelConfig
from jaxserve.weights import ModelPlan, plan_model
from pallas_kernels.dispatch import announce, recorded
from sharding.mesh import make_mesh

PACKAGES = ("jaxserve", "pallas_kernels", "sharding")
KEPT_SECONDS = 30 * 86_400  # programs that nobody asked for in this time are removed
EXPORT_PLATFORM = {"gpu": "cuda"}  # what `jax.export` calls a platform, where the device says otherwise
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")


@dataclass(frozen=True)
class Recipe:
    """All that decides what an engine's steps are, in plain values that can be written down.

    Attributes:
        hf_config: of the model, in Hugging Face's keys.
        max_model_len: that the model was planned for.
        dtype: of parameters and cache.
        device: kind, number of cores and platform of the device that the steps are for.
    """

    hf_config: Mapping[str, Any]
    max_model_len: int | None
    dtype: str
    limits: Limits
    mode: ScoreMode
    device: tuple[str, int | None, str]

    @classmethod
    def of(cls, model: ModelPlan, limits: Limits, mode: ScoreMode, device: Any) -> "Recipe":
        """For this model on this device (a jax device)."""
        cores = device.core_count if device.platform == "gpu" else None
        place = (device.device_kind, cores, device.platform)
        return cls(model.hf_config, model.max_model_len, str(model.dtype), limits, mode, place)

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
        return cls(**values | {"device": tuple(values["device"])})

    def plan(self) -> ModelPlan:
        """The model again, from its config alone."""
        return plan_model(
            ".",
            hf_config=self.hf_config,
            dtype=self.dtype,
            load_format="dummy",
            mesh=make_mesh(devices=jax.devices()[:1]),
            max_model_len=self.max_model_len,
        )

    def digest(self, bucket: Bucket) -> str:
        """Names the program of a bucket; changes with our code, the libraries and jax's settings, too."""
        settings = {name: str(getattr(jax.config, name)) for name in SETTINGS}
        versions = (jax.__version__, flax.__version__, np.__version__)
        facts = [self.dumps(), write_bucket(bucket), settings, versions, code_digest()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def write_bucket(bucket: Bucket) -> list[int]:
    """A bucket as plain numbers."""
    return [bucket.tokens, bucket.seqs, int(bucket.level), bucket.edits, bucket.steps]


def read_bucket(numbers: list[int]) -> Bucket:
    """The bucket that `write_bucket` wrote."""
    tokens, seqs, level, edits, steps = numbers
    return Bucket(tokens, seqs, Level(level), edits, steps)


@cache
def code_digest() -> str:
    """Of the source files of all our packages."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def state_shapes(model: ModelConfig, limits: Limits, dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> State:
    """What lives on the device between steps, as shapes."""
    cache_shape = KVCache.shape(
        model.num_layers, limits.num_pages, model.num_kv_heads, limits.page_size, model.head_dim
    )

    def array(shape: tuple[int, ...], dtype: np.dtype) -> Any:  # stands where State wants an array
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return State(
        cache=KVCache(array(cache_shape, dtype)),
        tokens=array((limits.num_pages, limits.page_size), np.dtype(np.int32)),
        last_token=array((limits.max_num_seqs,), np.dtype(np.int32)),
    )


class Tracer:
    """Exports the steps of a recipe, in this process."""

    def __init__(self, recipe: Recipe, model: ModelPlan | None = None):
        """`model` spares planning it again."""
        self._recipe = recipe
        self._model = recipe.plan() if model is None else model

    def __call__(self, bucket: Bucket) -> bytes:
        """The serialized program `(leaves, leaves of the state, buffer) -> (leaves of the new state, results)`.

        A line of JSON goes before it: which implementation serves each op.
        Kernels learn of the device from the abstract mesh, so that any process makes the same program.
        """
        recipe, model = self._recipe, self._model
        kind, cores, platform = recipe.device
        state = state_shapes(model.model_config, recipe.limits, model.dtype, None)
        shapes, tree = jax.tree.flatten(state)

        def program(leaves: tuple[Array, ...], kept: list[Array], buffer: Array) -> tuple[list[Array], Array]:
            old = jax.tree.unflatten(tree, kept)
            new, packed = step(model.merge(leaves), old, buffer, bucket, recipe.limits, recipe.mode)
            return jax.tree.leaves(new), packed

        leaves = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in model.parameters.values())
        buffer = jax.ShapeDtypeStruct((packed_size(bucket, recipe.limits),), jnp.int32)
        device = jax.sharding.AbstractDevice(kind, cores, platform)
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
        platforms = [EXPORT_PLATFORM.get(platform, platform)]
        with recorded() as notes, jax.sharding.use_abstract_mesh(mesh):
            exported = jax.export.export(jax.jit(program, donate_argnums=1), platforms=platforms)(
                leaves, shapes, buffer
            )
        return json.dumps(notes).encode() + b"\n" + exported.serialize()


def load_program(blob: bytes, state: State) -> Any:
    """The function `(leaves, state, buffer) -> (state, results)` that a tracer exported; jit it to use it.

    Logs which implementation serves each op in it.
    """
    notes, _, program = blob.partition(b"\n")
    announce(json.loads(notes))
    exported, tree = jax.export.deserialize(bytearray(program)), jax.tree.structure(state)

    def call(leaves: tuple[Array, ...], state: State, buffer: Array) -> tuple[State, Array]:
        kept, packed = exported.call(leaves, jax.tree.leaves(state), buffer)
        return jax.tree.unflatten(tree, kept), packed

    return call


class ProgramStore:
    """Exported programs as files, under the digests of what made them."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.zlib"):
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink(missing_ok=True)

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
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            file.write(zlib.compress(blob))
        Path(file.name).replace(self._path(digest))
