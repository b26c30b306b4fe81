"""Write new keys and values into the stacked paged cache."""

from jax import Array
from jaxtyping import Float, Int


def write_kv(
    kv: Float[Array, "L pages 2 K p H"],
    layer: int | Int[Array, ""],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
) -> Float[Array, "L pages 2 K p H"]:
    """Return `kv` with `kv[layer, pages[t], 0 or 1, :, offsets[t]] = k[t] or v[t]`.

    Rows whose page is out of range are dropped. With `kv` donated the update is in place.
    """
    return kv.at[layer, pages, 0, :, offsets].set(k, mode="drop").at[layer, pages, 1, :, offsets].set(v, mode="drop")
