"""Linear projections: the one place that decides how their weights lie in memory and are multiplied."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.matmul import matmul, reference
from sharding.collectives import shard, shards
from sharding.rules import is_split

Axes = tuple[tuple[str | None, int], ...]  # (logical axis name or None where it is never sharded, size)

FEW_ROWS = 16  # up to so many rows, XLA on CPU is faster with the weights as left operand


def contract(
    x: Float[Array, "T *inputs"], kernel: Float[Array, "..."], out_dtype: jnp.dtype | None = None
) -> Float[Array, "T *outputs"]:
    """`y[t, *outputs] = sum over inputs of x[t, *inputs] * kernel[*outputs, *inputs]`.

    Sums are accumulated in float32 or better; float32 operands are multiplied in full float32 on every backend.
    The result has `out_dtype`, by default that of `x`.
    """
    outputs = kernel.shape[: kernel.ndim - x.ndim + 1]
    # A product over several axes makes XLA transpose the whole weight in every step; merging axes costs nothing.
    rows, weights = x.reshape(x.shape[0], -1), kernel.reshape(math.prod(outputs), -1)
    dtype = jnp.dtype(out_dtype or x.dtype)
    plain = partial(reference.matmul, out_dtype=dtype)
    if len(rows) == 1:
        flat = jax.lax.platform_dependent(rows, weights, cuda=partial(_lone_row, out_dtype=dtype), default=plain)
    elif len(rows) <= FEW_ROWS and x.dtype == kernel.dtype == jnp.float32:
        flat = jax.lax.platform_dependent(rows, weights, cpu=partial(_weights_first, out_dtype=dtype), default=plain)
    else:
        flat = matmul(rows, weights, dtype)
    return flat.reshape(x.shape[0], *outputs)


def _weights_first(x: Float[Array, "T i"], weights: Float[Array, "o i"], out_dtype: jnp.dtype) -> Float[Array, "T o"]:
    """The same product turned round: XLA's CPU library repacks its right operand in every call, so let that be `x`."""
    product = reference.matmul(weights, x, out_dtype)
    return jax.lax.optimization_barrier(product).T  # without the barrier XLA turns it back


def _lone_row(x: Float[Array, "1 i"], weights: Float[Array, "o i"], out_dtype: jnp.dtype) -> Float[Array, "1 o"]:
    """The same product as a sum, which XLA fuses into one kernel at the speed of the GPU's memory.

    For a lone row cuBLAS is slower, and where it cannot give the result's type XLA converts the weights in every step.
    """
    product = x.astype(jnp.float32) * weights.astype(jnp.float32)
    return jnp.sum(product, axis=1)[None].astype(out_dtype)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Float[Array, "..."]:
    """Random initial weights of the given standard deviation."""
    return jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(std, dtype)


class Linear(nnx.Module):
    """A projection from named input axes to named output axes, with an optional bias over the output axes.

    The kernel is `[*outputs, *inputs]`, as checkpoints store it, so that each output's weights are contiguous: XLA on
    CPU packs and streams this order up to twice as fast as the other, and GPUs do not mind. Where an axis is to be
    sharded it comes first among its group, so that merging the group keeps the shards whole. Where an input axis is
    split, the result is this device's part of every sum, the bias being part of the first: `Sums.total` adds them up.

    Random weights keep the variance of their input, so that models with made-up weights stay finite.
    """

    def __init__(self, inputs: Axes, outputs: Axes, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        axes = (*outputs, *inputs)
        std = math.prod(size for _, size in inputs) ** -0.5
        kernel = normal(rngs, tuple(size for _, size in axes), std, dtype)
        self.kernel = nnx.Param(kernel, axes=tuple(name for name, _ in axes))
        zeros = jnp.zeros(tuple(size for _, size in outputs), dtype)
        self.partial = any(is_split(name) for name, _ in inputs)
        self.bias = nnx.Param(zeros, axes=tuple(name for name, _ in outputs)) if bias else None

    def __call__(self, x: Float[Array, "T *inputs"], out_dtype: jnp.dtype | None = None) -> Float[Array, "T *outputs"]:
        y = contract(x, self.kernel[...], out_dtype)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(y.dtype)
        return y + (jnp.where(shard() == 0, bias, 0) if self.partial and shards() > 1 else bias)
