"""Root-mean-square normalisation in plain jax, for layers and for what specifies kernels."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*rows D"], scale: Float[Array, "D"], eps: float, offset: float
) -> Float[Array, "*rows D"]:
    """`x / rms(x) * (offset + scale)` over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * (offset + scale.astype(jnp.float32))).astype(x.dtype)
