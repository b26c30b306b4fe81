"""Where the set of tokens begins that min-p, top-k and top-p sampling may choose from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Op, only_on
from pallas_kernels.top_k_top_p import reference

OP = Op(
    "top_k_top_p_floor",
    {
        "mosaic_gpu": only_on("gpu", "pallas_kernels.top_k_top_p.mosaic_gpu", "top_k_top_p_floor"),
        "mosaic_tpu": only_on("tpu", "pallas_kernels.top_k_top_p.mosaic_tpu", "top_k_top_p_floor"),
        "xla": reference.top_k_top_p_floor,
    },
)


def top_k_top_p_floor(
    logits: Float[Array, "S V"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    min_p: Float[Array, "S"],
    scale: Float[Array, "S"] | None = None,
    *,
    axis: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "S"]:
    """The floor of each row's sampling set, which is every token with a logit at or above it.

    Three filters, in this order, each on what the one before kept, of the logits times `scale`, as is the floor:

    1. min-p keeps tokens with `p >= min_p * max p` (Nguyen et al., "Min-p Sampling", 2024); 0 is off.
    2. top-k keeps tokens whose logit is at least the k-th largest, ties at the boundary included; `k <= 0` or
       `k >= V` is off.
    3. top-p keeps a token iff the probabilities, renormalised over what is left, of all strictly larger logits sum to
       less than `top_p` (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019). So the best token is
       kept whatever `top_p` is, and ties stay together; `top_p >= 1` is off.

    Each keeps the largest logits, hence one number says it all. It need not be a logit of the row: -inf where nothing
    is filtered. Logits of -inf have no probability and are never chosen; NaN and +inf are not supported. Sums are
    float32, so a token whose larger ones sum to `top_p` within rounding may fall on either side.

    Args:
        logits: float32; top_k: int32; top_p, min_p: float32; one value per row.
        scale: positive, one over the temperature of each row; None: 1.
        axis: of the mesh, inside a `shard_map`, over which each device holds `V` of the row's logits.
        implementation: a name in `OP.table` for that one or failure, None for the first that can serve.

    Raises:
        ValueError: `logits` are not float32, or the implementation is unknown.
        NotImplementedError: no implementation (or not the named one) serves these shapes.
    """
    if logits.dtype != "float32":
        raise ValueError(f"logits must be float32, not {logits.dtype}; cast them first")
    with jax.named_scope("top_k_top_p_floor"):
        scale = jnp.ones_like(top_p) if scale is None else scale
        return OP(implementation, logits, top_k, top_p, min_p, scale, axis=axis)
