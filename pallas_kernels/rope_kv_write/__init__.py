"""Everything between the fused projection and attention: head norms, rotary embedding, write into the paged cache."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Op, only_on
from pallas_kernels.rope_kv_write import reference

OP = Op(
    "rope_kv_write",
    {
        "mosaic_gpu": only_on("gpu", "pallas_kernels.rope_kv_write.mosaic_gpu", "rope_kv_write"),
        "xla": reference.rope_kv_write,
    },
)


def rope_kv_write(
    qkv: Float[Array, "T K heads H"],
    kv: Float[Array, "L pages kinds K p width"],
    layer: int | Int[Array, ""],
    cos: Float[Array, "T R"],
    sin: Float[Array, "T R"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
    *,
    q_scale: Float[Array, "H"] | None = None,
    k_scale: Float[Array, "H"] | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "L pages kinds K p width"]]:
    """Turn the fused projection into queries and cached keys and values.

    Each KV head of `qkv` has its `G = heads - 2` query heads, its key and its value, in this order. Queries and keys
    are normed over `H` where a scale is given, `x / rms(x) * (norm_offset + scale)`, rounded to their dtype, and then
    rotated: feature `i` with feature `i + R` for `i < R`, by float32 `cos` and `sin`; features from `2 R` pass
    unchanged. Keys and values go to `kv[layer, pages[t], 0 or 1, :, offsets[t]]`, cast to its dtype.

    Rows whose page is `>= pages` or negative are not written; their queries are made all the same. Rows of one page
    stand next to each other, in ascending order of their offsets. With `kv` donated the update is in place.

    Returns:
        The queries, `N = K G` heads in the dtype of `qkv`, and the updated cache.

    Raises:
        ValueError: the implementation is unknown.
        NotImplementedError: no implementation (or not the named one) serves these shapes.
    """
    with jax.named_scope("rope_kv_write"):
        return OP(
            implementation, qkv, kv, layer, cos, sin, pages, offsets,
            q_scale=q_scale, k_scale=k_scale, norm_eps=norm_eps, norm_offset=norm_offset,
        )  # fmt: skip
