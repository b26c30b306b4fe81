"""Write new keys and values into the stacked paged cache."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Op, only_on
from pallas_kernels.kv_layout import as_cells
from pallas_kernels.kv_write import reference

OP = Op(
    "write_kv",
    {"mosaic_tpu": only_on("tpu", "pallas_kernels.kv_write.mosaic_tpu", "write_kv"), "xla": reference.write_kv},
)


def write_kv(
    kv: Float[Array, "L pages kinds K p width"],
    layer: int | Int[Array, ""],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
    *,
    implementation: str | None = None,
) -> Float[Array, "L pages kinds K p width"]:
    """Return `kv` with `kv[layer, pages[t], 0 or 1, :, offsets[t]] = k[t] or v[t]`.

    Rows whose page is `>= pages` or negative are dropped. Rows of one page stand next to each other, in ascending order
    of their offsets, as the chunks of sequences do. With `kv` donated the update is in place. `k` and `v` must have the
    dtype of `kv`; another layout of a page (`pallas_kernels.kv_layout`) follows from its shape.

    Raises:
        ValueError: dtypes differ, or the implementation is unknown.
        NotImplementedError: no implementation (or not the named one) serves these shapes.
    """
    if not (k.dtype == v.dtype == kv.dtype):
        raise ValueError(f"dtypes of k ({k.dtype}) and v ({v.dtype}) must be the cache's ({kv.dtype}); cast them first")
    with jax.named_scope("write_kv"):
        return OP(implementation, kv, layer, as_cells(k, v, kv.shape[2], kv.shape[5]), pages, offsets)
