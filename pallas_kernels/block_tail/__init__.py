"""The second half of a decoder's layer: what follows attention, up to the next layer."""

from collections.abc import Callable

from jaxtyping import Array, Float

from pallas_kernels.block_tail import reference
from pallas_kernels.dispatch import Op, only_on

OP = Op(
    "block_tail",
    {
        "mosaic_gpu": only_on("gpu", "pallas_kernels.block_tail.mosaic_gpu", "block_tail"),
        "xla": reference.block_tail,
    },
)


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
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """`y + gated_mlp(rms_norm(y))`, where `y = x + projection(heads)`, without biases.

    The norm (Zhang and Sennrich, 2019) and the sums inside products are computed in float32 or better; `y` is rounded
    to the dtype of `x`. What goes into the feed-forward layer is rounded to it as well, after the norm or before.

    Args:
        x: what went into the layer, before its first norm.
        heads: of all query heads, what attention gave.
        projection: weights of attention's output.
        scale: of the norm.
        gate_up: weights of gate and up for each of the `F` inner features.
        down: weights of each output of the feed-forward layer.
        activation: of the gate, element by element.
        product: `(x[T, I], weights[*O, I]) -> [T, *O]`, used where no kernel does all at once.
        norm_eps: added to the mean of squares.
        norm_offset: added to `scale`.
        implementation: a name in `OP.table` for that one or failure, None for the first that can serve.

    Raises:
        ValueError: the implementation is unknown.
        NotImplementedError: no implementation (or not the named one) serves these shapes.
    """
    weights = projection, scale, gate_up, down
    return OP(implementation, x, heads, *weights, activation, product, norm_eps=norm_eps, norm_offset=norm_offset)
