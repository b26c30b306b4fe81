"""Restrict logits to the tokens that min-p, top-k and top-p sampling may choose."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Op
from pallas_kernels.top_k_top_p import reference

OP = Op("top_k_top_p_mask", {"xla": reference.top_k_top_p_mask})


def top_k_top_p_mask(
    logits: Float[Array, "S V"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    min_p: Float[Array, "S"],
    *,
    implementation: str | None = None,
) -> Float[Array, "S V"]:
    """Set the logits outside each row's sampling set to -inf; the others stay as they are.

    Three filters, in this order, each on what the one before kept (`logits` are already divided by the temperature):

    1. min-p keeps tokens with `p >= min_p * max p` (Nguyen et al., "Min-p Sampling", 2024); 0 is off.
    2. top-k keeps tokens whose logit is at least the k-th largest, ties at the boundary included; `k <= 0` or
       `k >= V` is off.
    3. top-p keeps a token iff the probabilities, renormalised over what is left, of all strictly larger logits sum to
       less than `top_p` (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019). So the best token is
       kept whatever `top_p` is, and ties stay together; `top_p >= 1` is off.

    Logits of -inf are never kept, and come out as -inf; NaN and +inf are not supported.

    Args:
        logits: float32; top_k: int32; top_p, min_p: float32; one value per row.
        implementation: a name in `OP.table` for that one or failure, None for the first that can serve.

    Raises:
        ValueError: `logits` are not float32, or the implementation is unknown.
        NotImplementedError: no implementation (or not the named one) serves these shapes.
    """
    if logits.dtype != "float32":
        raise ValueError(f"logits must be float32, not {logits.dtype}; cast them first")
    with jax.named_scope("top_k_top_p_mask"):
        return OP(implementation, logits, top_k, top_p, min_p)
