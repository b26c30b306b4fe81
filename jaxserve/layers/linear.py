"""Linear projections: the one place that decides how their weights lie in memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

# "out_in": kernels are [*outputs, *inputs], as checkpoints and embeddings store them; "in_out": [*inputs, *outputs].
KERNEL_LAYOUT = "out_in"

Axes = tuple[tuple[str | None, int], ...]  # (logical axis name or None where it is never sharded, size)


def to_layout(weight: np.ndarray, num_outputs: int) -> np.ndarray:
    """Bring a weight `[*outputs, *inputs]` with `num_outputs` output axes into the layout of `Linear.kernel`."""
    if KERNEL_LAYOUT == "out_in":
        return weight
    return np.ascontiguousarray(np.moveaxis(weight, range(num_outputs), range(-num_outputs, 0)))


def contract(
    x: Float[Array, "T *inputs"], kernel: Float[Array, "..."], layout: str, out_dtype: jnp.dtype | None = None
) -> Float[Array, "T *outputs"]:
    """Sum over every axis of `x` but the first with the input axes of `kernel` (`layout` as `KERNEL_LAYOUT`).

    Sums are accumulated in float32 or better; float32 operands are multiplied in full float32 on every backend.
    The result has `out_dtype`, by default that of `x`.
    """
    num_inputs = x.ndim - 1
    first = kernel.ndim - num_inputs if layout == "out_in" else 0
    return jax.lax.dot_general(
        x,
        kernel,
        ((tuple(range(1, x.ndim)), tuple(range(first, first + num_inputs))), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=out_dtype or x.dtype,
    )


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Float[Array, "..."]:
    """Random initial weights of the given standard deviation."""
    return jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(std, dtype)


class Linear(nnx.Module):
    """A projection from named input axes to named output axes, with an optional bias over the output axes.

    Random weights keep the variance of their input, so that models with made-up weights stay finite.
    """

    def __init__(self, inputs: Axes, outputs: Axes, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        axes = (*outputs, *inputs) if KERNEL_LAYOUT == "out_in" else (*inputs, *outputs)
        std = math.prod(size for _, size in inputs) ** -0.5
        kernel = normal(rngs, tuple(size for _, size in axes), std, dtype)
        self.kernel = nnx.Param(kernel, axes=tuple(name for name, _ in axes))
        zeros = jnp.zeros(tuple(size for _, size in outputs), dtype)
        self.bias = nnx.Param(zeros, axes=tuple(name for name, _ in outputs)) if bias else None

    def __call__(self, x: Float[Array, "T *inputs"], out_dtype: jnp.dtype | None = None) -> Float[Array, "T *outputs"]:
        y = contract(x, self.kernel[...], KERNEL_LAYOUT, out_dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
