"""Norm and product one after the other: the specification, and what runs where no kernel does both."""

from collections.abc import Callable

from jaxtyping import Array, Float

from pallas_kernels.norm import rms_norm


def norm_matmul(
    x: Float[Array, "T D"],
    scale: Float[Array, "D"],
    weights: Float[Array, "*outputs D"],
    product: Callable[[Array, Array], Array],
    *,
    norm_eps: float,
    norm_offset: float = 0.0,
) -> Float[Array, "T *outputs"]:
    """See `pallas_kernels.norm_matmul.norm_matmul`."""
    return product(rms_norm(x, scale, norm_eps, norm_offset), weights)
