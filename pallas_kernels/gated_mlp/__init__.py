"""The gated feed-forward layer: two projections, an activation and the projection back."""

from collections.abc import Callable

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Op, only_on
from pallas_kernels.gated_mlp import reference

OP = Op(
    "gated_mlp",
    {
        "mosaic_gpu": only_on("gpu", "pallas_kernels.gated_mlp.mosaic_gpu", "gated_mlp"),
        "xla": reference.gated_mlp,
    },
)


def gated_mlp(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "F 2 D"],
    down: Float[Array, "E F"],
    activation: Callable[[Array], Array],
    product: Callable[[Array, Array], Array],
    *,
    implementation: str | None = None,
) -> Float[Array, "T E"]:
    """`down(activation(gate(x)) * up(x))`, without biases (Shazeer, 2020, GLU variants).

    Sums are accumulated in float32 or better and the activation is computed in float32. What goes into `down` is
    rounded to the dtype of `x`; gate and up are as well where they are separate products.

    Args:
        x: tokens.
        gate_up: weights of gate and up for each of the `F` inner features.
        down: weights of each output.
        activation: of the gate, element by element.
        product: `(x[T, I], weights[*O, I]) -> [T, *O]`, used where no kernel does all at once.
        implementation: a name in `OP.table` for that one or failure, None for the first that can serve.

    Raises:
        ValueError: the implementation is unknown.
        NotImplementedError: no implementation (or not the named one) serves these shapes.
    """
    return OP(implementation, x, gate_up, down, activation, product)
