"""Write new keys and values in plain jax: the specification, and the implementation for CPUs."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def write_kv(
    kv: Float[Array, "L pages kinds K p H"],
    layer: int | Int[Array, ""],
    cells: Float[Array, "T kinds K H"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
) -> Float[Array, "L pages kinds K p H"]:
    """See `pallas_kernels.kv_write.write_kv`; `cells` are keys and values as a page holds them.

    One scatter whose window is a token's keys and values of all heads.
    """
    pages = jnp.where(pages < 0, kv.shape[1], pages)  # jax would count negative pages from the end
    return kv.at[layer, pages, :, :, offsets].set(cells, mode="drop")
