"""Root-mean-square norm and a product with weights."""

from collections.abc import Callable

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Op, only_on
from pallas_kernels.norm_matmul import reference

OP = Op(
    "norm_matmul",
    {
        "mosaic_gpu": only_on("gpu", "pallas_kernels.norm_matmul.mosaic_gpu", "norm_matmul"),
        "xla": reference.norm_matmul,
    },
)


def norm_matmul(
    x: Float[Array, "T D"],
    scale: Float[Array, "D"],
    weights: Float[Array, "*outputs D"],
    product: Callable[[Array, Array], Array],
    *,
    norm_eps: float,
    norm_offset: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "T *outputs"]:
    """`weights @ rms_norm(x)` for each token, the norm (Zhang and Sennrich, 2019) rounded to the dtype of `x`.

    Args:
        x: tokens.
        scale: of the norm.
        weights: of each output.
        product: `(x[T, D], weights[*outputs, D]) -> [T, *outputs]`, used where no kernel does both.
        norm_eps: added to the mean of squares.
        norm_offset: added to `scale`.
        implementation: a name in `OP.table` for that one or failure, None for the first that can serve.

    Raises:
        ValueError: the implementation is unknown.
        NotImplementedError: no implementation (or not the named one) serves these shapes.
    """
    return OP(implementation, x, scale, weights, product, norm_eps=norm_eps, norm_offset=norm_offset)
