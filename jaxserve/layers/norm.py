"""Root-mean-square normalisation."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.norm import rms_norm


class RMSNorm(nnx.Module):
    """`x / rms(x) * (offset + scale)` over the last axis, computed in float32 (Zhang and Sennrich, 2019).

    `offset` is 1 in families that store the scale as its distance from one.
    """

    def __init__(self, size: int, *, axis: str = "D", eps: float, offset: float = 0.0, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.full((size,), 1.0 - offset, dtype), axes=(axis,))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        return rms_norm(x, self.scale[...], self.eps, self.offset)
