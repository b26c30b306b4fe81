"""The product in plain jax: the specification, and the implementation for everything else."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float


def matmul(x: Float[Array, "T I"], weights: Float[Array, "O I"], out_dtype: DTypeLike) -> Float[Array, "T O"]:
    """See `pallas_kernels.matmul.matmul`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, weights, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=out_dtype
    )
