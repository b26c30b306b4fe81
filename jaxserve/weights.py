"""From a checkpoint on disk to parameters on the devices, one tensor at a time."""

import json
import math
import shutil
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
from jax.sharding import Mesh
from jax.tree_util import PyTreeDef
from tqdm import tqdm

from jaxserve import models
from jaxserve.checkpoints import (
    Checkpoint,
    CheckpointError,
    find_model,
    open_checkpoint,
    read_generation_config,
    read_hf_config,
)
from jaxserve.checkpoints.base import list_names
from jaxserve.checkpoints.orbax import MANIFEST, is_engine_ready, read_manifest, restore_arrays, save_arrays
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import CausalLM
from jaxserve.models.family import Family
from jaxserve.models.table import Rule, expand
from sharding.mesh import make_mesh
from sharding.place import place
from sharding.rules import named_sharding

LOAD_FORMATS = ("auto", "safetensors", "gguf", "orbax", "dummy")
DTYPES = ("bfloat16", "float16", "float32")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
READERS = 2  # threads that read and build parameters ahead of the one that places them
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model whose parameters lie on their devices.

    Attributes:
        path: the folder or file it came from.
        hf_config: its config in Hugging Face's keys.
        names: the parameters' dotted paths, in the order of `leaves`.
        leaves: the parameters, the flat tuple that crosses `jit`.
    """

    path: Path
    hf_config: Mapping[str, Any]
    family: str
    model_config: ModelConfig
    dtype: np.dtype
    graphdef: nnx.GraphDef
    treedef: PyTreeDef  # pyright: ignore[reportInvalidTypeForm]
    names: tuple[str, ...]
    leaves: tuple[jax.Array, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters together (of one copy of the model)."""
        return sum(leaf.nbytes for leaf in self.leaves)

    def merge(self, leaves: Iterable[jax.Array]) -> CausalLM:
        """The module with these parameters; pure, for use inside `jit`."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


def load_model(
    path: str | Path,
    *,
    hf_config: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    load_format: str = "auto",
    mesh: Mesh | None = None,
    max_model_len: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> LoadedModel:
    """Load a model's parameters onto the devices of `mesh`.

    Args:
        path: a folder or GGUF file, as `find_model` returns it.
        hf_config: replaces the config read from `path`.
        dtype: "auto", "bfloat16", "float16" ("half") or "float32" ("float"); see `resolve_dtype`.
        load_format: "safetensors", "gguf", "orbax" (made by `convert`), "auto" (what is there) or "dummy" (random
            weights made on the devices; only the config is read).
        mesh: axes ("data", "model"); None is one device.
        max_model_len: the longest sequence to be served, which rope settings may depend on.
        seed: of the dummy weights.
        show_progress: whether to draw a progress bar on stderr.

    Raises:
        CheckpointError: files that are missing, damaged, or do not fit the model.
        ValueError: an unsupported architecture or config, dtype or load_format, or a mesh that does not divide it.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format={load_format!r} is not one of {', '.join(LOAD_FORMATS)}")
    path = Path(path)
    hf_config = read_hf_config(path) if hf_config is None else hf_config
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    family = models.resolve(hf_config)
    config = family.config(hf_config, max_model_len)
    engine_ready = load_format == "orbax" or (load_format == "auto" and is_engine_ready(path))
    stored = read_manifest(path)["dtype"] if engine_ready else None
    chosen = resolve_dtype(dtype, hf_config, mesh, stored)
    graphdef, treedef, parameters = plan_parameters(family, config, chosen, mesh)
    if load_format == "dummy":
        arrays = make_dummies(parameters, config, seed)
    elif engine_ready:
        arrays = restore_arrays(path, parameters, family=family.name)
    else:
        checkpoint = open_checkpoint(path, load_format)
        arrays = load_parameters(checkpoint, path, family, config, parameters=parameters, show_progress=show_progress)
    leaves = tuple(arrays[name] for name in parameters)
    return LoadedModel(path, hf_config, family.name, config, chosen, graphdef, treedef, tuple(parameters), leaves)


def resolve_dtype(dtype: str, hf_config: Mapping[str, Any], mesh: Mesh, stored: str | None = None) -> np.dtype:
    """The parameters' dtype.

    "auto" is the `stored` dtype of an engine-ready checkpoint; otherwise float32 on CPU, and on accelerators the
    config's dtype with bfloat16 in place of float32.

    Raises:
        ValueError: an unknown dtype.
    """
    dtype = DTYPE_ALIASES.get(dtype, dtype)
    if dtype == "auto":
        declared = hf_config.get("dtype") or hf_config.get("torch_dtype")
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        accelerator = "float16" if declared == "float16" else "bfloat16"
        dtype = stored or ("float32" if on_cpu else accelerator)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return jnp.dtype(dtype)


Parameters = dict[str, jax.ShapeDtypeStruct]  # dotted path -> shape, dtype and sharding, in the order of the leaves


def plan_parameters(
    family: Family, config: ModelConfig, dtype: np.dtype, mesh: Mesh
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


def save_checkpoint(loaded: LoadedModel, folder: Path, load_tokenizer: Callable[[Path], Any]) -> None:
    """Write an engine-ready checkpoint into an existing, empty folder.

    Args:
        loaded: the model; its config, generation config and tokenizer are taken from `loaded.path`.
        folder: where to write.
        load_tokenizer: called with a GGUF file, gives its tokenizer as a transformers one (for `save_pretrained`).
    """
    config = {key: value for key, value in loaded.hf_config.items() if key != "torch_dtype"}
    _write_json(folder / "config.json", config | {"dtype": loaded.dtype.name})
    if generation := read_generation_config(loaded.path):
        _write_json(folder / "generation_config.json", generation)
    if loaded.path.is_file():
        load_tokenizer(loaded.path).save_pretrained(folder)
    else:
        for name in TOKENIZER_FILES:
            if (loaded.path / name).is_file():
                shutil.copyfile(loaded.path / name, folder / name)
    arrays = dict(zip(loaded.names, loaded.leaves, strict=True))
    save_arrays(folder, arrays, family=loaded.family, dtype=loaded.dtype.name)


def convert(
    model: str | Path | None,
    out: str | Path,
    *,
    load_tokenizer: Callable[[Path], Any],
    dtype: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    download_dir: str | Path | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Path:
    """Write a model as an engine-ready checkpoint that `load_model` restores without fusing or casting.

    Nothing appears at `out` before everything is written.

    Args:
        model, revision, token, download_dir: as for `find_model`.
        out: the folder to make.
        load_tokenizer: as for `save_checkpoint`.
        dtype: as for `load_model`.
        overwrite: whether an engine-ready checkpoint at `out` may be replaced.

    Returns:
        `out`.

    Raises:
        CheckpointError: the model cannot be read, or `out` holds something.
    """
    out = Path(out).expanduser().absolute()
    _check_free(out, overwrite)
    path = find_model(model, revision, token, download_dir)
    if path.resolve() == out.resolve():
        raise CheckpointError(f"{out} is the model itself; name another output folder")
    loaded = load_model(path, dtype=dtype, show_progress=show_progress)
    partial_folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        save_checkpoint(loaded, partial_folder, load_tokenizer)
        if out.exists():
            shutil.rmtree(out)
        partial_folder.rename(out)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return out


def _check_free(out: Path, overwrite: bool) -> None:
    """Raise unless `out` may be written: absent, empty, or an earlier conversion that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_engine_ready(out):
        raise CheckpointError(f"{out} exists and holds something other than a converted model; name another folder")
    if not overwrite:
        raise CheckpointError(
            f"{out} already holds a converted model ({MANIFEST}); name another folder or overwrite it"
        )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
