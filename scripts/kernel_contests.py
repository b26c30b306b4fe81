"""What `tune_kernels` lets run against each other: calls that XLA and kernels can make, with the shapes of models."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from profile_step import MODELS

from jaxserve.engine.blueprint import COMPILER_OPTIONS
from jaxserve.layers.linear import contract
from jaxserve.models import ModelConfig, resolve
from jaxserve.weights import read_hf_config
from pallas_kernels import block_tail, gated_mlp, matmul, norm_matmul
from pallas_kernels.block_tail import lone
from pallas_kernels.block_tail import mosaic_gpu as block_tail_stream
from pallas_kernels.gated_mlp import hopper_tiled
from pallas_kernels.gated_mlp import mosaic_gpu as gated_mlp_stream
from pallas_kernels.matmul import mosaic_gpu as matmul_stream
from pallas_kernels.norm_matmul import mosaic_gpu as norm_matmul_lone
from pallas_kernels.platform import require_hopper

COLD_BYTES = 400 << 20  # of weights in a program: eight times the L2 cache of an H100
MOST_CALLS = 32  # of a program
EPS = 1e-6  # of norms
# Of each op, the list in its file that a winner's tokens go to.
LISTS = {
    "matmul": {"mosaic_gpu": "tokens"},
    "norm_matmul": {"mosaic_gpu": "tokens"},
    "gated_mlp": {"stream": "stream", "tiled": "tiled"},
    "block_tail": {"lone": "lone", "stream": "stream"},
}
UNFIT = (NotImplementedError, ValueError, jax.errors.JaxRuntimeError)  # of kernels and their compiler

Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Contest:
    """A call that several candidates can make.

    Attributes:
        op: its name.
        key: what the file of the op calls the shapes.
        tokens: rows of the left operands.
        inputs: features of each of these.
        weights: their shapes.
        candidates: by name: `(*left operands, *weights) -> result`; one is called "xla".
    """

    op: str
    key: dict[str, Any]
    tokens: int
    inputs: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    candidates: dict[str, Callable[..., jax.Array]]

    @property
    def calls(self) -> int:
        """Of a program, so that no weights stay in the cache."""
        each = 2 * sum(math.prod(shape) for shape in self.weights)
        return min(max(-(-COLD_BYTES // each), 2), MOST_CALLS)

    @property
    def shapes(self) -> list[tuple[Shape, ...]]:
        """Of the operands of each call; with tokens in common, XLA would join weights to one product."""
        sizes = *((self.tokens, features) for features in self.inputs), *self.weights
        return [tuple(Shape(shape, jnp.bfloat16) for shape in sizes)] * self.calls

    def compile(self, name: str) -> jax.stages.Compiled | Exception:
        """The program of a candidate, or why there is none."""
        call = self.candidates[name]

        def chain(operands: Sequence[tuple[jax.Array, ...]]) -> list[jax.Array]:
            return [call(*some) for some in operands]

        try:
            return jax.jit(chain).lower(self.shapes).compile(dict(COMPILER_OPTIONS["gpu"]))
        except UNFIT as error:
            return error


def read_config(name: str) -> ModelConfig:
    """Of a known model, or of one in a folder."""
    found: dict[str, Any] = dict(MODELS[name] if name in MODELS else read_hf_config(Path(name)))
    return resolve(found).read_config(found, None)


def products(config: ModelConfig, shards: int) -> set[tuple[int, int, str]]:
    """Outputs, inputs and the result's type of a dense model's products on one of some devices."""
    width, inner = config.hidden_size, config.intermediate_size // shards
    return {
        (*qkv_sizes(config, shards), "bfloat16"),
        (width, config.num_heads // shards * config.head_dim, "bfloat16"),
        (2 * inner, width, "bfloat16"),
        (width, inner, "bfloat16"),
        (config.vocab_rows // shards, width, "float32"),
    }


def qkv_sizes(config: ModelConfig, shards: int) -> tuple[int, int]:
    """Outputs and inputs of the projection before attention."""
    heads, kv = config.num_heads // shards, max(config.num_kv_heads // shards, 1)
    return (heads + 2 * kv) * config.head_dim, config.hidden_size


def matmul_contests(configs: Iterable[ModelConfig], shards: int, tokens: Sequence[int]) -> list[Contest]:
    """Of the products of all models."""
    ctas, contests = require_hopper(), []
    for outputs, inputs, result in sorted(set().union(*(products(config, shards) for config in configs))):
        candidates: dict[str, Callable[..., jax.Array]] = {
            "xla": functools.partial(matmul.matmul, out_dtype=result, implementation="xla"),
            "mosaic_gpu": functools.partial(matmul_stream.call, out_dtype=jnp.dtype(result), ctas=ctas),
        }
        key = {"outputs": outputs, "inputs": inputs, "result": result}
        contests += [Contest("matmul", key, count, (inputs,), ((outputs, inputs),), candidates) for count in tokens]
    return contests


def gated_contests(configs: Iterable[ModelConfig], shards: int, tokens: Sequence[int]) -> list[Contest]:
    """Of the gated feed-forward layers of all models; products outside the kernels use what was found for them."""
    sms, contests = require_hopper(), []

    def tiled(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        return contract(hopper_tiled.call(x, gate_up), down)

    def plain(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        return gated_mlp.reference.gated_mlp(x, gate_up, down, jax.nn.silu, contract)

    def stream(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        gated_mlp_stream.require_room(len(down), sms)
        return gated_mlp_stream.call(x, gate_up, down)

    candidates = {"xla": plain, "stream": stream, "tiled": tiled}
    sizes = {
        (config.hidden_size, config.intermediate_size // shards) for config in configs if config.activation == "silu"
    }
    for width, inner in sorted(sizes):
        key, weights = {"width": width, "inner": inner, "outputs": width}, ((inner, 2, width), (width, inner))
        contests += [Contest("gated_mlp", key, count, (width,), weights, candidates) for count in tokens]
    return contests


def norm_contests(configs: Iterable[ModelConfig], shards: int, tokens: Sequence[int]) -> list[Contest]:
    """Of the norms and products before the attention of all models."""
    options, contests = {"norm_eps": EPS}, []
    candidates: dict[str, Callable[..., jax.Array]] = {
        "xla": lambda *operands: norm_matmul.reference.norm_matmul(*operands, contract, **options),
        "mosaic_gpu": functools.partial(norm_matmul_lone.call, multiprocessors=require_hopper(), **options),
    }
    for outputs, inputs in sorted({qkv_sizes(config, shards) for config in configs}):
        key, weights = {"outputs": outputs, "inputs": inputs}, ((inputs,), (outputs, inputs))
        contests += [Contest("norm_matmul", key, count, (inputs,), weights, candidates) for count in tokens]
    return contests


def tail_contests(configs: Iterable[ModelConfig], shards: int, tokens: Sequence[int]) -> list[Contest]:
    """Of the second halves of the layers of all models, against the best that was found for their parts.

    They are not shared by devices, which would add up in the middle.
    """
    sms, options, contests = require_hopper(), {"norm_eps": EPS}, []

    def stream(*operands: jax.Array) -> jax.Array:
        gated_mlp_stream.require_room(operands[0].shape[1], sms)
        return block_tail_stream.call(*operands, **options)

    candidates: dict[str, Callable[..., jax.Array]] = {
        "xla": lambda *operands: block_tail.reference.block_tail(*operands, jax.nn.silu, contract, **options),
        "lone": functools.partial(lone.call, multiprocessors=sms, **options),
        "stream": stream,
    }
    sizes = {
        (config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size)
        for config in configs
        if config.activation == "silu" and shards == 1
    }
    for heads, width, inner in sorted(sizes):
        key, weights = (
            {"heads": heads, "width": width, "inner": inner},
            ((width, heads), (width,), (inner, 2, width), (width, inner)),
        )
        contests += [Contest("block_tail", key, count, (width, heads), weights, candidates) for count in tokens]
    return contests


CONTESTS = {
    "matmul": matmul_contests,
    "norm_matmul": norm_contests,
    "gated_mlp": gated_contests,
    "block_tail": tail_contests,
}
