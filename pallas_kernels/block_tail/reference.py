"""The second half of a layer as separate steps: the specification, and what runs where no kernel does all at once."""

from collections.abc import Callable

from jaxtyping import Array, Float

from pallas_kernels.gated_mlp import gated_mlp
from pallas_kernels.norm import rms_norm


def block_tail(
    x: Float[Array, "T D"],
    heads: Float[Array, "T N"],
    projection: Float[Array, "D N"],
    scale: Float[Array, "D"],
    gate_up: Float[Array, "F 2 D"],
    down: Float[Array, "D F"],
    activation: Callable[[Array], Array],
    product: Callable[[Array, Array], Array],
    *,
    norm_eps: float,
    norm_offset: float = 0.0,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.block_tail.block_tail`."""
    y = x + product(heads, projection)
    return y + gated_mlp(rms_norm(y, scale, norm_eps, norm_offset), gate_up, down, activation, product)
