"""From a checkpoint on disk to parameters on the devices, one tensor at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.tree_util import PyTreeDef
from tqdm import tqdm

from jaxserve import models
from jaxserve.checkpoints import Checkpoint, CheckpointError, open_checkpoint, read_hf_config
from jaxserve.checkpoints.base import list_names
from jaxserve.checkpoints.orbax import is_engine_ready, read_manifest, restore_arrays
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import CausalLM
from jaxserve.models.family import Family
from jaxserve.models.table import Rule, expand
from sharding.mesh import make_mesh, platform_of
from sharding.place import place
from sharding.rules import named_sharding

LOAD_FORMATS = ("auto", "safetensors", "gguf", "orbax", "dummy")
DTYPES = ("bfloat16", "float16", "float32")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
READERS = 2  # threads that read and build parameters ahead of the one that places them

Parameters = dict[str, jax.ShapeDtypeStruct]  # dotted path -> shape, dtype and sharding, in the order of the leaves


@dataclass(frozen=True, eq=False)
class ModelPlan:
    """A model before its parameters exist: what planning memory and compiling programs need.

    Attributes:
        path: the folder or file it will be loaded from.
        hf_config: its config in Hugging Face's keys.
        load_format: "safetensors", "gguf", "orbax" or "dummy"; "auto" is "safetensors" or "gguf", by the files.
        max_model_len: as given to `plan_model`.
        parameters: the flat tuple of leaves that crosses `jit`, by name.
    """

    path: Path
    hf_config: Mapping[str, Any]
    max_model_len: int | None
    load_format: str
    family: Family
    model_config: ModelConfig
    dtype: np.dtype
    graphdef: nnx.GraphDef
    treedef: PyTreeDef  # pyright: ignore[reportInvalidTypeForm]
    parameters: Parameters
    mesh: Mesh | AbstractMesh

    @property
    def devices(self) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
        """Of its mesh; none if that is abstract."""
        return [] if isinstance(self.mesh, AbstractMesh) else list(np.asarray(self.mesh.devices).flat)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters together (of one copy of the model)."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.parameters.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of the parameters that each device holds."""
        shapes = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in self.parameters.values())
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)

    def merge(self, leaves: Iterable[jax.Array]) -> CausalLM:
        """The module with these parameters; pure, for use inside `jit`."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model whose parameters, `leaves`, lie on their devices."""

    plan: ModelPlan
    leaves: tuple[jax.Array, ...]

    @property
    def family(self) -> str:
        return self.plan.family.name

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' dotted paths, in the order of `leaves`."""
        return tuple(self.plan.parameters)

    @property
    def total_bytes(self) -> int:
        return self.plan.total_bytes

    @property
    def model_config(self) -> ModelConfig:
        return self.plan.model_config

    @property
    def dtype(self) -> np.dtype:
        return self.plan.dtype

    def merge(self, leaves: Iterable[jax.Array]) -> CausalLM:
        """The module with these parameters; pure, for use inside `jit`."""
        return self.plan.merge(leaves)


def plan_model(
    path: str | Path,
    *,
    hf_config: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    load_format: str = "auto",
    mesh: Mesh | AbstractMesh | None = None,
    max_model_len: int | None = None,
) -> ModelPlan:
    """Find out what a model's parameters will be and where they will lie; allocates and reads nothing large.

    Args:
        path: a folder or GGUF file, as `find_model` returns it.
        hf_config: replaces the config read from `path`.
        dtype: "auto", "bfloat16", "float16" ("half") or "float32" ("float"); see `resolve_dtype`.
        load_format: "safetensors", "gguf", "orbax" (made by `convert`), "auto" (what is there) or "dummy" (random
            weights made on the devices; only the config is read).
        mesh: axes ("data", "model"), abstract where nothing is to be loaded; None is one device.
        max_model_len: the longest sequence to be served, which rope settings may depend on.

    Raises:
        CheckpointError: a config or manifest that is missing or damaged.
        ValueError: an unsupported architecture or config, dtype or load_format, or a mesh that does not divide it.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format={load_format!r} is not one of {', '.join(LOAD_FORMATS)}")
    path = Path(path)
    hf_config = read_hf_config(path) if hf_config is None else hf_config
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    family = models.resolve(hf_config)
    config = family.config(hf_config, max_model_len).split(mesh.shape["model"])
    if load_format == "auto" and is_engine_ready(path):
        load_format = "orbax"
    stored = read_manifest(path)["dtype"] if load_format == "orbax" else None
    chosen = resolve_dtype(dtype, hf_config, platform_of(mesh), stored)
    graphdef, treedef, parameters = plan_parameters(family, config, chosen, mesh)
    return ModelPlan(
        path, hf_config, max_model_len, load_format, family, config, chosen, graphdef, treedef, parameters, mesh
    )


def load_weights(plan: ModelPlan, *, seed: int = 0, show_progress: bool = True) -> tuple[jax.Array, ...]:
    """The planned parameters on their devices.

    Args:
        plan: of the model.
        seed: of the dummy weights.
        show_progress: whether to draw a progress bar on stderr.

    Raises:
        CheckpointError: files that are missing, damaged, or do not fit the model.
    """
    parameters, family, config = plan.parameters, plan.family, plan.model_config
    if plan.load_format == "dummy":
        arrays = make_dummies(parameters, config, seed)
    elif plan.load_format == "orbax":
        arrays = restore_arrays(plan.path, parameters, family=family.name)
    else:
        checkpoint = open_checkpoint(plan.path, plan.load_format)
        arrays = load_parameters(
            checkpoint, plan.path, family, config, parameters=parameters, show_progress=show_progress
        )
    return tuple(arrays[name] for name in parameters)


def load_model(path: str | Path, *, seed: int = 0, show_progress: bool = True, **options: Any) -> LoadedModel:
    """Plan a model and load its parameters; `options` as for `plan_model`.

    Raises:
        CheckpointError, ValueError: as `plan_model` and `load_weights` do.
    """
    plan = plan_model(path, **options)
    return LoadedModel(plan, load_weights(plan, seed=seed, show_progress=show_progress))


def resolve_dtype(dtype: str, hf_config: Mapping[str, Any], platform: str, stored: str | None = None) -> np.dtype:
    """The parameters' dtype.

    "auto" is the `stored` dtype of an engine-ready checkpoint; otherwise float32 on CPU, and on accelerators the
    config's dtype with bfloat16 in place of float32.

    Raises:
        ValueError: an unknown dtype.
    """
    dtype = DTYPE_ALIASES.get(dtype, dtype)
    if dtype == "auto":
        declared = hf_config.get("dtype") or hf_config.get("torch_dtype")
        on_cpu = platform == "cpu"
        accelerator = "float16" if declared == "float16" else "bfloat16"
        dtype = stored or ("float32" if on_cpu else accelerator)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return jnp.dtype(dtype)


def plan_parameters(
    family: Family, config: ModelConfig, dtype: np.dtype, mesh: Mesh | AbstractMesh
) -> tuple[nnx.GraphDef, PyTreeDef, Parameters]:  # pyright: ignore[reportInvalidTypeForm]
    """What the model's parameters will be and where they will lie, nothing allocated.

    Raises:
        ValueError: a parameter that cannot be split over the mesh.
    """
    graphdef, state = models.abstract(family, config, dtype)
    variables = jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    parameters: Parameters = {}
    for keys, variable in variables:
        name = jax.tree_util.keystr(keys, simple=True, separator=".")
        struct = variable.get_value()
        try:
            sharding = named_sharding(mesh, variable.get_metadata("axes"), struct.shape)
        except ValueError as error:
            raise ValueError(f"parameter {name} {list(struct.shape)}: {error}") from error
        parameters[name] = jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)
    return graphdef, jax.tree.structure(state), parameters


def load_parameters(
    checkpoint: Checkpoint,
    path: Path,
    family: Family,
    config: ModelConfig,
    *,
    parameters: Parameters,
    show_progress: bool,
) -> dict[str, jax.Array]:
    """Read, build, cast and place every parameter; at most a few are in host memory at a time.

    Raises:
        CheckpointError: tensors that are missing, that nothing uses, or of another shape than the config says.
    """
    rules = expand(family.rules(config), config.num_layers)
    if unmade := parameters.keys() ^ {rule.target for rule in rules}:
        raise ValueError(f"the rules of the family {family.name!r} do not match its parameters: {list_names(unmade)}")
    check_names(checkpoint, path, rules, family.ignores(config))
    arrays: dict[str, jax.Array] = {}
    total = sum(checkpoint.nbytes(name) for rule in rules for name in rule.sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not show_progress) as bar:
        for rule, value in _ahead(lambda rule: build_parameter(checkpoint, rule, parameters[rule.target]), rules):
            arrays[rule.target] = place(value, parameters[rule.target].sharding)
            bar.update(sum(checkpoint.nbytes(name) for name in rule.sources))
    return arrays


def check_names(checkpoint: Checkpoint, path: Path, rules: Iterable[Rule], ignored: tuple[str, ...]) -> None:
    """Raise one `CheckpointError` for all tensors that are missing and all that nothing uses."""
    names, needed = checkpoint.names(), {name for rule in rules for name in rule.sources}
    problems = []
    if missing := needed - names:
        problems.append(f"lacks {len(missing)} of the model's tensors: {list_names(missing)}")
    extra = {name for name in names - needed if not any(fnmatch(name, pattern) for pattern in ignored)}
    if extra:
        files = {checkpoint.file(name).name for name in extra}
        problems.append(
            f"has {len(extra)} tensors (in {list_names(files)}) that the model does not use: {list_names(extra)}"
        )
    if problems:
        raise CheckpointError(
            f"{path} {', and '.join(problems)}; the config does not describe this checkpoint, or it is incomplete"
        )


def build_parameter(checkpoint: Checkpoint, rule: Rule, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
    """One parameter as a host array of the wanted shape and dtype.

    Raises:
        CheckpointError: the tensors' shapes do not make the wanted one.
    """
    reason = ""
    try:
        value = rule.build([checkpoint.read(name) for name in rule.sources])
    except CheckpointError:
        raise
    except ValueError as error:
        value, reason = None, f" ({error})"
    if value is None or value.shape != wanted.shape:
        tensors = ", ".join(f"{name} {list(checkpoint.shape(name))}" for name in rule.sources)
        made = "" if value is None else f" make a parameter of shape {list(value.shape)} and"
        raise CheckpointError(
            f"{checkpoint.file(rule.sources[0])}: {tensors}{made} do not fit the model's {rule.target} "
            f"{list(wanted.shape)}{reason}; the config does not describe this checkpoint"
        )
    return value.astype(wanted.dtype, copy=False)


def _ahead[Item, Result](function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """`(item, function(item))` in order, a few of them computed ahead in threads."""
    queue = iter(items)
    with ThreadPoolExecutor(READERS) as pool:
        pending: list[tuple[Item, Future[Result]]] = []
        try:
            while True:
                pending += [(item, pool.submit(function, item)) for item in islice(queue, READERS + 1 - len(pending))]
                if not pending:
                    return
                item, future = pending.pop(0)
                yield item, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def make_dummies(parameters: Parameters, config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """Made-up parameters, computed on their devices: norms are neutral, biases zero, the rest has variance 1/D.

    One small program per distinct shape, so that a deep model starts as fast as a shallow one.
    """
    bound = (3 / config.hidden_size) ** 0.5  # a uniform distribution of variance 1/D
    seeds = np.random.default_rng(seed).integers(0, 1 << 32, len(parameters), dtype=np.uint32)
    programs: dict[tuple, Callable[[np.uint32], jax.Array]] = {}
    arrays = {}
    for (name, wanted), own_seed in zip(parameters.items(), seeds, strict=True):
        constant = {"scale": 1.0 - config.norm_offset, "bias": 0.0}.get(name.rpartition(".")[2])
        program = (constant, wanted.shape, wanted.sharding)
        if program not in programs:
            fill = partial(_fill, shape=wanted.shape, dtype=wanted.dtype, bound=bound, constant=constant)
            programs[program] = jax.jit(fill, out_shardings=wanted.sharding)
        arrays[name] = programs[program](own_seed)
    return arrays


def _fill(
    seed: jax.Array, *, shape: tuple[int, ...], dtype: np.dtype, bound: float, constant: float | None
) -> jax.Array:
    """The constant, or values in [-bound, bound) hashed from their index; far quicker to compile than `jax.random`."""
    if constant is not None:
        return jnp.full(shape, constant, dtype)
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    signed = jax.lax.bitcast_convert_type(_hash(_hash(index) + seed), jnp.int32)
    return (signed.astype(jnp.float32) * (bound / 2**31)).astype(dtype)


def _hash(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that mixes all bits (lowbias32, https://github.com/skeeto/hash-prospector)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
