"""The gated feed-forward layer as separate products: the specification, and what runs where no kernel does."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


def gated_mlp(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "F 2 D"],
    down: Float[Array, "E F"],
    activation: Callable[[Array], Array],
    product: Callable[[Array, Array], Array],
) -> Float[Array, "T E"]:
    """See `pallas_kernels.gated_mlp.gated_mlp`."""
    return product(gated(product(x, gate_up), activation), down)


def gated(both: Float[Array, "T F 2"], activation: Callable[[Array], Array]) -> Float[Array, "T F"]:
    """`activation(gate) * up` of each pair, computed in float32."""
    wide = both.astype(jnp.float32)
    return (activation(wide[:, :, 0]) * wide[:, :, 1]).astype(both.dtype)
