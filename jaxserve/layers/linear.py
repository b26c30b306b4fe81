"""Linear projections: the one place that decides how their weights lie in memory and are multiplied."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Axes = tuple[tuple[str | None, int], ...]  # (logical axis name or None where it is never sharded, size)


def contract(
    x: Float[Array, "T *inputs"], kernel: Float[Array, "..."], out_dtype: jnp.dtype | None = None
) -> Float[Array, "T *outputs"]:
    """`y[t, *outputs] = sum over inputs of x[t, *inputs] * kernel[*outputs, *inputs]`.

    Sums are accumulated in float32 or better; float32 operands are multiplied in full float32 on every backend.
    The result has `out_dtype`, by default that of `x`.
    """
    outputs = kernel.shape[: kernel.ndim - x.ndim + 1]
    # A product over several axes makes XLA transpose the whole weight in every step; merging axes costs nothing.
    flat = jax.lax.dot_general(
        x.reshape(x.shape[0], -1),
        kernel.reshape(math.prod(outputs), -1),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=out_dtype or x.dtype,
    )
    return flat.reshape(x.shape[0], *outputs)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Float[Array, "..."]:
    """Random initial weights of the given standard deviation."""
    return jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(std, dtype)


class Linear(nnx.Module):
    """A projection from named input axes to named output axes, with an optional bias over the output axes.

    The kernel is `[*outputs, *inputs]`, as checkpoints store it, so that each output's weights are contiguous: XLA on
    CPU packs and streams this order up to twice as fast as the other, and GPUs do not mind. Where an axis is to be
    sharded it comes first among its group, so that merging the group keeps the shards whole.

    Random weights keep the variance of their input, so that models with made-up weights stay finite.
    """

    def __init__(self, inputs: Axes, outputs: Axes, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        axes = (*outputs, *inputs)
        std = math.prod(size for _, size in inputs) ** -0.5
        kernel = normal(rngs, tuple(size for _, size in axes), std, dtype)
        self.kernel = nnx.Param(kernel, axes=tuple(name for name, _ in axes))
        zeros = jnp.zeros(tuple(size for _, size in outputs), dtype)
        self.bias = nnx.Param(zeros, axes=tuple(name for name, _ in outputs)) if bias else None

    def __call__(self, x: Float[Array, "T *inputs"], out_dtype: jnp.dtype | None = None) -> Float[Array, "T *outputs"]:
        y = contract(x, self.kernel[...], out_dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
